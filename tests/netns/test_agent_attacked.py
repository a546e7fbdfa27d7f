"""One real agent while the world changes under it: killed again and again, interfaces that move, very many files.

What counts in the end is that the tables hold what a fresh plan of the manifests says, to the byte.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import NODE4, NODE6, PEER4, PEER6, AgentNode, endpoints, service

from waggle.abi._generated import BACKEND_SIZE, Endpoint, EndpointFlag
from waggle.abi._generated import Service as ServiceValue
from waggle.abi.address import unpack_address
from waggle.kernel.maps import Map
from waggle.model.choice import NodeFacts
from waggle.plan.services import PlanContext, plan_service
from waggle.sources.yaml_objects import parse_manifest
from waggle.store import Store

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

VIP = "10.96.0.10"
#: key of a frontend → what it may hold: (flags, backends); more than one where Services claim the same
Tables = dict[bytes, set[tuple[int, bytes]]]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentNode]:
    with AgentNode(tmp_path) as made:
        yield made


def planned(node: AgentNode) -> Tables:
    """What a fresh store of the manifests says."""
    store = Store()
    for file in sorted(node.manifests.glob("*.json")):
        for placed in parse_manifest(file.read_bytes(), file.name).objects.values():
            store.upsert(placed.obj, file.name)
    wanted: Tables = {}
    for key in store.services:
        for row in plan_service(store, key, PlanContext(NodeFacts("nowhere"))):
            for frontend, settings in zip(row.keys, row.settings, strict=True):
                wanted.setdefault(frontend, set()).add((settings.flags, row.backends))
    return wanted


def programmed(node: AgentNode) -> dict[bytes, tuple[int, bytes]]:
    """What the pinned maps say. No two sets of backends may share a record."""
    backends = Map.pinned(node.bpf_root / "maps" / "wag_backends")
    found = {}
    runs: set[tuple[int, int]] = set()
    for key, raw in Map.pinned(node.bpf_root / "maps" / "wag_services").dump():
        value = ServiceValue.unpack(raw)
        assert value.offset + value.count <= backends.info.max_entries
        records = backends.read_array(value.offset, value.count)
        assert len(records) == value.count * BACKEND_SIZE
        found[key] = (value.flags, records)
        runs.add((value.offset, value.count))
    end = 0
    for offset, count in sorted(run for run in runs if run[1]):
        assert offset >= end, "extents overlap"
        end = offset + count
    return found


def differences(node: AgentNode) -> list[str]:
    wanted, found = planned(node), programmed(node)
    return [f"missing {key.hex()}" for key in wanted if key not in found] + [
        f"{key.hex()} is {value}, not {wanted.get(key)}"
        for key, value in found.items()
        if value not in wanted.get(key, ())
    ]


def pod_faults(node: AgentNode) -> list[str]:
    """Where the endpoint table and the pins differ from the pods that the agent knows."""
    pods = node.get("/endpoints")
    table = {}
    for key, raw in Map.pinned(node.bpf_root / "maps" / "wag_endpoints").dump():
        value = Endpoint.unpack(raw)
        if value.flags & EndpointFlag.POD:
            table[unpack_address(key)] = value.ifindex
    wanted = {address: pod["ifindex"] for pod in pods for address in pod["addresses"]}
    pins = {pin.name.split("-")[1] for pin in (node.bpf_root / "links").glob("pod-*")}
    interfaces = {pod["interface"] for pod in pods}
    hooks = node.hooks()
    return [
        *([f"endpoints {table}, not {wanted}"] if table != wanted else []),
        *([f"pins {pins}, not {interfaces}"] if pins != interfaces else []),
        *(
            f"{name} has {hooks[f'{name} TCX_INGRESS']}"
            for name in interfaces
            if hooks[f"{name} TCX_INGRESS"] != ["wag_pod_egress"]
        ),
    ]


# -- killed ----------------------------------------------------------------------------------------------------------


class Changes(threading.Thread):
    """200 changes of manifests a second: Services appear, change, move, go, and claim each other's addresses."""

    def __init__(self, node: AgentNode, seed: int) -> None:
        super().__init__(daemon=True)
        self._node, self._random = node, random.Random(seed)
        self.ended = threading.Event()
        self.made = 0

    def run(self) -> None:
        begin = time.monotonic()
        while not self.ended.is_set():
            self._change(self._random.randrange(80))
            self.made += 1
            time.sleep(max(0.0, begin + self.made / 200 - time.monotonic()))

    def _change(self, number: int) -> None:
        choose = self._random
        name = f"s{number}"
        address = f"10.97.0.{choose.choice((number, number, number, (number + 1) % 80)) + 1}"
        backends = [f"198.51.100.{n}" for n in choose.sample(range(1, 200), choose.choice((0, 1, 1, 2, 5, 30)))]
        match choose.randrange(10):
            case 0:
                (self._node.manifests / f"{name}.json").unlink(missing_ok=True)
            case 1:
                self._node.apply(name, service(name, address))
            case _:
                more = {"type": "NodePort", "nodePort": 30000 + number} if number % 4 == 0 else {}
                self._node.apply(name, service(name, address, **more), endpoints(name, *backends))


