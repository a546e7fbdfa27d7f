"""Policies: the data path against the oracle, for a bounded time; `make differential` goes on as long as one likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from policed_worlds import INTERFACES, LOCAL, OWN
from policy_differential import explore, machine
from worlds import HERE

from waggle.model.meta import ObjectKey
from waggle.model.packets import End
from waggle.model.policy_flows import PolicyPacket
from waggle.testing.differential import Difference
from waggle.testing.machine import Machine
from waggle.testing.policy_differential import PolicyComparison

SEEDS = range(2036, 2039)
EXAMPLES = 200
#: what must be among the packets, so that nothing is left out without a word
KINDS = {
    "pass",
    "drop",
    "pass, error",
    "drop, error",
    "pass, error about a flow",
    "pass, itself",
    "pass, pending",
    "drop, pending",
    "pass, not asked",
    "pass, old or new",
    "drop, old or new",
    "goes on, old and new",
}


@pytest.fixture(scope="module")
def loaded() -> Iterator[Machine]:
    made = machine("policed")
    yield made
    made.close()


def test_the_data_path_does_what_the_oracle_says(loaded: Machine) -> None:
    agreed: Counter[str] = Counter()
    for seed in SEEDS:
        agreed += explore(loaded, seed, EXAMPLES)
    assert agreed.total() > 50_000
    assert {kind.removeprefix("policy: ") for kind in agreed} == KINDS


def test_a_table_that_was_changed_behind_the_back_of_everybody_is_found(loaded: Machine) -> None:
    from tests.unit.policy_worlds import policy

    from waggle.model.meta import ObjectMeta
    from waggle.model.objects import Pod, PodIP, PodStatus

    def compare() -> None:
        comparison = PolicyComparison(loaded, dict(INTERFACES), HERE, OWN)
        try:
            status = PodStatus("Running", pod_ips=[PodIP(address) for address in LOCAL[0]])
            comparison.put(Pod(ObjectMeta("p0", "x"), status=status), policy("{podSelector: {}, ingress: [{}]}"))
            packet = PolicyPacket("UDP", End("192.0.2.77", 1000), End(LOCAL[0][0], 80))
            comparison.send(packet)
            comparison.send(packet)
            policies = loaded.maps["wag_policy"]
            policies.delete_many(list(policies.keys()))
            comparison.send(packet)  # a flow that is known
            comparison.send(packet._replace(source=End("192.0.2.77", 1001)))
        finally:
            comparison.close()

    with pytest.raises(Difference, match=r"(?s)oracle says: pass.*differs: drop") as raised:
        loaded.inside(compare)
    assert str(raised.value).count("192.0.2.77:1000 > ") == 3
    assert INTERFACES[LOCAL[0][0]] == ObjectKey("x", "p0")
