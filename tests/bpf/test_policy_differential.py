"""Policies: the data path against the oracle, for a bounded time; `make differential` goes on as long as one likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from policed_worlds import INTERFACES, LOCAL, OWN, PODS, REMOTE
from policy_differential import explore, machine
from tests.unit.policy_worlds import cluster_policy, policy
from worlds import HERE

from waggle.model.meta import ObjectKey, ObjectMeta
from waggle.model.objects import Pod, PodIP, PodSpec, PodStatus
from waggle.model.packets import End
from waggle.model.policy_flows import PolicyPacket
from waggle.testing.differential import Difference
from waggle.testing.machine import Machine
from waggle.testing.policy_differential import PolicyComparison, Probe

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


def pod(number: int, **labels: str) -> Pod:
    key, addresses, node = PODS[number]
    status = PodStatus("Running", pod_ips=[PodIP(address) for address in addresses])
    return Pod(ObjectMeta(key.name, key.namespace, labels=labels), PodSpec(node), status)


def test_policies_that_changed_while_there_was_no_agent(loaded: Machine) -> None:
    """The first one's sets know nothing of the second one's classes; still every probe meets the old or the new."""
    tier = "ingress: [{from: [{podSelector: {matchLabels: {tier: t}}}]}]"
    before = policy("{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}", "a")
    after = policy(f"{{podSelector: {{}}, {tier}}}", "b")
    deny = "ingress: [{action: Deny, from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: c}}}}]}]"
    rest = "subject: {namespaces: {}}"
    probes = [Probe("TCP", REMOTE[number][v], LOCAL[0][v], 80) for number in (0, 1) for v in (0, 1)]

    def compare() -> None:
        comparison = PolicyComparison(loaded, dict(INTERFACES), HERE, OWN)
        try:
            pods = [pod(0), pod(3, app="b", tier="t"), pod(4, app="c", tier="u")]
            comparison.put(*pods, before, cluster_policy(f"{{{rest}, {deny}}}", "deny"))
            comparison.restart(after, cluster_policy(f"{{{rest}, {deny}}}", "more", priority=3), probes=probes)
            assert set(comparison.agreed) == {"policy: pass, old or new", "policy: drop, old or new"}
        finally:
            comparison.close()

    loaded.inside(compare)


def test_a_table_that_was_changed_behind_the_back_of_everybody_is_found(loaded: Machine) -> None:
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