class Pods(threading.Thread):
    """Pods come and go by the real plugin; what fails while the agent is away is tried again, as runtimes do."""

    def __init__(self, node: AgentNode, seed: int) -> None:
        super().__init__(daemon=True)
        self._node, self._random = node, random.Random(seed)
        self.ended = threading.Event()
        self.there: set[str] = set()
        self.done = 0
        self.names = [f"{node.name}-k{n}" for n in range(5)]
        for name in self.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            node.pods.append(name)

    def run(self) -> None:
        while not self.ended.is_set():
            name = self._random.choice(self.names)
            command = "DEL" if name in self.there else "ADD"
            self.there.add(name)  # also a failed ADD may have left something
            if self._node.cni(command, name).returncode == 0:
                self.done += 1
                if command == "DEL":
                    self.there.discard(name)
            else:
                time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_random_moments_under_changes(node: AgentNode) -> None:
    seed = int(os.environ.get("WAGGLE_TEST_SEED", "0")) or random.randrange(1 << 30)
    kills = int(os.environ.get("WAGGLE_TEST_KILLS", "10"))
    print("seed", seed)
    moments = random.Random(seed)
    node.serve(node.peer, "peer")
    node.apply("web", service("web", VIP), endpoints("web", PEER4))
    node.start()
    changes, pods = Changes(node, seed), Pods(node, seed + 1)
    threads: list[Changes | Pods] = [changes, pods]
    for thread in threads:
        thread.start()
    try:
        for _ in range(kills):
            process = node.start(wait="") if node.running[-1].poll() is not None else node.running[-1]
            time.sleep(moments.choice((0.3, 1.0)) + moments.random() * 0.9)
            assert process.poll() is None, node.log.read_text()[-3000:]
            node.stop(process)
            assert node.connect(VIP, 80) == "peer"
            node.start(wait="")
    finally:
        for thread in threads:
            thread.ended.set()
        for thread in threads:
            thread.join()
    assert changes.made > 100 * kills and pods.done > 0
    node.until(lambda: node.answers("/readyz"))
    node.until(lambda: not differences(node))
    node.until(lambda: not pod_faults(node))
    assert "Traceback" not in node.log.read_text()
    for name in pods.names:
        assert node.cni("DEL", name).returncode == 0
    assert node.get("/endpoints") == []
    node.until(lambda: not pod_faults(node))
    table = {row["address"] for row in node.dump("endpoints")}
    assert table == {NODE4, NODE6}


def test_two_services_claim_one_address_while_one_of_them_goes(node: AgentNode) -> None:
    node.serve(node.peer, "first")
    node.serve(node.peer, "second", port=8081)
    first = [service("one", VIP), endpoints("one", PEER4)]
    second = [service("two", VIP), endpoints("two", PEER4, port=8081)]
    node.apply("one", *first)
    node.start()
    for _ in range(5):
        node.apply("two", *second)
        node.until(lambda: bool(node.get("/status")["problems"]))
        assert node.get("/status")["problems"][0]["subject"] == "Service t/two"
        assert node.connect(VIP, 80) == "first"
        (node.manifests / "one.json").unlink()
        node.until(lambda: node.connect(VIP, 80) == "second")
        node.until(lambda: not node.get("/status")["problems"])
        node.apply("one", *first)
        node.until(lambda: bool(node.get("/status")["problems"]))
        (node.manifests / "two.json").unlink()
        node.until(lambda: node.connect(VIP, 80) == "first")
        node.until(lambda: not node.get("/status")["problems"])
    assert differences(node) == []


