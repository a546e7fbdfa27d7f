"""Containers and pods by Podman with its CNI backend."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from agent_node import NODE4, NODE6, endpoints, service
from podman_node import Podman
from runtime_node import IMAGE, SERVER, RuntimeNode, missing

_MISSING = missing("podman", "conmon", "runc")
pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]

VIP4 = "10.96.7.1"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuntimeNode]:
    with RuntimeNode(tmp_path_factory.mktemp("podman")) as found:
        found.agent = found.start()
        yield found


@pytest.fixture(scope="module")
def podman(node: RuntimeNode) -> Podman:
    found = Podman(node)
    found.import_image()
    return found


def test_container(node: RuntimeNode, podman: Podman) -> None:
    before = node.kept()
    published = ("-p", "8088:8080", "-p", "127.0.0.1:8089:8080")
    podman.run("web", *SERVER, options=("--hostname=web", *published))
    v4, v6 = podman.addresses("web")
    assert v4.startswith("10.244.1.") and v6.startswith("fd00:10:244:1::"), "both families in `podman inspect`"
    node.until(lambda: node.pod_says(v4, 8080) == node.pod_says(v6, 8080) == "web")
    check_published(node)
    assert node.get("/status")["problems"] == [], "that Podman keeps a socket on the ports is no fault"

    node.apply("web", service("web", VIP4), endpoints("web", v4))
    node.until(lambda: node.pod_says(VIP4, 80) == "web")
    flows = node.dump("nat")
    podman.run("client", "/bin/sleep", "1000")
    asked = podman("exec", "client", "/bin/sh", "-c", f"nc -w 5 {VIP4} 80 </dev/null")
    assert asked.stdout == "web\n"
    assert node.dump("nat") == flows, "by the socket: no packet was translated"

    podman("restart", "-t", "0", "web")
    assert len(podman.addresses("web")) == 2
    node.until(lambda: node.pod_says("127.0.0.1", 8089) == "web")
    check_published(node)

    podman("rm", "-f", "-t", "0", "web", "client")
    node.apply("web")
    node.until(lambda: node.kept() == before)
    assert node.pod_says(NODE4, 8088, outside=True) == "ConnectionRefusedError"


def test_port_of_a_container_is_nobody_elses(node: RuntimeNode, podman: Podman) -> None:
    before = node.kept()
    podman.run("first", *SERVER, options=("-p", "8088:8080"))
    second = podman("run", "-d", "-p", "8088:8080", f"--cgroup-parent=/{node.name}/podman", IMAGE, check=False)
    assert second.returncode != 0 and "8088" in second.stderr
    podman("rm", "-f", "-t", "0", "--all")
    node.until(lambda: node.kept() == before)


def test_pod(node: RuntimeNode, podman: Podman) -> None:
    before = node.kept()
    group = f"--cgroup-parent=/{node.name}/podman"
    podman(
        "pod", "create", "--name", "pair", "--hostname", "web", group, "-p", "8088:8080", "-p", "127.0.0.1:8089:8080"
    )
    podman.run("server", *SERVER, options=("--pod=pair",))
    podman.run("beside", "/bin/sleep", "1000", options=("--pod=pair",))
    node.until(lambda: node.pod_says(NODE4, 8088) == "web")
    check_published(node)
    asked = podman("exec", "beside", "/bin/sh", "-c", "nc -w 5 127.0.0.1 8080 </dev/null")
    assert asked.stdout == "web\n", "one network for the whole pod"
    podman("pod", "stop", "-t", "0", "pair")
    assert node.pod_says(NODE4, 8088) == "ConnectionRefusedError"
    podman("pod", "start", "pair")
    node.until(lambda: node.pod_says(NODE4, 8088) == "web")
    podman("pod", "rm", "-f", "-t", "0", "pair")
    node.until(lambda: node.kept() == before)


@pytest.mark.skipif(bool(missing("runsc")), reason=missing("runsc"))
def test_gvisor(node: RuntimeNode, podman: Podman) -> None:
    """A network stack of its own, whose connections no socket hook sees: as client, as backend, behind a host port."""
    before = node.kept()
    podman.run("web", *SERVER, options=("--hostname=web",))
    web4, web6 = podman.addresses("web")
    podman.run("sandbox", *SERVER, options=("--hostname=inside", "--runtime=runsc", "-p", "8088:8080"))
    own4, own6 = podman.addresses("sandbox")
    node.until(lambda: node.pod_says(own4, 8080) == node.pod_says(own6, 8080) == "inside", 20)
    vips = {VIP4: web4, "10.96.7.2": own4, "fd00:10:96::71": web6, "fd00:10:96::72": own6}
    for number, (vip, backend) in enumerate(vips.items()):
        node.apply(f"s{number}", service(f"s{number}", vip), endpoints(f"s{number}", backend))
    node.until(lambda: node.pod_says("fd00:10:96::71", 80) == "web")
    for vip, backend in vips.items():
        asked = podman("exec", "sandbox", "/bin/sh", "-c", f"nc -w 5 {vip} 80 </dev/null")
        assert asked.stdout == ("web\n" if backend in (web4, web6) else "inside\n"), vip
        assert node.pod_says(vip, 80) == asked.stdout.strip(), "the same for a process of the node"
    assert {flow["dst"] for flow in node.dump("nat")} >= set(vips), "packet by packet"
    for address in (NODE4, NODE6):
        assert node.pod_says(address, 8088, outside=True) == "inside"
    podman("rm", "-f", "-t", "0", "--all")
    for number in range(len(vips)):
        node.apply(f"s{number}")
    node.until(lambda: node.kept() == before)


def test_podman_killed_in_the_middle_of_add(node: RuntimeNode, podman: Podman) -> None:
    """Its request is finished all the same. Podman does not know of it any more, and sends no DEL: that is for GC."""
    before = node.kept()
    assert node.agent is not None
    node.agent.send_signal(signal.SIGSTOP)
    try:
        command = podman.command("run", "--name", "lost", f"--cgroup-parent=/{node.name}/podman", IMAGE)
        begun = node.spawn(*command, log="podman.log")
        node.until(lambda: bool(node.plugins()), 20)
        node.stop(begun)
    finally:
        node.agent.send_signal(signal.SIGCONT)
    node.until(lambda: len(node.kept()["pins"]) == 2, 20)
    # what the killed one held is not always free at once
    node.until(lambda: node.run(*podman.command("rm", "-f", "lost"), check=False).returncode == 0, 30)
    node.collect_garbage()
    node.until(lambda: {**node.kept(), "namespaces": 0} == {**before, "namespaces": 0})


def test_agent_restarts(node: RuntimeNode, podman: Podman) -> None:
    before = node.kept()
    podman.run("web", *SERVER, options=("--hostname=web", "-p", "8088:8080", "-p", "127.0.0.1:8089:8080"))
    node.until(lambda: node.pod_says(NODE4, 8088) == "web")
    assert node.agent is not None
    node.stop(node.agent)
    check_published(node)
    node.agent = node.start()
    check_published(node)
    podman("rm", "-f", "-t", "0", "web")
    node.until(lambda: node.kept() == before)


def check_published(node: RuntimeNode) -> None:
    """Port 8088 everywhere, 8089 for processes of the node at 127.0.0.1."""
    for address in (NODE4, NODE6):
        assert node.pod_says(address, 8088, outside=True) == "web"
        assert node.pod_says(address, 8088) == "web"
    assert node.pod_says("127.0.0.1", 8089) == "web"
    assert node.pod_says(NODE4, 8089, outside=True) == "ConnectionRefusedError"
