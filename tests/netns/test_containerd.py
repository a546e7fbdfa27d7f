"""Pods by containerd: through its CRI socket, as kubelet makes them, and by `ctr run --cni`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from agent_node import NODE4, NODE6, endpoints, service
from runtime_node import IMAGE, SERVER, RuntimeNode, finished, missing

_MISSING = missing("containerd", "runc")
pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]

VIP4, VIP6 = "10.96.7.1", "fd00:10:96::71"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuntimeNode]:
    with RuntimeNode(tmp_path_factory.mktemp("containerd")) as found:
        found.agent = found.start()
        yield found


@pytest.fixture(scope="module")
def containerd(node: RuntimeNode) -> Iterator[object]:
    from containerd_node import Containerd

    found = Containerd(node)
    try:
        found.start()
        found.import_image()
        yield found
    finally:
        found.close()


def test_pod_of_the_cri(node: RuntimeNode, containerd) -> None:
    before = node.kept()
    ports = [
        {"container_port": 8080, "host_port": 8088},
        {"container_port": 8080, "host_port": 8089, "host_ip": "127.0.0.1"},
    ]
    pod = containerd.run_pod("web", ports=ports)
    v4, v6 = containerd.addresses(pod)
    assert v4.startswith("10.244.1.") and v6.startswith("fd00:10:244:1::"), "kubelet sees both families"
    containerd.run_container(pod, "web", *SERVER)
    node.until(lambda: node.pod_says(v4, 8080) == node.pod_says(v6, 8080) == "web")

    for address in (NODE4, NODE6):
        assert node.pod_says(address, 8088, outside=True) == "web", "host port, from outside"
        assert node.pod_says(address, 8088) == "web", "host port, from the node"
    assert node.pod_says("127.0.0.1", 8089) == "web"
    assert node.pod_says(NODE4, 8089, outside=True) == "ConnectionRefusedError"
    assert node.pod_says(NODE4, 8089) == "ConnectionRefusedError"

    node.apply("web", service("web", VIP4), endpoints("web", v4), service("web6", VIP6), endpoints("web6", v6))
    node.until(lambda: node.pod_says(VIP6, 80) == "web")
    flows = node.dump("nat")
    client = containerd.run_pod("client")
    shell = containerd.run_container(client, "client", "/bin/sleep", "1000")
    for vip in (VIP4, VIP6):
        assert containerd.execute(shell, "/bin/sh", "-c", f"nc -w 5 {vip} 80 </dev/null") == (0, "web\n")
    assert node.dump("nat") == flows, "by the socket: no packet was translated"

    for each in (pod, client):
        containerd.remove_pod(each)
    node.apply("web")
    node.until(lambda: node.kept() == before)


def test_limits_by_annotation(node: RuntimeNode, containerd) -> None:
    """As kubelet passes them on. containerd knows of no burst and asks for all that a number can hold."""
    wanted = {"kubernetes.io/ingress-bandwidth": "20M", "kubernetes.io/egress-bandwidth": "10M"}
    pod = containerd.run_pod("limited", annotations=wanted)
    (name,) = node.records()
    record = json.loads((node.state / "cni" / name).read_text())
    assert record["bandwidth"] == [[2_500_000, 125_000], [1_250_000, 62_500]]
    links = node.run("tc", "qdisc", "show", "dev", name.removesuffix(".json")).stdout
    assert "tbf" in links and "rate 20Mbit" in links, links
    containerd.remove_pod(pod)


def test_ctr_run(node: RuntimeNode, containerd) -> None:
    before = node.kept()
    arguments = ["run", "--cni", "--rm", "--snapshotter", "native", "--cgroup", f"/{node.name}/ctr"]
    said = containerd.ctr(*arguments, IMAGE, "once", "/bin/ip", "-o", "address", "show", "dev", "eth0")
    assert "inet 10.244.1." in said and "inet6 fd00:10:244:1::" in said
    assert node.kept() == before


def test_pods_at_once(node: RuntimeNode, containerd) -> None:
    before = node.kept()
    with ThreadPoolExecutor(8) as pool:
        pods = list(pool.map(containerd.run_pod, (f"p{number}" for number in range(8))))
        addresses = [address for pod in pods for address in containerd.addresses(pod)]
        assert len(set(addresses)) == 16
        list(pool.map(containerd.remove_pod, pods))
    assert node.kept() == before


def test_containerd_killed_in_the_middle_of_add(node: RuntimeNode, containerd) -> None:
    """Its CNI requests are finished all the same, and it knows the pods again when it comes back."""
    before = node.kept()
    kept = containerd.run_pod("kept")
    node.until(lambda: len(node.kept()["pins"]) == len(before["pins"]) + 2)  # it has settled
    known = node.kept()
    begun = start_pod(containerd, "lost")
    node.until(lambda: len(node.records()) > 1, 20)
    containerd.kill()
    begun.join(20)
    containerd.start()
    for pod in containerd.pods():
        if pod != kept:
            containerd.remove_pod(pod)
    node.until(lambda: node.kept() == known)  # the pod that lives is untouched, the other is gone
    containerd.remove_pod(kept)
    assert node.kept() == before


def test_agent_killed_in_the_middle_of_add(node: RuntimeNode, containerd) -> None:
    before = node.kept()
    begun = start_pod(containerd, "unlucky")
    node.until(lambda: bool(node.records()), 20)
    node.stop(node.agent)
    begun.join(60)
    node.agent = node.start()
    for pod in containerd.pods():
        containerd.remove_pod(pod)
    node.until(lambda: {**node.kept(), "namespaces": 0} == {**before, "namespaces": 0})
    pod = containerd.run_pod("next")
    assert len(containerd.addresses(pod)) == 2
    containerd.remove_pod(pod)


def test_200_pods_at_once(node: RuntimeNode) -> None:
    """By the plugin as a runtime executes it, all of them at the same time."""
    before = node.kept()
    names = [f"many-{number}" for number in range(200)]

    def batch(command: str) -> None:
        node.run("ip", "-batch", "-", input="".join(f"netns {command} {name}\n" for name in names))

    batch("add")
    added = [node.plugin("ADD", name) for name in names]
    results = [json.loads(finished(process)) for process in added]
    addresses = [entry["address"] for result in results for entry in result["ips"]]
    assert len(set(addresses)) == 400
    assert len(node.kept()["records"]) == len(before["records"]) + 200
    deleted = [node.plugin("DEL", name) for name in names]
    for process in deleted:
        assert finished(process) == ""
    batch("delete")
    assert node.kept() == before


def start_pod(containerd, name: str) -> threading.Thread:
    """A pod whose making will not end well."""

    def run() -> None:
        import grpc

        with pytest.raises(grpc.RpcError):
            for number in range(100):
                containerd.run_pod(f"{name}-{number}")

    thread = threading.Thread(target=run)
    thread.start()
    return thread