# -- files -----------------------------------------------------------------------------------------------------------


def test_ten_thousand_files_and_a_switch_of_the_directory(node: AgentNode) -> None:
    """The directory is a symbolic link that is switched to another version, as Kubernetes and deploy tools do."""
    versions = [node.directory / f"v{n}" for n in (1, 2)]
    for number, version in enumerate(versions, 1):
        version.mkdir()
        for n in range(10_000):
            third, fourth = divmod(n, 250)
            name = f"s{n}"
            documents = [service(name, f"10.98.{third}.{fourth}"), endpoints(name, f"198.51.{number}.{fourth}")]
            text = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
            (version / f"{name}.json").write_text(text)
    node.manifests.rmdir()
    node.manifests.symlink_to(versions[0])
    begin = time.monotonic()
    sizes = {"max_services": 16384, "max_backends": 32768}
    process = node.start(wait="", **sizes)
    node.until(lambda: node.answers("/readyz"), 60)
    print(f"10,000 files in {time.monotonic() - begin:.1f} s")
    assert differences(node) == []
    begin = time.monotonic()
    scratch = node.directory / "scratch"
    scratch.symlink_to(versions[1])
    scratch.rename(node.manifests)
    seen_fewest = 10_000

    def switched() -> bool:
        nonlocal seen_fewest
        seen_fewest = min(seen_fewest, node.get("/status")["counts"]["frontends"])
        return not differences(node)

    node.until(switched, 60)
    print(f"switched in {time.monotonic() - begin:.1f} s")
    assert seen_fewest == 10_000, "no Service was away in between"
    assert node.get("/status")["problems"] == []
    assert process.poll() is None


# -- interfaces ------------------------------------------------------------------------------------------------------


def ip(node: AgentNode, *arguments: str) -> None:
    subprocess.run(["ip", "-n", node.name, *arguments], check=True)


def node_port(node: AgentNode, address: str = NODE4) -> str:
    """What the neighbour gets from the node's port: every packet is translated by the uplink's program."""
    return node.connect(address, 30080, cgroup=False, netns=node.peer, timeout=1)


def serve_node_port(node: AgentNode, pod_address_of: int = 0) -> str:
    pod, address = node.add_pod("p")
    node.serve(Path("/run/netns") / pod, "pod")
    node.apply("web", service("web", VIP, type="NodePort", nodePort=30080), endpoints("web", address))
    node.until(lambda: node.connect(VIP, 80) == "pod")
    return address


def test_uplink_renamed(node: AgentNode) -> None:
    node.start()
    serve_node_port(node)
    node.until(lambda: node_port(node) == "pod")
    for new, old in (("wan0", "up0"), ("wan.7", "wan0"), ("up0", "wan.7")):
        ip(node, "link", "set", old, "name", new)
        node.until(lambda n=new: node.get("/status")["devices"] == [n])
        pins = {pin.name for pin in (node.bpf_root / "links").glob("dev-*")}
        assert pins == {f"dev-{new.replace('.', ':')}-{d}" for d in ("ingress", "egress")}
        assert node.hooks()[f"{new} TCX_INGRESS"] == ["wag_node_ingres"]  # as much of a name as the kernel keeps
        assert node_port(node) == "pod"
    assert "interfaces changed, but" not in node.log.read_text()


@pytest.mark.parametrize("devices", [None, "up0"])
def test_uplink_removed_and_added(node: AgentNode, devices: str | None) -> None:
    node.start(devices=devices)
    serve_node_port(node)
    node.until(lambda: node_port(node) == "pod")
    index = json.loads(subprocess.check_output(["ip", "-n", node.name, "-j", "link", "show", "up0"]))[0]["ifindex"]
    for number in (index + 1000, index + 1000):  # the second time it comes back with the index it had
        ip(node, "link", "del", "up0")
        time.sleep(0.3)
        assert node.connect(VIP, 80, netns=Path("/run/netns") / node.pods[0]) == "pod"
        ip(node, "link", "add", "up0", "index", str(number), "type", "veth", "peer", "up0", "netns", node.peer.name)
        ip(node, "address", "add", f"{NODE4}/24", "dev", "up0")
        ip(node, "link", "set", "up0", "up")
        ip(node, "route", "add", "default", "via", PEER4)
        subprocess.run(["ip", "-n", node.peer.name, "address", "add", f"{PEER4}/24", "dev", "up0"], check=True)
        subprocess.run(["ip", "-n", node.peer.name, "link", "set", "up0", "up"], check=True)
        node.until(lambda: node_port(node) == "pod")
    assert node.answers("/healthz")


