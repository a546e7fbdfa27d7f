"""How long the planner of policy takes in a large cluster, and how large its tables are.

`python -m bench.policy_plan` prints one line for each figure. A cluster of 10,000 pods in 100 namespaces with 1,000
policies, of which this node has 50 pods: each namespace has apps, each app has a policy that lets two others in and
out, by labels, by teams of namespaces or by ranges of addresses. With `--everywhere`, all 1,000 select each pod of
this node.
"""

from __future__ import annotations

import argparse
import ipaddress
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

from msgspec.structs import replace

from waggle.model.meta import ObjectKey, ObjectMeta
from waggle.model.objects import Container, ContainerPort, Node, NodeAddress, NodeStatus, Pod, PodIP, PodSpec, PodStatus
from waggle.model.policy_objects import (
    IPBlock,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
)
from waggle.plan.policy import PolicyPlanner
from waggle.plan.policy_memory import entry_bytes, fixed_bytes, identity_tables
from waggle.sources.collector import paused_collector

NODES = 200
NAMESPACES = 100
APPS = 10  # in a namespace
HERE = "node-0"


def pods(count: int, *, together: bool) -> Iterator[Pod]:
    """Pods of every app of every namespace, on any nodes; `together`: those of this node are all in ns-0."""
    chance, used = random.Random(0), [0] * NODES
    for number in range(count):
        app = number // NAMESPACES % APPS
        labels = {"app": f"app-{app}", "tier": "web" if app < 3 else "data", "pod-template-hash": f"{app:08x}"}
        if app == 9:
            labels["statefulset.kubernetes.io/pod-name"] = f"app-9-{number}"  # what every pod of a StatefulSet has
        node = chance.randrange(NODES)
        used[node] += 1
        namespace = 0 if together and node == 0 else number % NAMESPACES
        address = str(ipaddress.IPv4Address("10.0.0.0") + 256 * node + used[node])
        yield Pod(
            ObjectMeta(name=f"pod-{number}", namespace=f"ns-{namespace}", labels=labels),
            PodSpec(f"node-{node}", containers=[Container(ports=[ContainerPort(8080, "http")])]),
            PodStatus("Running", pod_ips=[PodIP(address)]),
        )


def policies(count: int, seed: int = 1) -> Iterator[NetworkPolicy]:
    """Policies for one app each."""
    chance = random.Random(seed)
    for number in range(count):
        namespace, app = number % NAMESPACES, number // NAMESPACES % APPS
        yield policy(f"policy-{number}", f"ns-{namespace}", app, chance)


def policy(name: str, namespace: str, app: int, chance: random.Random) -> NetworkPolicy:
    def peer() -> NetworkPolicyPeer:
        kind = chance.randrange(4)
        other = LabelSelector({"app": f"app-{chance.randrange(APPS)}"})
        if kind == 0:
            return NetworkPolicyPeer(namespace_selector=LabelSelector({"team": f"team-{chance.randrange(10)}"}))
        if kind == 1:
            return NetworkPolicyPeer(other, LabelSelector({"team": f"team-{chance.randrange(10)}"}))
        if kind == 2:
            network = f"172.{16 + chance.randrange(16)}.{chance.randrange(256)}.0"
            return NetworkPolicyPeer(ip_block=IPBlock(f"{network}/24", [f"{network}/28"]))
        return NetworkPolicyPeer(other)

    numbers: list[int | str] = [80, 443, 8080, "http"]
    ports = [NetworkPolicyPort(port=chance.choice(numbers))]
    return NetworkPolicy(
        ObjectMeta(name=name, namespace=namespace),
        NetworkPolicySpec(
            LabelSelector({"app": f"app-{app}"}),
            ["Ingress", "Egress"],
            [NetworkPolicyIngressRule([peer(), peer()], ports)],
            [NetworkPolicyEgressRule([peer(), peer()], ports)],
        ),
    )


def namespaces() -> Iterator[Namespace]:
    for number in range(NAMESPACES):
        yield Namespace(ObjectMeta(name=f"ns-{number}", labels={"team": f"team-{number % 10}"}))


def milliseconds(act: Callable[[], object]) -> float:
    """Of processor time: what else the machine does is not counted."""
    start = time.thread_time()
    act()
    return (time.thread_time() - start) * 1000


