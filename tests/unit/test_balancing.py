"""Which Services are balanced how, and what the agent tells the program that fills the tables."""

from __future__ import annotations

import msgspec
import pytest

from waggle.abi._generated import ServiceFlag
from waggle.model.choice import NodeFacts
from waggle.model.objects import EndpointSlice, ObjectKey, Service
from waggle.model.service import Balancing, Forwarding, balancing, forwarding, ignored_annotations, weight
from waggle.plan.services import PlanContext, ServiceRow, plan_service
from waggle.store import Store

KEY = ObjectKey("default", "web")


def service(**annotations: str) -> Service:
    return msgspec.convert(
        {
            "metadata": {"name": "web", "namespace": "default", "annotations": annotations},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "p", "port": 80, "protocol": "TCP"}]},
        },
        Service,
    )


def piece(name: str, addresses: list[str], share: str | None = None) -> EndpointSlice:
    return msgspec.convert(
        {
            "metadata": {
                "name": name,
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": "web"},
                "annotations": {} if share is None else {"waggle.dev/weight": share},
            },
            "addressType": "IPv4",
            "ports": [{"name": "p", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address]} for address in addresses],
        },
        EndpointSlice,
    )


def row(made: Service, *pieces: EndpointSlice, default: Balancing = Balancing.RANDOM) -> ServiceRow:
    store = Store()
    for one in (made, *pieces):
        store.upsert(one, "test")
    (found,) = plan_service(store, KEY, PlanContext(NodeFacts("node1"), balancing=default))
    return found


def test_balancing_is_the_annotation_or_the_default() -> None:
    assert balancing(service(), Balancing.RANDOM) is Balancing.RANDOM
    assert balancing(service(), Balancing.MAGLEV) is Balancing.MAGLEV
    assert balancing(service(**{"waggle.dev/balancing": "maglev"}), Balancing.RANDOM) is Balancing.MAGLEV
    strange = service(**{"waggle.dev/balancing": "Maglev"})
    assert balancing(strange, Balancing.RANDOM) is Balancing.RANDOM
    assert ignored_annotations(strange) == [
        "annotation waggle.dev/balancing: 'Maglev' is not random or maglev; the default is used"
    ]
    assert ignored_annotations(service()) == []


def test_forwarding_is_the_annotation_or_the_default() -> None:
    assert forwarding(service(), Forwarding.DSR) is Forwarding.DSR
    assert forwarding(service(**{"waggle.dev/forwarding": "dsr"}), Forwarding.SNAT) is Forwarding.DSR
    assert ignored_annotations(service(**{"waggle.dev/forwarding": "ipip"})) == [
        "annotation waggle.dev/forwarding: 'ipip' is not snat or dsr; the default is used"
    ]
    direct = row(service(**{"waggle.dev/forwarding": "dsr"}), piece("a", ["10.0.0.1"]))
    assert direct.settings[0].flags == ServiceFlag.DSR


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3), ("0", 0), ("1000", 1000), ("9999", 1000), ("-1", 1), ("x", 1), ("", 1), ("٣", 1)]
)
def test_weights(text: str, expected: int) -> None:
    assert weight({"waggle.dev/weight": text}) == expected
    assert weight(None) == 1


def test_rows_refer_to_tables() -> None:
    plain = row(service(), piece("a", ["10.0.0.1", "10.0.0.2"]))
    assert (plain.tables, plain.settings[0].maglev, plain.settings[0].flags) == ((), 0, 0)
    hashed = row(service(**{"waggle.dev/balancing": "maglev"}), piece("a", ["10.0.0.1", "10.0.0.2"]))
    assert [table.id for table in hashed.tables] == [hashed.settings[0].maglev]
    assert hashed.settings[0].flags == ServiceFlag.BY_HASH
    assert hashed.backends == plain.backends


def test_equal_sets_have_equal_tables_whatever_order_they_come_in() -> None:
    made = service(**{"waggle.dev/balancing": "maglev"})
    one = row(made, piece("a", ["10.0.0.1", "10.0.0.2"]), piece("b", ["10.0.0.3"]))
    other = row(made, piece("b", ["10.0.0.3", "10.0.0.2"]), piece("a", ["10.0.0.1"]))
    assert one.tables == other.tables
    assert row(made, piece("a", ["10.0.0.1"])).tables != one.tables


def test_weights_of_slices() -> None:
    weighted = row(service(), piece("blue", ["10.0.0.1"], "9"), piece("green", ["10.0.0.2"]))
    assert weighted.settings[0].flags == 0  # weights need a table, not the hash
    assert weighted.tables[0].greatest == 9
    assert weighted.tables != row(service(), piece("blue", ["10.0.0.1"], "8"), piece("green", ["10.0.0.2"])).tables
    drained = row(service(), piece("blue", ["10.0.0.1"], "0"), piece("green", ["10.0.0.2"]))
    assert drained.backends == row(service(), piece("green", ["10.0.0.2"])).backends
    nothing = row(service(), piece("blue", ["10.0.0.1"], "0"))
    assert nothing.backends == row(service(), piece("blue", ["10.0.0.1"])).backends