def test_uplink_away_and_back_at_once(node: AgentNode) -> None:
    """Moved to another namespace and back between two looks of the agent: same name, same index, no programs."""
    node.start()
    serve_node_port(node)
    node.until(lambda: node_port(node) == "pod")
    subprocess.run(
        ["ip", "-batch", "-"],
        input=f"netns exec {node.name} ip link set up0 netns {node.peer.name} name away\n"
        f"netns exec {node.peer.name} ip link set away netns {node.name} name up0\n",
        text=True,
        check=True,
    )
    ip(node, "address", "add", f"{NODE4}/24", "dev", "up0")
    ip(node, "link", "set", "up0", "up")
    ip(node, "route", "add", "default", "via", PEER4)
    node.until(lambda: node_port(node) == "pod")


def move_address(node: AgentNode, old: str, new: str) -> None:
    """Another address in place of `old`. Secondary addresses and routes go with a first one: they are made again."""
    ip(node, "address", "add", f"{new}/24", "dev", "up0")
    ip(node, "address", "del", f"{old}/24", "dev", "up0")
    ip(node, "address", "replace", f"{new}/24", "dev", "up0")
    ip(node, "route", "replace", "default", "via", PEER4)


def test_address_moved(node: AgentNode) -> None:
    node.start()
    serve_node_port(node)
    node.until(lambda: node_port(node) == "pod")
    moved = "192.0.2.77"
    move_address(node, NODE4, moved)
    node.until(lambda: node.get("/status")["addresses"]["ipv4"] == moved)
    node.until(lambda: node_port(node, moved) == "pod")
    node.until(lambda: not pod_faults(node))
    assert NODE4 not in {row["address"] for row in node.dump("endpoints")}
    assert node.connect(VIP, 80) == "pod"


def test_address_moves_while_pods_come_and_go(node: AgentNode) -> None:
    """With each move the programs are loaded again and put on every pod, among them some that are just leaving."""
    node.start()
    pods = Pods(node, 7)
    pods.start()
    try:
        addresses = [NODE4, *(f"192.0.2.{n}" for n in range(100, 112))]
        for old, new in itertools.pairwise(addresses):
            move_address(node, old, new)
            time.sleep(0.4)
        node.until(lambda: pods.done > 20)
    finally:
        pods.ended.set()
        pods.join()
    node.until(lambda: node.get("/status")["addresses"]["ipv4"] == addresses[-1])
    node.until(lambda: not pod_faults(node))
    assert " WARNING " not in node.log.read_text()


def test_node_with_ipv6_alone(tmp_path: Path) -> None:
    with AgentNode(tmp_path, families=(6,)) as node:
        node.start(pod_cidr="fd00:10:244:1::/64")
        assert node.get("/status")["addresses"] == {"ipv4": "", "ipv6": NODE6}
        pod, address = node.add_pod("p")
        node.serve(Path("/run/netns") / pod, "pod")
        node.serve(node.peer, "peer")
        vips = ("fd00:10:96::10", "fd00:10:96::11")
        node.apply(
            "web",
            service("web", vips[0], type="NodePort", nodePort=30080, ipFamilies=["IPv6"]),
            endpoints("web", address),
            service("far", vips[1], type="NodePort", nodePort=30081, ipFamilies=["IPv6"]),
            endpoints("far", PEER6),
        )
        node.until(lambda: node.connect(vips[0], 80) == "pod")
        assert node.connect(vips[1], 80) == "peer"
        assert node.connect(vips[0], 80, cgroup=False, netns=Path("/run/netns") / pod) == "pod"
        assert node_port(node, NODE6) == "pod"
        assert node.get("/status")["problems"] == []
        node.stop(node.running[0])
        node.start(pod_cidr="fd00:10:244:1::/64")
        assert node.connect(vips[0], 80) == "pod" and node_port(node, NODE6) == "pod"
        node.until(lambda: not pod_faults(node))
