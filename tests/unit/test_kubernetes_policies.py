"""Policies from the API and who they are about: followed when there are any, in as little memory as they need."""

from __future__ import annotations

import asyncio
import json
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from kubernetes_bench import QUICK, Bench, running, running_api, written_kubeconfig  # noqa: F401  (fixtures)
from standin_apiserver import (
    CLUSTER_NETWORK_POLICIES,
    NAMESPACES,
    NETWORK_POLICIES,
    NODE_POLICIES,
    PODS,
    StandInApi,
    answers,
    cluster_network_policy,
    namespace,
    network_policy,
    node,
    node_policy,
    pod,
    service,
    status,
    until,
)

from waggle.model.host_port import host_ports
from waggle.model.meta import ObjectMeta
from waggle.model.objects import ContainerPort, NetworkPolicy, ObjectKey, Pod
from waggle.model.policy_objects import IPBlock
from waggle.sources.wire import Wire
from waggle.store import Store
from waggle.store.store import API

SOON = replace(QUICK, unwanted=0.05, absent=0.02)


def known(bench: Bench) -> bool:
    return bench.source.policies_synced.is_set()


# -- only where there are policies ------------------------------------------------------------------------------------


async def test_without_policies_nobody_asks_for_pods(api: StandInApi, kubeconfig: Path) -> None:
    api.put(PODS, pod("web-1", "10.1.0.1"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        await until(lambda: known(bench))
        assert not api.queries(PODS) and not api.queries(NAMESPACES)
        assert not bench.store.pods


@pytest.mark.parametrize(
    ("path", "policy"),
    [
        (NETWORK_POLICIES, network_policy("deny")),
        (CLUSTER_NETWORK_POLICIES, cluster_network_policy("deny")),
        (NODE_POLICIES, node_policy("deny")),
    ],
    ids=["NetworkPolicy", "ClusterNetworkPolicy", "NodePolicy"],
)
async def test_the_first_policy_brings_pods_and_namespaces(
    api: StandInApi, kubeconfig: Path, path: str, policy: dict
) -> None:
    api.put(PODS, pod("web-1", "10.1.0.1"))
    api.put(NAMESPACES, namespace("default", tier="front"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        await until(lambda: known(bench))
        seen: list[tuple[bool, bool, int, int]] = []

        def look() -> None:
            store = bench.store
            seen.append((known(bench), store.has_policies, len(store.pods), len(store.namespaces)))

        bench.store.on_change = look
        api.put(path, policy)
        await until(lambda: known(bench) and bench.store.has_policies)
        api.put(PODS, pod("web-2", "10.1.0.2"))
        await until(lambda: len(bench.store.pods) == 2)
        # whoever plans for a change sees that all is known only where it is
        assert seen[0] == (False, True, 0, 0)
        assert all(pods and namespaces for all_known, _, pods, namespaces in seen if all_known)
        assert (True, True, 1, 1) in seen, "nobody is told when the rest has come"
        [field] = {query["fieldSelector"] for query in api.queries(PODS)}
        assert set(field.split(",")) == {"spec.hostNetwork!=true", "status.phase!=Succeeded", "status.phase!=Failed"}
        assert bench.store.namespaces[ObjectKey("", "default")].metadata.labels["tier"] == "front"


async def test_policies_there_at_the_start_are_not_known_before_their_pods(api: StandInApi, kubeconfig: Path) -> None:
    api.put(NETWORK_POLICIES, network_policy("deny"))
    api.put(PODS, pod("web-1", "10.1.0.1"))
    api.fault(PODS, *[answers(500, "etcd is away")] * 3)
    async with running(kubeconfig, api) as bench:
        async with asyncio.timeout(5):
            await bench.source.synced.wait()
        await until(lambda: "etcd is away" in bench.reasons())
        assert bench.store.policies and not known(bench)
        await until(lambda: known(bench))
        assert bench.store.pods
        assert not bench.source.problems()


async def test_a_policy_of_a_file_asks_for_the_clusters_pods_too(api: StandInApi, kubeconfig: Path) -> None:
    api.put(PODS, pod("web-1", "10.1.0.1"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        await until(lambda: known(bench))
        bench.store.upsert(NetworkPolicy(ObjectMeta("deny", "default")), "file:/deny.yaml")
        assert not known(bench)
        await until(lambda: known(bench))
        assert bench.key("web-1") in bench.store.pods


async def test_pods_go_some_time_after_the_last_policy(api: StandInApi, kubeconfig: Path) -> None:
    api.put(NETWORK_POLICIES, network_policy("deny"))
    api.put(PODS, pod("web-1", "10.1.0.1"))
    api.put(NAMESPACES, namespace("default"))
    async with running(kubeconfig, api, replace(SOON, unwanted=0.3)) as bench:
        await until(lambda: known(bench))
        api.delete(NETWORK_POLICIES, "default", "deny")
        await until(lambda: not bench.store.has_policies)
        assert known(bench)
        api.put(NETWORK_POLICIES, network_policy("again"))
        await until(lambda: bench.store.has_policies)
        assert known(bench) and bench.store.pods, "a policy that comes soon finds everything there"
        await asyncio.sleep(0.4)
        assert bench.store.pods and len(api.queries(PODS, watch=False)) == 1
        api.delete(NETWORK_POLICIES, "default", "again")
        await until(lambda: not bench.store.pods and not bench.store.namespaces)
        await until(lambda: not api.watching(PODS) and not api.watching(NAMESPACES))
        api.put(NETWORK_POLICIES, network_policy("later"))
        await until(lambda: bench.store.has_policies)
        await until(lambda: known(bench))
        assert bench.store.pods and bench.store.namespaces


async def test_pods_that_are_refused_are_not_asked_for_when_nobody_needs_them(
    api: StandInApi, kubeconfig: Path
) -> None:
    async def forbidden(_request: web.Request) -> web.StreamResponse:
        return status(403, "pods is forbidden")

    api.put(NETWORK_POLICIES, network_policy("deny"))
    api.fault(PODS, *[forbidden] * 1000)
    async with running(kubeconfig, api, SOON) as bench:
        await until(lambda: 'resources: ["pods"], verbs: ["list", "watch"]' in bench.reasons())
        assert not known(bench)
        api.delete(NETWORK_POLICIES, "default", "deny")
        await until(lambda: known(bench))
        await until(lambda: not bench.source.problems())
        asked = len(api.queries(PODS))
        await asyncio.sleep(0.1)
        assert len(api.queries(PODS)) == asked


# -- policies that cannot be had --------------------------------------------------------------------------------------


async def test_without_the_right_to_policies_none_is_taken_as_known_and_services_work(
    api: StandInApi, kubeconfig: Path
) -> None:
    async def forbidden(_request: web.Request) -> web.StreamResponse:
        return status(403, "networkpolicies is forbidden")

    api.put("/api/v1/services", service("web"))
    api.fault(NETWORK_POLICIES, *[forbidden] * 50)
    async with running(kubeconfig, api) as bench:
        async with asyncio.timeout(5):
            await bench.source.synced.wait()
        await until(lambda: 'apiGroups: ["networking.k8s.io"], resources: ["networkpolicies"]' in bench.reasons())
        assert bench.store.services and not known(bench)
        await until(lambda: known(bench))
        assert not bench.source.problems()


async def test_a_cluster_without_the_crd_has_no_cluster_policies_until_it_is_installed(
    api: StandInApi, kubeconfig: Path
) -> None:
    api.without(CLUSTER_NETWORK_POLICIES)
    async with running(kubeconfig, api, SOON) as bench:
        await until(lambda: known(bench))
        assert not bench.source.problems()
        api.with_again(CLUSTER_NETWORK_POLICIES)
        api.put(CLUSTER_NETWORK_POLICIES, cluster_network_policy("deny"))
        await until(lambda: bench.store.cluster_policies)


async def test_an_api_that_has_the_earlier_version_alone_is_read_by_it_and_later_by_the_newer_one(
    api: StandInApi, kubeconfig: Path
) -> None:
    earlier = CLUSTER_NETWORK_POLICIES.replace("v1beta1", "v1alpha2")
    api.without(CLUSTER_NETWORK_POLICIES)
    api.with_again(earlier)
    api.put(earlier, cluster_network_policy("deny"))
    async with running(kubeconfig, api, SOON) as bench:
        await until(lambda: known(bench) and api.watching(earlier))
        assert bench.store.cluster_policies and not bench.source.problems()
        api.with_again(CLUSTER_NETWORK_POLICIES)
        api.put(CLUSTER_NETWORK_POLICIES, cluster_network_policy("deny"))
        api.without(earlier)
        api.break_watches(earlier)
        while not api.watching(CLUSTER_NETWORK_POLICIES):
            assert bench.store.cluster_policies, "they were never gone"
            await asyncio.sleep(0.01)
        api.put(CLUSTER_NETWORK_POLICIES, cluster_network_policy("second"))
        await until(lambda: len(bench.store.cluster_policies) == 2)


async def test_a_crd_that_is_gone_once_may_come_back_and_twice_is_gone(api: StandInApi, kubeconfig: Path) -> None:
    api.put(CLUSTER_NETWORK_POLICIES, cluster_network_policy("deny"))
    async with running(kubeconfig, api, replace(SOON, absent=0.2)) as bench:
        await until(lambda: api.watching(CLUSTER_NETWORK_POLICIES))
        api.fault(CLUSTER_NETWORK_POLICIES, answers(404, "the server could not find the requested resource"))
        api.break_watches(CLUSTER_NETWORK_POLICIES)
        await until(lambda: not api.watching(CLUSTER_NETWORK_POLICIES))
        await until(lambda: api.watching(CLUSTER_NETWORK_POLICIES))
        assert bench.store.cluster_policies
        api.without(CLUSTER_NETWORK_POLICIES)
        api.break_watches(CLUSTER_NETWORK_POLICIES)
        await until(lambda: not bench.store.cluster_policies)


# -- what is kept -----------------------------------------------------------------------------------------------------


def decoded(kind: type, document: dict) -> object:
    return Wire(kind).decode_list(json.dumps({"metadata": {"resourceVersion": "1"}, "items": [document]}).encode())


async def test_of_a_pod_only_what_policies_ask_is_kept(api: StandInApi, kubeconfig: Path) -> None:
    api.put(NETWORK_POLICIES, network_policy("deny"))
    api.put(PODS, pod("web-1", "10.1.0.1"))
    api.put(PODS, pod("web-2", "10.1.0.2", node="node2"))
    api.put("/api/v1/nodes", node("node1"))
    async with running(kubeconfig, api) as bench:
        await until(lambda: known(bench))
        first, second = bench.store.pods[bench.key("web-1")], bench.store.pods[bench.key("web-2")]
        assert first.metadata == ObjectMeta("web-1", "default", labels={"app": "web"})
        assert [(c.name, c.image, c.command, c.env) for c in first.spec.containers] == [("", "", [], [])]
        assert first.spec.containers[0].ports == [ContainerPort(8080, "http"), ContainerPort(15001, "proxy")]
        assert first.spec.init_containers == []
        assert host_ports(first) == (), "the runtime's request says them already"
        assert (first.spec.node_name, first.status.phase, first.status.pod_ip) == ("node1", "Running", "10.1.0.1")
        assert [entry.ip for entry in first.status.pod_ips] == ["10.1.0.1"]
        assert first.metadata.labels is second.metadata.labels
        assert first.spec.containers is second.spec.containers
        bench.store.take_changes()
        changed = pod("web-1", "10.1.0.1")
        changed["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
        changed["metadata"]["annotations"] = {"x": "y"}
        api.put(PODS, changed)
        api.put(PODS, pod("web-2", "10.1.0.2", node="node2", tier="front"))
        await until(lambda: (bench.store.pods[bench.key("web-2")].metadata.labels or {}).get("tier") == "front")
        changes = bench.store.take_changes()
        assert (changes.pods, changes.pod_nodes) == ({bench.key("web-2")}, {"node2"})


def test_the_audit_annotation_is_kept_and_no_other() -> None:
    for audit, expected in (("true", {"waggle.io/audit": "true"}), ("", None)):
        [policy] = decoded(NetworkPolicy, network_policy("deny", audit=audit)).objects
        assert policy.metadata.annotations == expected


def test_ranges_that_older_apiservers_took_are_read_as_they_are_meant() -> None:
    document = network_policy("deny", cidr="010.000.5.1/8")
    document["spec"]["ingress"][0]["from"][0]["ipBlock"]["except"] = ["10.1.2.3/16", "fd00::0001/64"]
    [policy] = decoded(NetworkPolicy, document).objects
    assert policy.spec.ingress[0].from_[0].ip_block == IPBlock("10.0.0.0/8", ["10.1.0.0/16", "fd00::/64"])


def test_ten_thousand_pods_fit_into_ten_megabytes() -> None:
    """500 templates, each in a namespace of its own, over 100 nodes; what the store and its indices add is counted."""
    pages = []
    for start in range(0, 10_000, 500):
        documents = []
        for number in range(start, start + 500):
            template = number % 500
            documents.append(
                pod(
                    f"web-{template}-7d4b9c6f5-{number:05x}",
                    f"10.{64 + number // 65536}.{number // 256 % 256}.{number % 256}",
                    namespace=f"team-{template}",
                    node=f"node-{number % 100}.cluster.example",
                    **{"app.kubernetes.io/name": f"web-{template}", "pod-template-hash": "7d4b9c6f5"},
                )
            )
        pages.append(json.dumps({"metadata": {"resourceVersion": "1"}, "items": documents}).encode())
    wire, store = Wire(Pod), Store()
    tracemalloc.start()
    try:
        store.replace("Pod", [one for page in pages for one in wire.decode_list(page).objects], API)
        store.take_changes()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store.pods) == 10_000
    sent = sum(map(len, pages))
    sys.stderr.write(f"10,000 pods of the API: {used / 2**20:.1f} MiB, of {sent / 2**20:.0f} MiB of JSON\n")
    assert used < 10 * 2**20
