"""Flows through change: rolling updates, endpoints that go, affinity and node ports that change while clients ask.

Every request is in a ledger (see ledger.py): what is not answered stays an open item. `answerers` are pods with two
servers, one for the ledger on 8080 and one on 8081 that says who it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_machine import COMMAND, ECHO, Lab, pod, service, unique_name
from ledger import Account, LedgerLoad, Way, server_command
from test_services import bare

from waggle.lab import processes, published
from waggle.lab.traffic import Probe
from waggle.model.objects import ObjectKey

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

NODES = {1: ("10.77.0.11", "fd00:77::11"), 2: ("10.77.0.12", "fd00:77::12")}
PORTS = [("TCP", 8080), ("UDP", 8080), ("TCP", 8081), ("UDP", 8081)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(unique_name("c"))
    try:
        made.run("up", "--nodes", "2")
        made.apply(
            tmp_path_factory.mktemp("change"),
            pod("asker", "sleep", "infinity", nodeName="node1"),
            answerer("old", 1),
            answerer("new", 2),
        )
        yield made
    finally:
        made.close()


def answerer(name: str, node: int) -> dict[str, Any]:
    made = pod(name, *server_command(8080), ports=PORTS[:2], nodeName=f"node{node}")
    who = {"name": "who", "command": [*ECHO, "--port", "8081"], "ports": []}
    who["ports"] = [{"containerPort": port, "protocol": protocol} for protocol, port in PORTS[2:]]
    made["spec"]["containers"].append(who)
    return made


def led_to(name: str, *answerers: str, addresses: dict[str, tuple[str, str]], **spec: Any) -> list[dict[str, Any]]:
    """A Service without a selector, port 80 for the ledger and 81 for who it is, and slices with these endpoints."""
    targets = {80: 8080, 81: 8081}
    ports = [
        {"name": f"{protocol.lower()}{port}", "port": port, "targetPort": target, "protocol": protocol}
        for port, target in targets.items()
        for protocol in ("TCP", "UDP")
    ]
    made = service(name, ports=ports, selector=None, **spec)
    slices = [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": f"{name}-{family[3]}", "labels": {"kubernetes.io/service-name": name}},
            "addressType": family,
            "ports": [{"name": p["name"], "port": p["targetPort"], "protocol": p["protocol"]} for p in ports],
            "endpoints": [{"addresses": [addresses[pod_name][index]]} for pod_name in answerers],
        }
        for index, family in enumerate(("IPv4", "IPv6"))
    ]
    return [made, *slices]


@pytest.fixture
def apply(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Applies objects, and removes them all in the end."""
    made: dict[tuple[str, str], dict[str, Any]] = {}

    def do(*documents: dict[str, Any]) -> None:
        made.update({(d["kind"], d["metadata"]["name"]): d for d in documents})
        lab.apply(tmp_path, *documents)

    yield do
    if made:
        lab.run("delete", "-f", str(lab.manifest(tmp_path, *made.values())))


@pytest.fixture
def addresses(lab: Lab) -> dict[str, tuple[str, str]]:
    return {name: tuple(lab.pod(name)["addresses"]) for name in ("old", "new")}


def there(lab: Lab, place: str) -> list[str]:
    """The command that runs in a place: "asker", "node2", "client"; or "packets", the pod's network alone, where no
    socket hook sees anything and every packet is translated."""
    if place == "packets":
        return ["nsenter", f"--net={lab.layout.pod(ObjectKey('default', 'asker'), lab.layout.node(1)).place.netns}"]
    return [*COMMAND, "exec", "--name", lab.name, place, "--"]


@contextlib.contextmanager
def asking(lab: Lab, ways: dict[str, list[Way]]) -> Iterator[dict[str, LedgerLoad]]:
    """Loads by place, all of which have had answers."""
    with contextlib.ExitStack() as stack:
        loads = {}
        for place, wanted in ways.items():
            loads[place] = load = LedgerLoad(there(lab, place), wanted)
            stack.callback(load.close)
        for load in loads.values():
            load.await_answers(3)
        yield loads


def ledger(loads: dict[str, LedgerLoad]) -> dict[str, Account]:
    return {f"{place} {name}": a for place, load in loads.items() for name, a in load.finish().items()}


def lost(accounts: dict[str, Account]) -> dict[str, Account]:
    return {name: account for name, account in accounts.items() if account.open_items or account.errors}


def ways_to(lab: Lab, name: str, *kinds: str, outside: bool = True) -> dict[str, list[Way]]:
    """To every kind of frontend that the place can use."""
    found = lab.service(name)

    def ways(hosts: list[tuple[str, int]], wanted: tuple[str, ...] = kinds) -> list[Way]:
        return [Way(f"{kind} {host}:{port}", kind, host, port) for host, port in hosts for kind in wanted]

    every = {place: ways([(host, 80) for host in found["clusterIPs"]]) for place in ("asker", "node2", "packets")}
    ports = {entry["protocol"]: entry["nodePort"] for entry in found["ports"] if entry["port"] == 80 and outside}
    for kind in kinds if outside else ():
        port = ports[kind[:3].upper()]
        hosts = [(host, port) for node in NODES.values() for host in node]
        every.setdefault("client", []).extend(ways(hosts, (kind,)))
    return every


