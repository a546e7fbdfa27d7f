"""The machines of a lab and the network between them.

    waggle-LAB-net: bridge br0 (10.77.0.1, fd00:77::1, the gateway)
      ├── waggle-LAB-node1: eth0 10.77.0.11, fd00:77::11
      ├── waggle-LAB-node2 …
      └── waggle-LAB-client: eth0 10.77.0.2, fd00:77::2, outside the cluster

The gateway knows no route to pods: like a real network's, it answers "unreachable". Nodes reach each other's pods by
the routes their agents set, on the shared link. With more segments than one, nodes take turns on br0, br1, …
(10.77.1.0/24 and fd00:77:0:1::/64), and the gateway routes between them: machines' addresses, and nothing that comes
from a pod.
Nothing here ever touches the namespace of the caller.
"""

from __future__ import annotations

import json
import subprocess

from waggle.errors import LabError
from waggle.lab import namespaces
from waggle.lab.layout import POD_NETWORKS, PREFIX_V4, PREFIX_V6, LabLayout, NodeLayout, Place, Segment

_CLIENT_ADDRESSES = Segment().addresses(2)

# Addresses are usable at once and nobody but the lab configures anything. Reverse paths are filtered strictly, as many
# distributions have it. "default" counts for interfaces made later, "all" for those that exist.
_SYSCTLS = (
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "1"),
    ("ipv4/conf/default/rp_filter", "1"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/conf/default/forwarding", "1"),
    # The bridge switches frames; were it to show them to Netfilter, rules of the host's policy would apply in here.
    ("bridge/bridge-nf-call-iptables", "0"),
    ("bridge/bridge-nf-call-ip6tables", "0"),
)


def create_switch(lab: LabLayout) -> bool:
    """The underlay's namespace with a bridge for each segment. True when the namespace was made now."""
    place = lab.underlay
    created = namespaces.create_place(place)
    namespaces.write_sysctls(place.netns, _SYSCTLS)
    # A backend's node answers as another node, where it does so directly: the router lets that pass.
    namespaces.write_sysctls(place.netns, [(f"ipv4/conf/{which}/rp_filter", "0") for which in ("all", "default")])
    if created and len(lab.segments) > 1:
        for version, pods in zip((4, 6), POD_NETWORKS, strict=True):
            namespaces.ip_batch(place.netns, [f"rule add from {pods} blackhole"], version=version)
    setup = ["link set lo up"]
    present = _links(place)
    for segment in lab.segments:
        bridge, (v4, v6) = segment.bridge, segment.gateways
        if bridge not in present:
            setup.append(
                f"link add {bridge} address {_mac(v4)} type bridge forward_delay 0 stp_state 0 mcast_snooping 0"
            )
        setup += [
            f"link set {bridge} up",
            f"address replace {v4}/{PREFIX_V4} dev {bridge}",
            f"address replace {v6}/{PREFIX_V6} dev {bridge} nodad",
        ]
    namespaces.ip_batch(place.netns, setup)
    return created


def create_client(lab: LabLayout) -> bool:
    """The machine outside the cluster. True when it was made now."""
    created = namespaces.create_place(lab.client)
    _connect(lab, lab.client, _CLIENT_ADDRESSES, Segment())
    return created


def create_node(lab: LabLayout, node: NodeLayout) -> bool:
    """The node's namespaces, connected. True when the network namespace was made now: the node has "booted"."""
    created = namespaces.create_place(node.place)
    _connect(lab, node.place, node.addresses, node.segment)
    return created


def _connect(lab: LabLayout, place: Place, addresses: tuple[str, str], segment: Segment) -> None:
    """eth0 of the machine, joined to the bridge, with its addresses and default routes. Idempotent."""
    v4, v6 = addresses
    gateway4, gateway6 = segment.gateways
    namespaces.write_sysctls(place.netns, _SYSCTLS)
    ports, links = _links(lab.underlay), _links(place)
    if place.name not in ports or "eth0" not in links:
        # Half a pair cannot be: a port without eth0 belongs to an eth0 that was moved or to a dying namespace.
        setup = [f"link delete {place.name}"] if place.name in ports else []
        setup.append(f"link add {place.name} type veth peer name eth0 address {_mac(v4)} netns {place.netns.name}")
        namespaces.ip_batch(lab.underlay.netns, setup)
    namespaces.ip_batch(lab.underlay.netns, [f"link set {place.name} master {segment.bridge} up"])
    namespaces.ip_batch(
        place.netns,
        [
            "link set lo up",
            "link set eth0 up",
            f"address replace {v4}/{PREFIX_V4} dev eth0",
            f"address replace {v6}/{PREFIX_V6} dev eth0 nodad",
            f"route replace default via {gateway4} dev eth0",
            f"route replace default via {gateway6} dev eth0",
        ],
    )


def _mac(address: str) -> str:
    """A machine that is made again has the network card it had: its neighbours still know it."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def _links(place: Place) -> set[str]:
    done = subprocess.run(
        ["ip", "-netns", place.netns.name, "-json", "link", "show"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise LabError(f"cannot list the interfaces of {place.netns.name}: {done.stderr.strip()}")
    return {link["ifname"] for link in json.loads(done.stdout or "[]")}