class Cluster:
    """A planner that knows it all."""

    def __init__(self, pod_count: int, policy_count: int, *, everywhere: bool) -> None:
        self.planner = PolicyPlanner()
        self.pods = {pod.key: pod for pod in pods(pod_count, together=everywhere)}
        self.namespaces = {namespace.key: namespace for namespace in namespaces()}
        self.policies = {policy.key: policy for policy in policies(policy_count)}
        if everywhere:  # every policy selects the pods of this node
            self.policies = {
                ObjectKey("ns-0", policy.metadata.name): replace(
                    policy,
                    metadata=replace(policy.metadata, namespace="ns-0"),
                    spec=replace(policy.spec, pod_selector=LabelSelector()),
                )
                for policy in self.policies.values()
            }
        self.local = [pod for pod in self.pods.values() if pod.spec.node_name == HERE]
        self.remote = [pod for pod in self.pods.values() if pod.spec.node_name != HERE]

    def load(self) -> None:
        planner = self.planner
        planner.set_own_addresses(["192.168.0.1"])
        node = Node(ObjectMeta(name=HERE), status=NodeStatus([NodeAddress("InternalIP", "192.168.0.1")]))
        planner.set_node(HERE, node)
        for key, namespace in self.namespaces.items():
            planner.set_namespace(key.name, namespace)
        for policy in self.policies.values():
            planner.set_policy(policy.key, policy)
        for pod in self.local:
            planner.attach(pod.status.pod_ips[0].ip, pod.key)
        for key, pod in self.pods.items():
            planner.set_pod(key, pod)
        planner.plan()

    def relabel(self, pod: Pod, app: int) -> float:
        """Milliseconds for the change; then the pod gets back what it had."""
        labels = {**(pod.metadata.labels or {}), "app": f"app-{app}"}
        other = replace(pod, metadata=replace(pod.metadata, labels=labels))
        took = milliseconds(partial(self._update, other))
        self._update(pod)
        return took

    def _update(self, pod: Pod) -> None:
        self.planner.set_pod(pod.key, pod)
        self.planner.plan()

    def come(self, number: int) -> None:
        """A new pod of an app that is there, on another node."""
        like = self.remote[number]
        self.planner.set_pod(
            ObjectKey(like.metadata.namespace, f"new-{number}"),
            replace(
                like,
                metadata=replace(like.metadata, name=f"new-{number}"),
                status=replace(like.status, pod_ips=[PodIP(f"10.200.{number // 250}.{number % 250 + 1}")]),
            ),
        )
        self.planner.plan()

    def policy_comes(self, number: int) -> None:
        local = self.local[number % len(self.local)]
        app = int((local.metadata.labels or {})["app"].split("-")[1])
        made = policy(f"new-{number}", local.metadata.namespace, app, random.Random(number))
        self.planner.set_policy(made.key, made)
        self.planner.plan()

    def policy_goes(self, number: int) -> None:
        local = self.local[number % len(self.local)]
        self.planner.set_policy(ObjectKey(local.metadata.namespace, f"new-{number}"), None)
        self.planner.plan()


def measure(cluster: Cluster, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each kind of change."""
    with paused_collector(freeze=True):  # as the sources do for the first lists of an apiserver
        figures: dict[str, list[float]] = {"everything at once": [milliseconds(cluster.load)]}
    here, elsewhere = cluster.local, cluster.remote
    figures["label of a pod elsewhere"] = [cluster.relabel(elsewhere[n * 37], n % APPS) for n in range(rounds)]
    figures["label of a pod here"] = [cluster.relabel(here[n % len(here)], n % APPS) for n in range(rounds)]
    for name, act in (
        ("new pod elsewhere", cluster.come),
        ("new policy", cluster.policy_comes),
        ("policy gone", cluster.policy_goes),
    ):
        figures[name] = [milliseconds(partial(act, n)) for n in range(rounds)]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=10_000)
    parser.add_argument("--policies", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--everywhere", action="store_true", help="every policy selects every pod of ns-0")
    options = parser.parse_args()
    cluster = Cluster(options.pods, options.policies, everywhere=options.everywhere)
    for name, figures in measure(cluster, options.rounds).items():
        median, most = statistics.median(figures), max(figures)
        print(f"{name:28} {median:9.2f} ms median {most:9.2f} ms most")
    tables = cluster.planner.tables
    entries = sum(map(len, tables.sets.values()))
    found = set(tables.classes.values()) | set(tables.ranges.values())
    steps = {steps for entries in tables.sets.values() for steps in entries.values()}
    print(f"{len(tables.sets)} sets, {len(found)} classes, {entries} entries, {len(steps)} lists of steps")
    usual = identity_tables(tables, cluster.pods.values())
    print(f"{entry_bytes(tables) / 2**20:.2f} MiB of entries, {fixed_bytes() / 2**20:.2f} MiB of empty maps")
    print(
        f"with an identity for each set of labels: {usual.identities} identities, {usual.addresses} addresses,"
        f" {usual.entries} entries, {usual.bytes / 2**20:.2f} MiB of entries"
    )


if __name__ == "__main__":
    main()