def eventually(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- rolling update --------------------------------------------------------------------------------------------------

REPLICAS, REPLACED = 3, 4


def end_at_once(lab: Lab, name: str, node: int) -> None:
    """Everybody and the pod are told at the same moment, as by an apiserver and a kubelet; the pod does not linger."""
    show_terminating(lab, name, ready=True)
    signal_pod(lab, name, node)


def end_gracefully(lab: Lab, name: str, node: int) -> None:
    """The pod serves on while it terminates, then is not ready any more, and ends when nobody comes."""
    show_terminating(lab, name, ready=True)
    time.sleep(0.4)
    show_terminating(lab, name, ready=False)
    time.sleep(0.4)
    signal_pod(lab, name, node)


def show_terminating(lab: Lab, name: str, *, ready: bool) -> None:
    document = published.find(lab.layout, "Pod", ObjectKey("default", name))
    assert document is not None
    document["metadata"]["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    document["status"]["conditions"] = [{"type": "Ready", "status": str(ready)}]
    published.publish(lab.layout, document)


def signal_pod(lab: Lab, name: str, node: int) -> None:
    place = lab.layout.pod(ObjectKey("default", name), lab.layout.node(node)).place
    for pid in processes.pids_below(place.cgroup):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def roll(
    lab: Lab,
    apply: Callable[..., None],
    tmp_path: Path,
    kinds: tuple[str, ...],
    end: Callable[[Lab, str, int], None],
) -> dict[str, Account]:
    """Replaces pods one after the other while every place asks every 10 ms; the ledger."""

    def replica(number: int) -> dict[str, Any]:
        return pod(f"roll-{number}", *server_command(8080), ports=PORTS[:2], nodeName=f"node{number % 2 + 1}")

    apply(service("roll", type="NodePort"), *(replica(number) for number in range(REPLICAS)))
    with asking(lab, ways_to(lab, "roll", *kinds)) as loads:
        for number in range(REPLACED):
            apply(replica(REPLICAS + number))
            end(lab, f"roll-{number}", number % 2 + 1)
            lab.run("delete", "-f", str(lab.manifest(tmp_path, replica(number))))
        return ledger(loads)


def test_rolling_update_with_graceful_termination_loses_nothing(
    lab: Lab, apply: Callable[..., None], tmp_path: Path
) -> None:
    accounts = roll(lab, apply, tmp_path, ("tcp-new", "udp-new"), end_gracefully)
    assert not lost(accounts)
    assert min(account.sent for account in accounts.values()) > 100


def test_rolling_update_of_pods_that_end_at_once_loses_no_more_than_one_in_a_hundred(
    lab: Lab, apply: Callable[..., None], tmp_path: Path
) -> None:
    accounts = roll(lab, apply, tmp_path, ("tcp-new",), end_at_once)
    sent = sum(account.sent for account in accounts.values())
    failed = sum(account.open_items for account in accounts.values())
    assert sent > 1000 and failed <= sent / 100, (sent, failed, lost(accounts))


# -- endpoints that go -----------------------------------------------------------------------------------------------


def who(lab: Lab, name: str, count: int = 12) -> set[str]:
    """Who answers new connections of the Service, from everywhere."""
    found = lab.service(name)
    port = next((e["nodePort"] for e in found["ports"] if e["port"] == 81 and e["protocol"] == "TCP"), 0)
    inside = [Probe(host, 81, "tcp", count, 1.0) for host in found["clusterIPs"]]
    outcomes = [*lab.ask("asker", *inside), *bare(lab, "asker", 1, *inside)]
    if port:
        outcomes += lab.ask(
            "client", *[Probe(host, port, "tcp", count, 1.0) for node in NODES.values() for host in node]
        )
    assert not any(outcome.failed for outcome in outcomes), outcomes
    return {name for outcome in outcomes for name in outcome.answers}


def test_established_connections_stay_on_an_endpoint_that_is_removed(
    lab: Lab, apply: Callable[..., None], addresses: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    """Through another set, no endpoint at all, and the Service being gone."""
    apply(*led_to("moving", "old", addresses=addresses, type="NodePort"))
    eventually(lambda: who(lab, "moving", 2) == {"old"})
    with asking(lab, ways_to(lab, "moving", "tcp-long")) as loads:

        def go_on() -> None:
            for load in loads.values():
                load.await_answers(10)

        apply(*led_to("moving", "new", addresses=addresses, type="NodePort"))
        eventually(lambda: who(lab, "moving") == {"new"})
        go_on()
        apply(*led_to("moving", addresses=addresses, type="NodePort"))
        refused = Probe(lab.service("moving")["clusterIPs"][0], 81, "tcp", 1, 1.0)
        eventually(lambda: "Connection refused" in lab.ask("asker", refused)[0].failed)
        go_on()
        gone = led_to("moving", addresses=addresses, type="NodePort")
        lab.run("delete", "-f", str(lab.manifest(tmp_path, *gone)))
        time.sleep(0.5)
        go_on()
        accounts = ledger(loads)
    assert not lost(accounts)
    assert len(accounts) == 10  # three places inside with two addresses, one outside with four


# -- affinity --------------------------------------------------------------------------------------------------------


def test_affinity_switched_on_and_off_while_clients_ask(
    lab: Lab, apply: Callable[..., None], addresses: dict[str, tuple[str, str]]
) -> None:
    def switch(affinity: str) -> None:
        apply(*led_to("sticky", "old", "new", addresses=addresses, type="NodePort", sessionAffinity=affinity))

    def spread() -> list[int]:
        """How many answer each client of each family; connections and datagrams alike."""
        found = lab.service("sticky")
        outcomes = []
        for host in found["clusterIPs"]:
            probes = [Probe(host, 81, protocol, 15, 1.0) for protocol in ("tcp", "udp")]
            outcomes += [*lab.ask("asker", *probes), *bare(lab, "asker", 1, *probes)]
        ports = {e["protocol"]: e["nodePort"] for e in found["ports"] if e["port"] == 81}
        outcomes += lab.ask(
            "client", *[Probe(NODES[1][f], ports[p], p.lower(), 15, 1.0) for f in (0, 1) for p in ports]
        )
        assert not any(outcome.failed for outcome in outcomes), outcomes
        return [len(outcome.answers) for outcome in outcomes]

    switch("None")
    with asking(lab, ways_to(lab, "sticky", "tcp-new", "tcp-long", "udp-new")) as loads:
        for _ in range(2):
            switch("ClientIP")
            eventually(lambda: set(spread()) == {1}, 10)
            assert set(spread()) == {1}
            switch("None")
            eventually(lambda: set(spread()) == {2}, 10)
        accounts = ledger(loads)
    assert not lost(accounts)


# -- node ports that change ------------------------------------------------------------------------------------------


def test_a_node_port_whose_protocol_and_number_change(
    lab: Lab, apply: Callable[..., None], addresses: dict[str, tuple[str, str]]
) -> None:
    """TCP to UDP and back on one number, both at once, another number; what was established goes on."""

    def use(*ports: tuple[str, int]) -> None:
        made = service(
            "turning",
            type="NodePort",
            selector={"app": "old"},
            ports=[
                {"name": protocol.lower(), "port": 80, "targetPort": target, "protocol": protocol, "nodePort": number}
                for protocol, number in ports
                for target in [8081]
            ],
        )
        apply(made)

    def answers(protocol: str, number: int) -> set[str]:
        """The places that are answered on a node port, all of them refused or answered."""
        found = set()
        probes = [Probe(host, number, protocol, 1, 0.3) for node in NODES.values() for host in node]
        for place, outcomes in (
            ("pod", lab.ask("asker", *probes)),
            ("packets", bare(lab, "asker", 1, *probes)),
            ("node", lab.ask("node1", *probes)),
            ("outside", lab.ask("client", *probes)),
        ):
            found |= {place for outcome in outcomes if outcome.answers}
            found |= {f"{place} in part" for outcome in outcomes if outcome.failed and any(o.answers for o in outcomes)}
        return found

    everywhere = {"pod", "packets", "node", "outside"}

    def eventually_only(*served: tuple[str, int]) -> None:
        for protocol in ("tcp", "udp"):
            for number in (30710, 30711):
                wanted = everywhere if (protocol.upper(), number) in served else set()
                eventually(lambda p=protocol, n=number, w=wanted: answers(p, n) == w, 15)

    steady = service("steady", type="NodePort", selector={"app": "new"})
    apply(steady)
    with asking(lab, ways_to(lab, "steady", "tcp-new", "udp-new")) as loads:
        for served in (
            [("TCP", 30710)],
            [("UDP", 30710)],
            [("TCP", 30710)],
            [("TCP", 30710), ("UDP", 30710)],
            [("TCP", 30711)],
            [("UDP", 30711), ("TCP", 30710)],
        ):
            use(*served)
            eventually_only(*served)
        assert not lost(ledger(loads))


def test_established_connections_outlive_their_node_port(
    lab: Lab, apply: Callable[..., None], addresses: dict[str, tuple[str, str]]
) -> None:
    def use(protocol: str, number: int) -> None:
        ports = [{"name": "p", "port": 80, "targetPort": 8080, "protocol": protocol, "nodePort": number}]
        apply(service("leaving", type="NodePort", selector={"app": "old"}, ports=ports))

    use("TCP", 30720)
    ways = [Way(f"tcp-long {host}", "tcp-long", host, 30720) for node in NODES.values() for host in node]
    with asking(lab, {"client": ways, "packets": ways, "asker": ways}) as loads:
        for protocol, number in (("UDP", 30720), ("TCP", 30721)):
            use(protocol, number)
            time.sleep(0.3)
            for load in loads.values():
                load.await_answers(10)
        assert not lost(ledger(loads))
