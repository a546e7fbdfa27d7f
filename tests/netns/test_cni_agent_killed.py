"""CNI requests while the agent is away, killed in the middle of one, or started again on what it left."""

from __future__ import annotations

import json
import os

import pytest
from cni_fixtures import built_plugin, running_node  # noqa: F401  (fixtures)
from cni_node import NETNS, Node, echo, talk, until

from waggle.sources.cni_records import host_ifname

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]


async def test_agent_away(node: Node) -> None:
    (pod,) = node.make_pods(1)
    result = (await node.add(pod)).document
    await node.stop_agent()
    for command in ("ADD", "DEL", "CHECK", "GC"):
        assert (await node.call(command, pod, prevResult=result)).code == 11
    assert (await node.call("STATUS")).code == 50
    version = await node.call("VERSION")
    assert version.document["supportedVersions"][-2:] == ["1.0.0", "1.1.0"]
    assert (await node.call("ADD", pod, apiSocket=str(node.directory / "nobody.sock"))).code == 11


@pytest.mark.parametrize("moment", ["reserved", "recorded", "pair", "attach"])
async def test_agent_killed_in_the_middle_of_add(node: Node, moment: str) -> None:
    before, hurt, after = node.make_pods(3)
    taken = (await node.add(before)).addresses
    await node.stop_agent()
    await node.start_agent(die_at=moment)
    assert (await node.call("ADD", hurt)).code == 11, "the plugin must say that the answer never came"
    await node.stop_agent()
    left = node.records().get(host_ifname(hurt, "eth0"))
    assert (left is None) == (moment == "reserved")
    await node.start_agent()
    others = (await node.add(after)).addresses
    again = await node.add(hurt)
    assert not set(taken) & set(others) and not set(again.addresses) & (set(taken) | set(others))
    if left is not None:
        assert again.addresses == list(left["addresses"]), "the retry gets what the first attempt had reserved"
    assert (await node.call("CHECK", hurt, prevResult=again.document)).exit_code == 0
    with echo(NETNS / hurt, again.addresses[0], 4000) as server:
        assert talk(server, NETNS / after, again.addresses[0], 4000) == others[0]
    for pod in (before, hurt, after):
        await node.delete(pod)
    node.assert_nothing_left()


@pytest.mark.parametrize("moment", ["recorded", "pair", "attach"])
async def test_delete_after_a_killed_add(node: Node, moment: str) -> None:
    (pod,) = node.make_pods(1)
    await node.stop_agent()
    await node.start_agent(die_at=moment)
    assert (await node.call("ADD", pod)).code == 11
    await node.stop_agent()
    await node.start_agent()
    await node.delete(pod)
    node.assert_nothing_left()


@pytest.mark.parametrize("moment", ["detach", "removed"])
async def test_agent_killed_in_the_middle_of_delete(node: Node, moment: str) -> None:
    pod, other = node.make_pods(2)
    addresses = (await node.add(pod)).addresses
    await node.stop_agent()
    await node.start_agent(die_at=moment)
    assert (await node.call("DEL", pod)).code == 11
    await node.stop_agent()
    await node.start_agent()
    assert (await node.add(other)).addresses != addresses, "not free before DEL has succeeded"
    await node.delete(pod)
    await node.delete(other)
    node.assert_nothing_left()


async def test_restart_keeps_pods_and_addresses(node: Node) -> None:
    first, second = node.make_pods(2)
    result = await node.add(first)
    index = node.host_links()[host_ifname(first, "eth0")].index
    await node.stop_agent()
    await node.start_agent()
    known = await node.pods()
    assert known == {"pods": [{"container_id": first, "host_ifindex": index}], "problems": []}
    assert (await node.call("CHECK", first, prevResult=result.document)).exit_code == 0
    again = await node.add(first)
    assert again.document == result.document, "ADD again changes nothing that is right"
    assert node.host_links()[host_ifname(first, "eth0")].index == index
    assert (await node.add(second)).addresses[0] == "10.244.7.3"


async def test_interface_that_vanished_keeps_its_address_until_delete(node: Node) -> None:
    pod, other = node.make_pods(2)
    addresses = (await node.add(pod)).addresses
    await node.stop_agent()
    node.remove_namespaces([pod])
    await until(lambda: not node.host_links())
    await node.start_agent()
    known = await node.pods()
    assert known["pods"] == []
    assert len(known["problems"]) == 1 and pod in known["problems"][0]
    assert (await node.add(other)).addresses != addresses
    await node.delete(pod)
    assert (await node.pods())["problems"] == []
    await node.delete(other)
    node.assert_nothing_left()


async def test_lost_state_directory_does_not_lead_to_duplicate_addresses(node: Node) -> None:
    pod, other = node.make_pods(2)
    addresses = (await node.add(pod)).addresses
    await node.stop_agent()
    name = host_ifname(pod, "eth0")
    (node.directory / "state" / "cni" / f"{name}.json").unlink()
    await node.start_agent()
    assert not set(addresses) & set((await node.add(other)).addresses)
    check = await node.call("CHECK", pod, prevResult={"interfaces": []})
    assert check.code == 100 and name in check.document["msg"]
    assert name in (await node.pods())["problems"][0]
    valid = [{"containerID": pod, "ifname": "eth0"}, {"containerID": other, "ifname": "eth0"}]
    assert (await node.call("GC", **{"cni.dev/valid-attachments": valid})).exit_code == 0
    assert name in node.host_links(), "a live pod without a record is not garbage"
    await node.delete(pod)
    await node.delete(other)
    node.assert_nothing_left()


async def test_record_cut_short(node: Node) -> None:
    pod, other, third = node.make_pods(3)
    addresses = (await node.add(pod)).addresses
    await node.add(other)
    await node.stop_agent()
    for name in (pod, other):
        (node.directory / "state" / "cni" / f"{host_ifname(name, 'eth0')}.json").write_bytes(b'{"container_id": "')
    node.remove_namespaces([other])
    await until(lambda: len(node.host_links()) == 1)
    await node.start_agent()
    assert list((node.directory / "state" / "cni").glob("wag*")) == [
        node.directory / "state" / "cni" / f"{host_ifname(pod, 'eth0')}.json"
    ], "unreadable and without interface: it can be removed"
    assert not set(addresses) & set((await node.add(third)).addresses)
    await node.delete(pod)
    await node.delete(third)
    node.assert_nothing_left()


async def test_record_of_an_earlier_boot_frees_its_address(node: Node) -> None:
    (pod,) = node.make_pods(1)
    await node.add(pod)
    await node.stop_agent()
    node.remove_namespaces([pod])
    await until(lambda: not node.host_links())
    file = node.directory / "state" / "cni" / f"{host_ifname(pod, 'eth0')}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "boot": "another"}))
    await node.start_agent()
    assert node.records() == {}
    await node.delete(pod)  # the runtime cleans up after the reboot
