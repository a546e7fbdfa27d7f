"""What the agent knows to be essential: where its API server is, above all."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from waggle.agent import node_essentials
from waggle.agent.node_essentials import NodeEssentials
from waggle.config import AgentConfig
from waggle.model.objects import EndpointSlice
from waggle.store import Store


def kubeconfig(directory: Path, server: str) -> Path:
    file = directory / "kubeconfig"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    file.write_text(json.dumps(document))
    return file


def of(config: AgentConfig, store: Store | None = None, health: tuple[int, ...] = ()) -> NodeEssentials:
    return NodeEssentials(config, store or Store(), lambda: ["192.0.2.1"], lambda: health)


@pytest.mark.parametrize(
    ("server", "found"),
    [
        ("https://198.51.100.1:6443", ("198.51.100.1", 6443)),
        ("https://198.51.100.1", ("198.51.100.1", 443)),
        ("https://[2001:db8::1]:6443", ("2001:db8::1", 6443)),
        ("https://localhost:6443", ("127.0.0.1", 6443)),
    ],
)
async def test_the_api_server_is_that_of_the_kubeconfig(tmp_path: Path, server: str, found: tuple[str, int]) -> None:
    config = AgentConfig(kubeconfig=kubeconfig(tmp_path, server), metrics_address="")
    essentials = await of(config).find()
    assert found in essentials.apiservers
    assert essentials.own == {"192.0.2.1"} and essentials.vxlan_port == config.vxlan_port


async def test_while_its_name_is_unknown_it_is_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_essentials, "LOOKUP_SECONDS", 0.0)
    file = kubeconfig(tmp_path, "https://localhost:6443")
    made = of(AgentConfig(kubeconfig=file, metrics_address=""))
    before = (await made.find()).apiservers
    kubeconfig(tmp_path, "https://nowhere.invalid:6443")
    assert before and (await made.find()).apiservers == before
    file.unlink()
    assert (await made.find()).apiservers == before
    kubeconfig(tmp_path, "https://198.51.100.9:6443")
    assert (await made.find()).apiservers == {("198.51.100.9", 6443)}


async def test_the_clusters_own_service_leads_there_too() -> None:
    store = Store()
    piece = {
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "kubernetes"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["198.51.100.1"]}, {"addresses": ["198.51.100.2"]}],
    }
    store.upsert(msgspec.convert(piece, EndpointSlice), "kubernetes")
    essentials = await of(AgentConfig(metrics_address=""), store).find()
    assert essentials.apiservers == {("198.51.100.1", 6443), ("198.51.100.2", 6443)}


@pytest.mark.parametrize(
    ("address", "ports"), [("127.0.0.1:9970", {30000}), (":9970", {30000, 9970}), ("192.0.2.1:9970", {30000, 9970})]
)
async def test_health_checks_are_asked_from_outside(address: str, ports: set[int]) -> None:
    essentials = await of(AgentConfig(metrics_address=address), health=(30000,)).find()
    assert essentials.open_ports == ports


async def test_resolvers_are_those_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 192.0.2.53\nnameserver 2001:db8::53\n")
    made = of(AgentConfig(metrics_address=""))
    monkeypatch.setattr(made._forwarder, "_file", file)
    assert (await made.find()).resolvers == {"192.0.2.53", "2001:db8::53"}
