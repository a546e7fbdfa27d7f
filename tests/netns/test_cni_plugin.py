"""The real plugin against the real CNI service, in real namespaces: what a runtime and a pod see."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from pathlib import Path

import pytest
from cni_fixtures import built_plugin, running_node  # noqa: F401  (fixtures)
from cni_node import DUAL, NETNS, Node, echo, pod_view, run, talk, until

from waggle.kernel.netlink import Batch, Netlink
from waggle.kernel.netns import call_in_netns
from waggle.sources.cni_records import host_ifname

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]


# -- what ADD makes


async def test_add_answers_with_interfaces_addresses_and_routes(node: Node) -> None:
    (pod,) = node.make_pods(1)
    answer = await node.add(pod)
    result = answer.document
    host, inside = result["interfaces"]
    link = node.host_links()[host_ifname(pod, "eth0")]
    assert result["cniVersion"] == "1.1.0"
    assert host == {"name": link.name, "mac": link.mac, "mtu": link.mtu}
    pod_link = pod_view(pod, lambda n: n.link_by_name("eth0"))
    assert inside == {"name": "eth0", "mac": pod_link.mac, "sandbox": str(NETNS / pod), "mtu": link.mtu}
    assert result["ips"] == [
        {"interface": 1, "address": "10.244.7.2/32", "gateway": "169.254.1.1"},
        {"interface": 1, "address": "fd00:10:244:7::2/128", "gateway": "fe80::1"},
    ]
    assert result["routes"] == [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}]


async def test_pod_is_configured_as_answered_and_at_once(node: Node) -> None:
    (pod,) = node.make_pods(1)
    await node.add(pod)
    with Netlink(NETNS / pod) as inside:
        link = inside.link_by_name("eth0")
        addresses = {str(a.interface): a.flags for a in inside.addresses(link.index)}
        routes = {(str(r.dst), str(r.via)) for r in inside.routes() if r.via}
        gateways = {str(n.ip): n.mac for n in inside.neighbours(link.index) if n.permanent}
        assert inside.link_by_name("lo").up and link.up
    host = node.host_links()[host_ifname(pod, "eth0")]
    tentative = 0x40
    assert {"10.244.7.2/32", "fd00:10:244:7::2/128"} < addresses.keys()
    assert not [a for a, flags in addresses.items() if flags & tentative], "duplicate address detection delays the pod"
    assert routes == {("0.0.0.0/0", "169.254.1.1"), ("::/0", "fe80::1")}
    assert gateways == {"169.254.1.1": host.mac, "fe80::1": host.mac}
    accept_ra = call_in_netns(NETNS / pod, lambda: Path("/proc/sys/net/ipv6/conf/eth0/accept_ra").read_text())
    assert accept_ra.strip() == "0"
    with Netlink(node.netns) as outside:
        entries = {str(n.ip): n.mac for n in outside.neighbours(host.index) if n.permanent}
    assert entries == {"10.244.7.2": link.mac, "fd00:10:244:7::2": link.mac}
    (call,) = node.datapath_calls()
    assert call["host_ifindex"] == host.index
    assert call["addresses"] == ["10.244.7.2", "fd00:10:244:7::2"]


async def test_pods_and_node_reach_each_other_without_waiting(node: Node) -> None:
    first, second = node.make_pods(2)
    for_first, for_second = (await node.add(first)).addresses, (await node.add(second)).addresses
    for mine, theirs in zip(for_first, for_second, strict=True):
        with echo(NETNS / second, theirs, 4000) as server:
            assert talk(server, NETNS / first, theirs, 4000) == mine
            assert talk(server, NETNS / second, theirs, 4000) == theirs, "a pod reaches itself"
            assert talk(server, node.netns, theirs, 4000) in ("192.0.2.1", "2001:db8::1")
    for local in ("192.0.2.1", "2001:db8::1"):
        with echo(node.netns, local, 4001) as server:
            assert talk(server, NETNS / first, local, 4001) in for_first


@pytest.mark.parametrize("ranges", [DUAL[:1], DUAL[1:]])
async def test_one_family_only(node: Node, ranges: tuple[str, ...]) -> None:
    node.set_ranges(ranges)
    (pod,) = node.make_pods(1)
    answer = await node.add(pod)
    assert len(answer.addresses) == 1
    assert ipaddress.ip_address(answer.addresses[0]) in ipaddress.ip_network(ranges[0])
    assert len(answer.document["routes"]) == 1
    with echo(NETNS / pod, answer.addresses[0], 4000) as server:
        assert talk(server, node.netns, answer.addresses[0], 4000)


async def test_namespace_with_ipv6_switched_off_gets_its_ipv6_address(node: Node) -> None:
    (pod,) = node.make_pods(1)
    run("ip", "netns", "exec", pod, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
    answer = await node.add(pod)
    with echo(NETNS / pod, answer.addresses[1], 4000) as server:
        assert talk(server, node.netns, answer.addresses[1], 4000)


async def test_mtu_holds_for_both_ends(node: Node) -> None:
    await node.stop_agent()
    await node.start_agent(mtu=1280)
    (pod,) = node.make_pods(1)
    answer = await node.add(pod)
    assert [interface["mtu"] for interface in answer.document["interfaces"]] == [1280, 1280]
    assert pod_view(pod, lambda n: n.link_by_name("eth0")).mtu == 1280
    assert node.host_links()[host_ifname(pod, "eth0")].mtu == 1280


@pytest.mark.parametrize(("version", "family"), [("0.3.1", "4"), ("0.4.0", "4"), ("1.0.0", None)])
async def test_result_in_the_version_asked_for(node: Node, version: str, family: str | None) -> None:
    (pod,) = node.make_pods(1)
    result = (await node.add(pod, version=version)).document
    assert result["cniVersion"] == version
    assert result["ips"][0].get("version") == family
    assert "mtu" not in result["interfaces"][0]


async def test_result_of_an_earlier_plugin_is_kept(node: Node) -> None:
    (pod,) = node.make_pods(1)
    earlier = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "other0", "sandbox": "/x"}],
        "ips": [{"interface": 0, "address": "192.168.0.5/24"}],
        "dns": {"nameservers": ["192.168.0.1"]},
    }
    answer = await node.add(pod, prevResult=earlier, runtimeConfig={"portMappings": [], "aliases": {}})
    result = answer.document
    assert [interface["name"] for interface in result["interfaces"]] == ["other0", host_ifname(pod, "eth0"), "eth0"]
    assert [(entry["interface"], entry["address"]) for entry in result["ips"]][:2] == [
        (0, "192.168.0.5/24"),
        (2, "10.244.7.2/32"),
    ]
    assert result["dns"] == {"nameservers": ["192.168.0.1"]}
    check = await node.call("CHECK", pod, prevResult=result)
    assert check.exit_code == 0, check.output


async def test_second_interface_of_a_pod_leaves_its_default_route_alone(node: Node) -> None:
    (pod,) = node.make_pods(1)
    await node.add(pod)
    second = await node.add(pod, ifname="net1")
    assert second.addresses[0] == "10.244.7.3"
    defaults = pod_view(pod, lambda n: [r for r in n.routes() if r.dst.prefixlen == 0])
    eth0 = pod_view(pod, lambda n: n.link_by_name("eth0")).index
    assert [route.ifindex for route in defaults] == [eth0, eth0]
    await node.delete(pod, ifname="net1")
    assert list(node.records()) == [host_ifname(pod, "eth0")]


async def test_pod_name_reaches_the_data_path(node: Node) -> None:
    (pod,) = node.make_pods(1)
    arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=7"
    await node.add(pod, environment={"CNI_ARGS": arguments})
    assert [(call["namespace"], call["name"]) for call in node.datapath_calls()] == [("shop", "web-0")]


# -- ADD that cannot be done


async def test_namespace_that_does_not_exist(node: Node) -> None:
    answer = await node.call("ADD", "gone")
    assert answer.code == 3
    assert "/run/netns/gone" in answer.document["msg"]
    node.assert_nothing_left()


async def test_path_that_is_no_network_namespace(node: Node) -> None:
    for path in ("/etc/hostname", "/proc/self/ns/uts", "/tmp"):
        answer = await node.call("ADD", "someone", environment={"CNI_NETNS": path})
        assert answer.code == 4, answer.output
        assert "CNI_NETNS" in answer.document["msg"]
    node.assert_nothing_left()


async def test_the_nodes_own_namespace_is_refused(node: Node) -> None:
    answer = await node.call("ADD", "host", environment={"CNI_NETNS": str(node.netns)})
    assert answer.code == 4
    assert "own namespace" in answer.document["msg"]
    node.assert_nothing_left()


async def test_interface_name_that_is_taken_in_the_pod(node: Node) -> None:
    (pod,) = node.make_pods(1)
    run("ip", "-n", pod, "link", "add", "eth0", "type", "ifb")
    answer = await node.call("ADD", pod)
    assert answer.code == 102
    assert f"{NETNS / pod} has an interface eth0 already" in answer.document["msg"]
    node.assert_nothing_left()
    assert pod_view(pod, lambda n: n.link_by_name("eth0")).kind == "ifb"


async def test_data_path_that_refuses_a_pod_leaves_nothing(node: Node) -> None:
    (pod,) = node.make_pods(1)
    answer = await node.call("ADD", pod, environment={"CNI_ARGS": "K8S_POD_NAME=refused"})
    assert answer.code == 102
    assert "the data path refuses this pod" in answer.document["msg"]
    node.assert_nothing_left()
    assert [link.name for link in pod_view(pod, lambda n: n.links())] == ["lo"]


async def test_full_range_is_named_and_recovers(node: Node) -> None:
    node.set_ranges(["10.244.9.0/29", DUAL[1]])  # 2 to 6: five pods
    pods = node.make_pods(6)
    assert (await node.call("STATUS")).code == 0
    for pod in pods[:5]:
        await node.add(pod)
    answer = await node.call("ADD", pods[5])
    assert answer.code == 101
    assert "10.244.9.0/29" in answer.document["msg"]
    status = await node.call("STATUS")
    assert status.code == 50
    assert "10.244.9.0/29" in status.document["msg"]
    await node.delete(pods[2])
    assert (await node.add(pods[5])).addresses[0] == "10.244.9.4"


async def test_no_range_known_yet(node: Node) -> None:
    (pod,) = node.make_pods(1)
    node.set_ranges([])
    assert (await node.call("STATUS")).code == 50
    assert (await node.call("ADD", pod)).code == 11
    node.set_ranges(DUAL)
    assert (await node.call("STATUS")).exit_code == 0
    await node.add(pod)


# -- DEL


async def test_delete_is_idempotent(node: Node) -> None:
    (pod,) = node.make_pods(1)
    await node.delete(pod)
    await node.add(pod)
    for _ in range(3):
        await node.delete(pod)
    await node.delete("never-heard-of")
    node.assert_nothing_left()
    assert [call["call"] for call in node.datapath_calls()] == ["attach", "detach"]


async def test_delete_without_namespace(node: Node) -> None:
    gone, unset = node.make_pods(2)
    await node.add(gone)
    await node.add(unset)
    node.remove_namespaces([gone])
    await node.delete(gone)
    await node.delete(unset, environment={"CNI_NETNS": ""})
    node.assert_nothing_left()


async def test_freed_address_comes_last(node: Node) -> None:
    first, second, third = node.make_pods(3)
    freed = (await node.add(first)).addresses
    await node.delete(first)
    assert (await node.add(second)).addresses[0] == "10.244.7.3"
    await node.stop_agent()
    await node.start_agent()
    assert (await node.add(third)).addresses[0] == "10.244.7.4", f"{freed} is not due yet, also after a restart"


# -- CHECK


async def test_check_sees_what_is_missing(node: Node) -> None:
    (pod,) = node.make_pods(1)
    result = (await node.add(pod)).document
    name = host_ifname(pod, "eth0")

    async def broken_by(*command: str) -> str:
        run(*command)
        answer = await node.call("CHECK", pod, prevResult=result)
        assert answer.code == 100, answer.output
        await node.delete(pod)
        again = await node.add(pod)
        result.update(again.document)
        return str(answer.document["details"])

    address = result["ips"][0]["address"]
    assert address.partition("/")[0] in await broken_by("ip", "-n", pod, "address", "del", address, "dev", "eth0")
    assert "default route" in await broken_by("ip", "-n", pod, "-6", "route", "del", "default")
    assert "is down" in await broken_by("ip", "-n", node.prefix, "link", "set", name, "down")
    address = result["ips"][0]["address"]
    assert "no route" in await broken_by("ip", "-n", node.prefix, "route", "del", address)
    assert "does not exist" in await broken_by("ip", "-n", node.prefix, "link", "del", name)
    assert "neighbour" in await broken_by("ip", "-n", pod, "neigh", "flush", "dev", "eth0", "nud", "permanent")
    assert (await node.call("CHECK", pod, prevResult=result)).exit_code == 0


async def test_check_compares_with_prev_result(node: Node) -> None:
    (pod,) = node.make_pods(1)
    result = (await node.add(pod)).document
    assert (await node.call("CHECK", pod)).code == 7
    wrong = {**result, "ips": [{"interface": 1, "address": "10.244.7.99/32"}, result["ips"][1]]}
    answer = await node.call("CHECK", pod, prevResult=wrong)
    assert answer.code == 100
    assert "10.244.7.99" in answer.document["details"] and "10.244.7.2" in answer.document["details"]
    assert (await node.call("CHECK", pod, prevResult={**result, "interfaces": []})).code == 100
    assert (await node.call("CHECK", pod, prevResult={**result, "ips": "many"})).code == 7
    run("ip", "-n", pod, "route", "replace", "default", "via", "169.254.1.1", "dev", "eth0", "onlink", "metric", "7")
    run("ip", "-n", pod, "route", "del", "default", "metric", "0")
    assert (await node.call("CHECK", pod, prevResult={**result, "routes": []})).exit_code == 0
    assert (await node.call("CHECK", "never-heard-of", prevResult=result)).code == 3


# -- GC


async def test_garbage_collection(node: Node) -> None:
    kept, dropped, gone, foreign = node.make_pods(4)
    for pod in (kept, dropped, gone):
        await node.add(pod)
    await node.add(foreign, network="another")
    node.remove_namespaces([gone])
    await until(lambda: len(node.host_links()) == 3)
    with Netlink(node.netns) as netlink:
        batch = Batch()
        batch.create_veth("wag0123456789a", peer_name="x0")  # nobody remembers it
        batch.create_veth("wagon", peer_name="x1")  # not ours
        netlink.run(batch)
    valid = [{"containerID": kept, "ifname": "eth0"}, {"containerID": "unknown", "ifname": "eth0"}]
    answer = await node.call("GC", **{"cni.dev/valid-attachments": valid})
    assert (answer.exit_code, answer.output) == (0, b"")
    stay = {host_ifname(kept, "eth0"), host_ifname(foreign, "eth0")}
    assert node.host_links().keys() == stay | {"wagon"}
    assert node.records().keys() == stay
    detached = {call["container_id"] for call in node.datapath_calls() if call["call"] == "detach"}
    assert detached == {dropped, gone}
    assert (await node.call("GC", **{"cni.dev/valid-attachments": valid})).exit_code == 0


async def test_garbage_collection_needs_a_list(node: Node) -> None:
    (pod,) = node.make_pods(1)
    await node.add(pod)
    assert (await node.call("GC")).code == 7
    assert (await node.call("GC", **{"cni.dev/valid-attachments": ["x"]})).code == 7
    assert len(node.records()) == 1
    assert (await node.call("GC", **{"cni.dev/attachments": []})).exit_code == 0
    node.assert_nothing_left()


# -- many at once


async def test_two_hundred_parallel_pods_leak_nothing(node: Node) -> None:
    pods = node.make_pods(200)
    answers = await asyncio.gather(*(node.add(pod) for pod in pods))
    addresses = [address for answer in answers for address in answer.addresses]
    assert len(set(addresses)) == 400
    assert len(node.host_links()) == 200
    with echo(NETNS / pods[0], answers[0].addresses[1], 4000) as server:
        assert talk(server, NETNS / pods[199], answers[0].addresses[1], 4000) == answers[199].addresses[1]
    await asyncio.gather(*(node.delete(pod) for pod in pods))
    node.assert_nothing_left()
    calls = [call["call"] for call in node.datapath_calls()]
    assert (calls.count("attach"), calls.count("detach")) == (200, 200)


async def test_same_request_many_times_at_once(node: Node) -> None:
    (pod,) = node.make_pods(1)
    answers = await asyncio.gather(*(node.add(pod) for _ in range(8)))
    assert len({answer.output for answer in answers}) == 1
    assert len(node.host_links()) == 1 and len(node.records()) == 1


async def test_request_is_finished_when_its_plugin_is_killed(node: Node) -> None:
    (pod,) = node.make_pods(1)
    process = await asyncio.create_subprocess_exec(
        str(node.plugin),
        env={"CNI_COMMAND": "ADD", "CNI_CONTAINERID": pod, "CNI_IFNAME": "eth0", "CNI_NETNS": str(NETNS / pod)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    conf = {"cniVersion": "1.1.0", "name": "pods", "type": "waggle-cni", "apiSocket": str(node.socket)}
    process.stdin.write(json.dumps(conf).encode())
    process.stdin.close()
    await asyncio.sleep(0.004)
    process.kill()
    await process.wait()
    result = await node.add(pod)
    assert (await node.call("CHECK", pod, prevResult=result.document)).exit_code == 0
    await node.delete(pod)
    node.assert_nothing_left()
