"""One real agent on a node of its own: who may run, what is repaired, what is said, what `cleanup` leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_node import BPFFS, NODE4, PEER4, WAGGLE, AgentNode, endpoints, service

from waggle.abi._generated import Service as ServiceValue
from waggle.abi._generated import ServiceKey
from waggle.abi.address import pack_address
from waggle.errors import NotFound
from waggle.kernel.maps import HASH, Map
from waggle.kernel.netns import call_in_netns
from waggle.observe.dump import dump_map

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

VIP = "10.96.0.10"
NO_BACKEND_VIP = "10.96.0.11"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentNode]:
    """A node on which nothing of waggle ever ran."""
    with AgentNode(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    """A node whose agent runs, with one Service that answers and one without endpoints. Tests leave it so."""
    with AgentNode(tmp_path_factory.mktemp("busy")) as made:
        serve_one(made)
        made.start(metrics_address="127.0.0.1:9970")
        yield made


def serve_one(node: AgentNode) -> None:
    node.serve(node.peer, "peer")
    node.apply("web", service("web", VIP), endpoints("web", PEER4))
    node.apply("empty", service("empty", NO_BACKEND_VIP))


def works(node: AgentNode) -> bool:
    return node.connect(VIP, 80) == "peer" and node.connect(PEER4, 8080) == "peer"


def frontends(node: AgentNode) -> set[str]:
    return {row["addr"] for row in node.dump("services")}


# -- who may run -----------------------------------------------------------------------------------------------------


def test_second_agent_with_the_same_bpf_root_is_refused(busy: AgentNode) -> None:
    before = busy.facts()
    said = busy.refused(state_dir=busy.directory / "other", api_socket=busy.directory / "other.sock")
    assert "another waggle agent runs" in said and str(busy.bpf_root) in said
    assert busy.facts() == before
    assert works(busy)


def test_second_agent_on_the_same_cgroup_is_refused_and_leaves_nothing(busy: AgentNode) -> None:
    other = BPFFS / f"{busy.name}-other"
    before = busy.facts()
    said = busy.refused(
        bpf_root=other, state_dir=busy.directory / "other", api_socket=busy.directory / "other" / "agent.sock"
    )
    assert str(busy.cgroup) in said and "waggle cleanup" in said
    assert not other.exists()
    assert busy.facts() == before
    assert works(busy)


def cleanup(node: AgentNode, *more: str, **changes: Path) -> subprocess.CompletedProcess[str]:
    paths = {"bpf_root": node.bpf_root, "state_dir": node.state, "api_socket": node.socket} | changes
    flags = [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", str(path))]
    return node.waggle("cleanup", *flags, *more, cgroup=False)


def test_cleanup_refuses_while_an_agent_runs(busy: AgentNode) -> None:
    before = busy.facts()
    for changes in ({}, {"bpf_root": BPFFS / "nothing-is-here"}):  # also when told of another bpf-root
        done = cleanup(busy, **changes)
        assert done.returncode == 1 and done.stdout == "", done
        assert len(done.stderr.splitlines()) == 1 and "agent" in done.stderr and "stop it first" in done.stderr
        assert busy.facts() == before
    assert works(busy)


# -- what it says ----------------------------------------------------------------------------------------------------


def fetch(node: AgentNode, target: str) -> tuple[int, str]:
    def get() -> tuple[int, str]:
        with urllib.request.urlopen(f"http://127.0.0.1:9970{target}", timeout=5) as answer:
            return answer.status, answer.read().decode()

    return call_in_netns(node.netns, get)


def test_metrics_and_health(busy: AgentNode) -> None:
    assert works(busy)
    status, text = fetch(busy, "/metrics")
    assert status == 200
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert values["waggle_services"] == 2 and values["waggle_synced"] == 1 and values["waggle_frontends"] == 2
    assert values["waggle_socket_lb_total"] >= 1
    for path in ("/healthz", "/livez"):
        status, text = fetch(busy, path)
        answer = json.loads(text)
        assert (status, answer["healthy"], answer["synced"], answer["error"]) == (200, True, True, "")
    assert json.loads(fetch(busy, "/readyz")[1]) == {"ready": True}
    with pytest.raises(urllib.error.HTTPError):  # the rest is for root alone
        fetch(busy, "/status")


def test_socket_is_for_root_alone(busy: AgentNode) -> None:
    mode = busy.socket.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_flows_shows_a_translation_and_a_drop(busy: AgentNode) -> None:
    command = ["flows", "--follow", "-o", "json", "--limit", "2", "--api-socket", str(busy.socket)]
    with subprocess.Popen(busy.inside([*WAGGLE, *command]), stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        found: dict[str, dict[str, Any]] = {}
        try:
            for _ in range(10):  # the reader is only told what comes after it has connected
                works(busy)
                assert busy.connect(NO_BACKEND_VIP, 80) == "ConnectionRefusedError"
                if reader.poll() is not None:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    reader.wait(1)
            events = [json.loads(line) for line in reader.stdout]
            found = {event["kind"]: event for event in events}
        finally:
            reader.kill()
    drop = found["drop"]
    assert (
        drop["reason"] == "no_backend"
        and drop["verdict"] == "rejected"
        and drop["service"] == "t/empty"
        and drop["protocol"] == "TCP"
    )
    assert drop["destination"]["text"] == f"{NO_BACKEND_VIP}:80" and drop["explanation"]
    flow = found["flow"]
    assert flow["service"] == "t/web" and flow["backend"]["text"] == f"{PEER4}:8080" and flow["count"] >= 1


def test_every_map_can_be_dumped(busy: AgentNode) -> None:
    assert works(busy)
    done = busy.waggle("map", "list", "--bpf-root", str(busy.bpf_root), "-o", "json", cgroup=False)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"wag_services", "wag_backends", "wag_nat", "wag_endpoints", "wag_drops", "wag_flows"} <= set(rows)
    assert rows["wag_services"]["maxEntries"] == 1024 and all(
        # a trie has no memory of its own before it has an entry
        row["memoryBytes"] > 0 or row["type"] == "lpm_trie"
        for row in rows.values()
    )
    for name, row in rows.items():
        if row["type"] in ("sk_storage", "ringbuf"):
            with pytest.raises(NotFound, match="no entries that can be listed"):
                dump_map(busy.bpf_root, name)
        else:
            json.dumps(dump_map(busy.bpf_root, name))
    done = busy.waggle("map", "dump", "events_rb", "--bpf-root", str(busy.bpf_root), cgroup=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done
    assert {row["addr"] for row in busy.dump("wag_services")} == {VIP, NO_BACKEND_VIP}
    assert [(row["addr"], int(row["port"])) for row in busy.dump("wag_backends")] == [(PEER4, 8080)]
    assert {NODE4} <= {row["address"] for row in busy.dump("wag_endpoints")}


# -- ending and cleaning ---------------------------------------------------------------------------------------------


def test_sigterm_leaves_the_data_path_and_cleanup_leaves_nothing(node: AgentNode) -> None:
    before, sysctls = node.facts(), node.sysctls()
    agent = node.start()
    serve_one(node)
    pod, address = node.add_pod("p")
    node.serve(Path("/run/netns") / pod, "pod")
    node.apply("web", service("web", VIP), endpoints("web", address))
    node.apply("there", *other_node("198.51.100.0/24"))
    node.until(lambda: node.connect(VIP, 80) == "pod")
    assert node.stop(agent, signal.SIGTERM) == 0
    assert node.connect(VIP, 80) == "pod"
    agent = node.start()
    node.until(lambda: "198.51.100.0/24" in node.facts()["route"])
    node.stop(agent)  # SIGKILL
    assert node.connect(VIP, 80) == "pod"

    facts = node.facts()
    assert facts["hooks"] != before["hooks"] and facts["route"] != before["route"]
    dry = json.loads(cleanup(node, "--dry-run", "-o", "json").stdout)
    assert dry["dryRun"] is True
    text = cleanup(node, "--dry-run").stdout
    assert node.facts() == facts
    done = json.loads(cleanup(node, "-o", "json").stdout)
    assert done == {"dryRun": False, "removed": dry["removed"]}
    assert text.splitlines() == [f"would remove {r['kind']} {r['name']}" for r in dry["removed"]]
    kinds = {"link", "map", "interface", "route", "setting", "state", "socket", "directory"}
    assert {r["kind"] for r in dry["removed"]} == kinds

    after = node.facts()
    gone = {str(node.manifests / f"{n}.json") for n in ("web", "empty", "there")} | {str(node.socket.parent)}
    assert set(after["files"]) - set(before["files"]) == gone  # what the test made, and the socket's directory
    assert {k: v for k, v in after.items() if k != "files"} == {k: v for k, v in before.items() if k != "files"}
    assert node.sysctls() == sysctls and "0" in sysctls.values()
    again = cleanup(node)
    assert (again.returncode, again.stdout) == (0, "nothing of waggle is on this node\n")
    assert json.loads(cleanup(node, "-o", "json").stdout)["removed"] == []


def test_cleanup_where_the_state_directory_is_a_volume(node: AgentNode) -> None:
    """As in a pod: its contents can be removed, the directory cannot."""
    node.state.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "wagstate", str(node.state)], check=True)
    try:
        (node.state / "cni").mkdir()
        (node.state / "cni" / "rotation.json").write_text("{}")
        done = cleanup(node, "-o", "json")
        assert done.returncode == 0, done.stderr
        assert {"kind": "state", "name": str(node.state)} in json.loads(done.stdout)["removed"]
        assert list(node.state.iterdir()) == []
        assert "nothing" in cleanup(node).stdout
    finally:
        subprocess.run(["umount", str(node.state)], check=True)


def other_node(cidr: str) -> list[dict[str, Any]]:
    return [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": "there"},
            "spec": {"podCIDRs": [cidr]},
            "status": {"addresses": [{"type": "InternalIP", "address": PEER4}]},
        }
    ]


def test_cleanup_after_a_crash_in_the_middle(node: AgentNode) -> None:
    before = node.facts()
    node.stop(node.start())
    links, maps = node.bpf_root / "links", node.bpf_root / "maps"
    for pin in list(links.iterdir())[::2]:
        pin.unlink()
    (maps / "wag_nat").unlink()
    (maps / "wag_nat").mkdir()
    (maps / "wag_nat" / "deeper").mkdir()
    (links / "cgroup-garbage").mkdir()
    (links / "dangling").symlink_to(links / "nowhere")
    Map.create(HASH, 4, 4, 4, "stranger").pin(links / "dev-stranger-ingress")
    dry = json.loads(cleanup(node, "--dry-run", "-o", "json").stdout)["removed"]
    done = cleanup(node, "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] == dry
    after = node.facts()
    assert {k: after[k] for k in ("hooks", "pins", "link")} == {k: before[k] for k in ("hooks", "pins", "link")}
    assert "nothing" in cleanup(node).stdout


def test_cleanup_leaves_what_others_put_into_the_bpf_root(node: AgentNode) -> None:
    node.stop(node.start())
    (node.bpf_root / "mine").mkdir()
    assert cleanup(node).returncode == 0
    assert node.facts()["pins"] == [str(node.bpf_root / "mine")]
    assert "nothing" in cleanup(node).stdout


# -- starting on what is there ---------------------------------------------------------------------------------------


def test_garbage_where_the_pins_should_be_is_repaired(node: AgentNode) -> None:
    serve_one(node)
    node.stop(node.start())
    maps, links = node.bpf_root / "maps", node.bpf_root / "links"
    (maps / "wag_services").unlink()
    Map.create(HASH, 8, 8, 64, "wag_services").pin(maps / "wag_services")  # of another layout
    (maps / "wag_flows").unlink()
    (maps / "wag_flows").mkdir()
    (maps / "wag_drops").unlink()
    (maps / "wag_drops").symlink_to(maps / "nowhere")
    for hook, make in (("connect4", Path.mkdir), ("connect6", lambda p: p.symlink_to(links / "nowhere"))):
        pin = links / f"cgroup-wag_{hook}"
        pin.unlink()
        make(pin)
    node.until(lambda: not node.hooks().get("CGROUP_INET4_CONNECT"))
    agent = node.start()
    assert works(node)
    assert frontends(node) == {VIP, NO_BACKEND_VIP}
    node.dump("flows")
    assert node.hooks()["CGROUP_INET4_CONNECT"] == ["wag_connect4"]
    node.stop(agent)


@pytest.mark.parametrize("killed", [False, True])
def test_what_works_goes_on_while_tables_of_a_new_layout_are_filled(node: AgentNode, killed: bool) -> None:
    """As after an upgrade: the pinned frontend table is one that the programs at work do not know."""
    serve_one(node)
    node.stop(node.start())
    pin = node.bpf_root / "maps" / "wag_services"
    pin.unlink()
    Map.create(HASH, 8, 8, 64, "wag_services").pin(pin)
    writing = node.manifests / "slow.json"
    with writing.open("w"):  # a manifest being written holds up the first full view
        agent = node.start(wait="/healthz")
        assert not node.get("/status")["synced"]
        if killed:  # the next one finds the new table pinned, empty, and must not think it right
            node.stop(agent)
            agent = node.start(wait="/healthz")
        worked = 0
        while worked < 10:  # or until the agent waits no longer for the file
            empty = frontends(node) == set()
            assert works(node)
            if node.get("/status")["synced"]:
                break
            assert empty
            worked += 1
            time.sleep(0.05)
        assert worked
    node.until(lambda: node.get("/status")["synced"])
    assert works(node)
    assert frontends(node) == {VIP, NO_BACKEND_VIP}
    with contextlib.closing(Map.pinned(pin)) as table:
        table.delete_many(list(table.keys()))
    assert works(node) is False  # and it is the table that counts
    node.stop(agent)


def test_a_directory_with_something_in_it_instead_of_a_pin_is_named(node: AgentNode) -> None:
    (node.bpf_root / "maps" / "wag_nat" / "what").mkdir(parents=True)
    said = node.refused()
    assert str(node.bpf_root / "maps" / "wag_nat") in said


def test_frontends_written_by_hand_are_repaired(node: AgentNode) -> None:
    serve_one(node)
    node.stop(node.start())
    table = Map.pinned(node.bpf_root / "maps" / "wag_services")
    stranger = ServiceKey(pack_address("10.9.9.9"), 99, 6, 0).pack()
    table.update(ServiceKey(pack_address(VIP), 80, 6, 0).pack(), ServiceValue(1020, 500, 7, 0, 0, 0, 0, 0, 0).pack())
    table.update(stranger, ServiceValue(0xFFFFFFF0, 0xFFFFFFFF, 8, 0, 0, 0, 0, 0, 0).pack())
    assert not works(node)
    agent = node.start()
    assert works(node)
    assert frontends(node) == {VIP, NO_BACKEND_VIP} and table.lookup(stranger) is None
    assert node.get("/status")["problems"] == []
    node.stop(agent)


def test_tables_change_their_size(node: AgentNode) -> None:
    many = {f"10.96.1.{n}": f"198.51.100.{n}" for n in range(1, 11)}
    for address, backend in many.items():
        name = "s" + address.replace(".", "-")
        node.apply(name, service(name, address), endpoints(name, backend))
    serve_one(node)
    node.stop(node.start(max_services=64, max_backends=64, max_nat=64))
    flows = nat_entry(node)
    served = set(many) | {VIP, NO_BACKEND_VIP}
    for sizes in (
        {"max_services": 4096, "max_backends": 512, "max_nat": 256},
        {"max_services": 16, "max_backends": 16, "max_nat": 64},
    ):
        (node.manifests / "web.json").rename(node.directory / "aside")  # nobody can plan it anew: it must be moved
        before = node.dump("services")
        process = node.start(wait="", manifests=node.directory / "not-yet", **sizes)
        node.until(lambda: node.answers("/healthz"))
        assert works(node), "moved, not planned: no source has given its view"
        assert sorted(map(str, node.dump("services"))) == sorted(map(str, before))
        assert nat_entry(node) == flows
        node.stop(process)
        (node.directory / "aside").rename(node.manifests / "web.json")
        agent = node.start(**sizes)
        listed = node.waggle("map", "list", "--bpf-root", str(node.bpf_root), "-o", "json", cgroup=False).stdout
        found = {row["name"]: row["maxEntries"] for row in json.loads(listed)}
        assert {n: found[f"wag_{n.removeprefix('max_')}"] for n in sizes} == sizes
        assert frontends(node) == served and works(node)
        assert node.get("/status")["problems"] == []
        node.stop(agent)


def nat_entry(node: AgentNode) -> bytes | None:
    """An entry of the NAT table as it was or, the first time, as it is written now."""
    table = Map.pinned(node.bpf_root / "maps" / "wag_nat")
    key = b"\x5a" * table.key_size
    if not table.dump():
        table.update(key, b"\xa5" * table.value_size)
    return table.lookup(key)


def test_full_tables_name_the_object_and_the_setting_and_heal(node: AgentNode) -> None:
    serve_one(node)
    agent = node.start(max_services=16, max_backends=16)
    node.apply("big", service("big", "10.96.2.1"), endpoints("big", *(f"198.51.100.{n}" for n in range(1, 17))))
    node.until(lambda: bool(node.get("/status")["problems"]))
    problems = node.get("/status")["problems"]
    assert len(problems) == 1, problems
    (problem,) = problems
    assert problem["subject"] == "Service t/big" and "max-backends" in problem["reason"]
    assert node.waggle("status", "--api-socket", str(node.socket)).returncode == 3
    assert works(node)
    (node.manifests / "big.json").unlink()
    node.until(lambda: not node.get("/status")["problems"])

    node.apply("many", *(service(f"m{n}", f"10.96.3.{n}") for n in range(1, 17)))
    node.until(lambda: len(node.get("/status")["problems"]) == 2)
    for problem in node.get("/status")["problems"]:
        assert problem["subject"].startswith("Service t/m") and "max-services" in problem["reason"]
    assert works(node) and len(frontends(node)) == 16
    node.apply("many", *(service(f"m{n}", f"10.96.3.{n}") for n in range(1, 15)))
    node.until(lambda: not node.get("/status")["problems"])
    assert frontends(node) == {VIP, NO_BACKEND_VIP, *(f"10.96.3.{n}" for n in range(1, 15))}
    assert works(node)
    node.stop(agent)


# -- what is missing or wrong ----------------------------------------------------------------------------------------


def test_metrics_port_taken(node: AgentNode) -> None:
    serve_one(node)
    node.stop(node.start())
    before = node.facts()
    programs = program_ids(node)
    with call_in_netns(node.netns, lambda: socket.create_server(("127.0.0.1", 9971))):
        said = node.refused(metrics_address="127.0.0.1:9971")
    assert "metrics-address" in said and "127.0.0.1:9971" in said and "in use" in said
    after = node.facts()
    assert after == before and program_ids(node) == programs
    assert works(node)


def program_ids(node: AgentNode) -> list[int]:
    from waggle.kernel import syscall

    ids = []
    for pin in sorted((node.bpf_root / "links").iterdir()):
        with syscall.obj_get(pin) as link:
            ids.append(syscall.link_prog_id(link.number))
    return ids


def test_paths_that_cannot_be(node: AgentNode, tmp_path: Path) -> None:
    before = node.facts()
    elsewhere = tmp_path / "no-bpffs"
    for changes, words in (
        ({"bpf_root": elsewhere}, ("bpf-root", str(elsewhere), "bpffs")),
        ({"cgroup_root": "/sys/fs/cgroup/not/there"}, ("cgroup-root", "/sys/fs/cgroup/not/there", "No such file")),
        ({"cgroup_root": "/proc"}, ("cgroup-root", "/proc", "cgroup2")),
        ({"config": tmp_path}, ("config", str(tmp_path), "directory")),
        ({"config": tmp_path / "none.yaml"}, ("config", "none.yaml", "No such file")),
    ):
        said = node.refused(**changes)
        assert all(word in said for word in words), said
        assert node.facts() == before, said
    said = node.refused(state_dir="/proc/nothing")
    assert "state-dir" in said and "/proc/nothing" in said
    node.directory.joinpath("file").touch()
    for path in (node.directory / "file" / "agent.sock", node.manifests, Path("/proc/agent.sock")):
        assert "api-socket" in node.refused(api_socket=path)


def test_disk_full_for_the_state(node: AgentNode) -> None:
    node.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(node.state)], check=True)
    try:
        serve_one(node)
        agent = node.start()
        with contextlib.suppress(OSError):
            (node.state / "ballast").write_bytes(bytes(1 << 20))
        name = f"{node.name}-full"
        subprocess.run(["ip", "netns", "add", name], check=True)
        node.pods.append(name)
        done = node.cni("ADD", name)
        assert done.returncode == 1
        assert json.loads(done.stdout)["code"] == 5 and "No space left" in json.loads(done.stdout)["msg"]
        assert works(node) and node.answers("/healthz")
        (node.state / "ballast").unlink()
        assert node.cni("ADD", name).returncode == 0
        (node.state / "ballast").touch()
        with contextlib.suppress(OSError):
            (node.state / "ballast").write_bytes(bytes(1 << 20))
        node.stop(agent)
        agent = node.start()  # and it starts on a full disk
        assert [pod["containerID"] for pod in node.get("/endpoints")] == [name]
        assert node.cni("DEL", name).returncode == 0
        node.stop(agent)
    finally:
        subprocess.run(["umount", "-l", str(node.state)], check=True)


def test_few_file_descriptors(node: AgentNode) -> None:
    serve_one(node)
    agent = node.start(before=["prlimit", "--nofile=192:192"])
    assert works(node)
    connections = [socket.socket(socket.AF_UNIX) for _ in range(192)]
    try:
        for connection in connections:
            connection.settimeout(1)
            with contextlib.suppress(OSError):
                connection.connect(str(node.socket))
        node.apply("more", service("more", "10.96.0.77"), endpoints("more", PEER4))
        node.until(lambda: "cannot look for labs" in node.log.read_text())  # it has come across the limit
        assert works(node)
    finally:
        for connection in connections:
            connection.close()
    node.until(lambda: node.connect("10.96.0.77", 80) == "peer")
    node.add_pod("p")
    assert agent.poll() is None
    node.stop(agent)
    for limit in (14, 24, 40):  # too few to open, to take over maps, to load
        command = node.inside(["prlimit", f"--nofile={limit}:{limit}", *WAGGLE, "agent"])
        said = subprocess.run(
            [*command, *node.settings(log_level="error")], capture_output=True, text=True, timeout=60, check=False
        )
        assert said.returncode == 1 and "Traceback" not in said.stderr, said.stderr
        assert said.stderr.startswith("waggle: ") and "Too many open files" in said.stderr.splitlines()[0]
        assert works(node)
