"""Random policies over the nine pods of `policy_worlds`, as Hypothesis strategies."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from tests.unit.policy_worlds import cluster_policy, policy

from waggle.model.policy_objects import ClusterNetworkPolicy, NetworkPolicy

BLOCKS = [
    "0.0.0.0/0",
    "10.0.0.0/16",
    "10.0.2.0/24",
    "10.0.2.2/32",
    "192.0.2.0/24",
    "203.0.113.0/24",
    "::/0",
    "fd00::2:0/112",
]
EXCEPTS = {"0.0.0.0/0": ["10.0.0.0/8"], "10.0.0.0/16": ["10.0.2.0/25"], "::/0": ["fd00::/16"]}
PORTS = [79, 80, 81]

selectors = st.sampled_from(
    [
        {},
        {"matchLabels": {"pod": "a"}},
        {"matchLabels": {"pod": "b"}},
        {"matchExpressions": [{"key": "pod", "operator": "NotIn", "values": ["a"]}]},
        {"matchExpressions": [{"key": "pod", "operator": "Exists"}, {"key": "gone", "operator": "DoesNotExist"}]},
    ]
)
namespace_selectors = st.sampled_from(
    [
        {},
        {"matchLabels": {"ns": "x"}},
        {"matchLabels": {"kubernetes.io/metadata.name": "y"}},
        {"matchExpressions": [{"key": "ns", "operator": "In", "values": ["y", "z"]}]},
    ]
)


@st.composite
def _block(draw: st.DrawFn) -> dict[str, Any]:
    cidr = draw(st.sampled_from(BLOCKS))
    excepted = draw(st.sampled_from([[], EXCEPTS.get(cidr, [])]))
    return {"ipBlock": {"cidr": cidr, "except": excepted}}


_peers = st.lists(
    st.one_of(
        st.fixed_dictionaries({"podSelector": selectors}),
        st.fixed_dictionaries({"namespaceSelector": namespace_selectors}),
        st.fixed_dictionaries({"podSelector": selectors, "namespaceSelector": namespace_selectors}),
        _block(),
    ),
    max_size=2,
)
_network_ports = st.lists(
    st.one_of(
        st.fixed_dictionaries({"protocol": st.sampled_from(["TCP", "UDP", "SCTP"])}),
        st.fixed_dictionaries({"port": st.sampled_from([*PORTS, "serve-80-tcp", "nowhere"])}),
        st.fixed_dictionaries({"port": st.sampled_from(PORTS), "protocol": st.sampled_from(["UDP", "SCTP"])}),
        st.builds(lambda port, more: {"port": port, "endPort": port + more}, st.sampled_from(PORTS), st.integers(0, 9)),
    ),
    max_size=2,
)


@st.composite
def network_policies(draw: st.DrawFn, name: str = "p") -> NetworkPolicy:
    """A NetworkPolicy in any of the namespaces."""
    rules = {
        direction: [{peers: draw(_peers), "ports": draw(_network_ports)} for _ in range(draw(st.integers(0, 2)))]
        for direction, peers in (("ingress", "from"), ("egress", "to"))
    }
    types = draw(st.sampled_from([[], ["Ingress"], ["Egress"], ["Ingress", "Egress"]]))
    spec = {"podSelector": draw(selectors), "policyTypes": types, **rules}
    return policy(_yaml(spec), name, draw(st.sampled_from("xyz")), audit=draw(st.integers(0, 4)) == 0)


_cluster_pods = st.fixed_dictionaries({"namespaceSelector": namespace_selectors, "podSelector": selectors})
_inside = st.one_of(
    st.fixed_dictionaries({"namespaces": namespace_selectors}), st.fixed_dictionaries({"pods": _cluster_pods})
)
_beyond = st.one_of(
    _inside,
    st.fixed_dictionaries({"networks": st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=2)}),
    st.fixed_dictionaries({"nodes": st.sampled_from([{}, {"matchLabels": {"role": "node2"}}])}),
)
_cluster_port = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"destinationPort": st.fixed_dictionaries({"number": st.sampled_from(PORTS)})}),
    st.just({"destinationPort": {"range": {"start": 80, "end": 90}}}),
)
_protocols = st.one_of(
    st.none(),
    st.lists(
        st.one_of(
            *(st.fixed_dictionaries({name: _cluster_port}) for name in ("tcp", "udp", "sctp")),
            st.just({"destinationNamedPort": "serve-81-udp"}),
        ),
        min_size=1,
        max_size=2,
    ),
)


@st.composite
def cluster_policies(draw: st.DrawFn, name: str = "c") -> ClusterNetworkPolicy:
    """A ClusterNetworkPolicy of either tier; now and then with a peer that nobody knows."""
    rules = {}
    for direction, peers, kinds in (("ingress", "from", _inside), ("egress", "to", _beyond)):
        rules[direction] = [
            {
                "action": draw(st.sampled_from(["Accept", "Deny", "Pass"])),
                peers: draw(st.lists(st.one_of(*[kinds] * 9, st.just({})), min_size=1, max_size=2)),
                "protocols": draw(_protocols),
            }
            for _ in range(draw(st.integers(0, 2)))
        ]
    spec = {"subject": draw(_inside), **rules}
    tier = draw(st.sampled_from(["Admin", "Baseline"]))
    return cluster_policy(_yaml(spec), name, tier, draw(st.integers(0, 3)), audit=draw(st.integers(0, 4)) == 0)


def _yaml(spec: dict[str, Any]) -> str:
    import json

    return json.dumps(spec)  # JSON is YAML


policy_lists = st.builds(
    lambda network, cluster: [*network, *cluster],
    st.tuples(*(network_policies(f"p{n}") for n in range(3))).flatmap(
        lambda all_: st.lists(st.sampled_from(all_), unique_by=lambda p: p.key, max_size=3)
    ),
    st.tuples(*(cluster_policies(f"c{n}") for n in range(2))).flatmap(
        lambda all_: st.lists(st.sampled_from(all_), unique_by=lambda p: p.key, max_size=2)
    ),
)
