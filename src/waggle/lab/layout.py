"""Where everything of a lab lives, and which addresses it has. Pure: nothing here touches the machine.

Invariants:
- Every name a lab puts on the machine carries the lab's name in a place of its own, and a lab's name holds no
  separator. So what belongs to a lab is found by looking, without any record, and two labs cannot meet.
- All interfaces are inside the lab's own network namespaces; therefore all labs use the same addresses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from waggle.errors import LabError
from waggle.model.objects import ObjectKey

#: The machine outside the cluster.
CLIENT = "client"
#: The underlay: the switch and the gateway of the nodes.
UNDERLAY = "net"
MAX_NODES = 200
MAX_SEGMENTS = 9
DEFAULT_NODES = 2
DEFAULT_LAB = "default"

PREFIX_V4, PREFIX_V6 = 24, 64
#: What pods have, on all nodes together.
POD_NETWORKS = ("10.244.0.0/16", "fd00:10:244::/48")
#: Addresses that Services get which come without: Kubernetes' usual ranges.
SERVICE_CIDR_V4, SERVICE_CIDR_V6 = "10.96.0.0/16", "fd00:10:96::/112"
NODE_PORTS = range(30000, 32768)

RUN_ROOT = Path("/run/waggle-lab")
STATE_ROOT = Path("/var/lib/waggle-lab")
BPF_MOUNT = Path("/sys/fs/bpf")
NETNS_ROOT = Path("/run/netns")

_LAB_NAME = re.compile(r"[a-z][a-z0-9]{0,19}")
_NODE_NAME = re.compile(r"node([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Place:
    """Namespaces and cgroup that processes of one machine or pod run in."""

    name: str
    netns: Path
    uts: Path
    cgroup: Path

    @property
    def exec_cgroup(self) -> Path:
        """Where `waggle lab exec` puts what it runs."""
        return self.cgroup / "exec"


@dataclass(frozen=True, slots=True)
class Segment:
    """One network of the underlay: a switch, and a gateway to the others. `index` counts from 0."""

    index: int = 0

    @property
    def bridge(self) -> str:
        return f"br{self.index}"

    @property
    def gateways(self) -> tuple[str, str]:
        return self.addresses(1)

    def addresses(self, host: int) -> tuple[str, str]:
        """IPv4 and IPv6 address of a machine there, without prefix length."""
        middle = f"0:{self.index}:" if self.index else ""
        return f"10.77.{self.index}.{host}", f"fd00:77:{middle}:{host}"


@dataclass(frozen=True, slots=True)
class NodeLayout:
    """One node. `index` counts from 1."""

    index: int
    place: Place
    run: Path
    state: Path
    bpf: Path
    segment: Segment = Segment()

    @property
    def name(self) -> str:
        return f"node{self.index}"

    @property
    def addresses(self) -> tuple[str, str]:
        """IPv4 and IPv6 address on the underlay, without prefix length."""
        return self.segment.addresses(10 + self.index)

    @property
    def pod_cidrs(self) -> tuple[str, str]:
        return f"10.244.{self.index}.0/24", f"fd00:10:244:{self.index}::/64"

    @property
    def agent_cgroup(self) -> Path:
        return self.place.cgroup / "agent"

    @property
    def socket(self) -> Path:
        return self.run / "agent.sock"

    @property
    def config(self) -> Path:
        return self.run / "agent.yaml"

    @property
    def log(self) -> Path:
        return self.run / "agent.log"

    @property
    def cni_conf(self) -> Path:
        return self.run / "cni" / "10-waggle.conflist"


@dataclass(frozen=True, slots=True)
class PodLayout:
    """One pod on one node. A pod on the host network has no place of its own but the node's namespaces."""

    key: ObjectKey
    node: NodeLayout
    place: Place
    run: Path

    @property
    def record(self) -> Path:
        return self.run / "record.json"

    def container_cgroup(self, container: str) -> Path:
        return self.place.cgroup / container

    def log(self, container: str) -> Path:
        return self.run / f"{container}.log"

    def exit_file(self, container: str) -> Path:
        """Holds the exit status once the container's command has ended."""
        return self.run / f"{container}.exit"


@dataclass(frozen=True, slots=True)
class LabLayout:
    """One lab. `cgroup_mount` is where cgroup2 is mounted. Its nodes take turns on the segments of its underlay."""

    name: str
    cgroup_mount: Path
    segment_count: int = 1

    def __post_init__(self) -> None:
        if not _LAB_NAME.fullmatch(self.name):
            raise LabError(f"{self.name!r} cannot name a lab: 1 to 20 of a-z and 0-9, beginning with a letter")

    @property
    def run(self) -> Path:
        return RUN_ROOT / self.name

    @property
    def lock(self) -> Path:
        return RUN_ROOT / f"{self.name}.lock"

    @property
    def record(self) -> Path:
        return self.run / "lab.json"

    @property
    def manifests(self) -> Path:
        """The live objects; every agent of the lab watches it."""
        return self.run / "manifests"

    @property
    def api_netns(self) -> Path:
        """The network namespace from which the agents reach the Kubernetes API."""
        return self.run / "api-netns"

    @property
    def state(self) -> Path:
        return STATE_ROOT / self.name

    @property
    def bpf(self) -> Path:
        return BPF_MOUNT / "waggle-lab" / self.name

    @property
    def cgroup(self) -> Path:
        return self.cgroup_mount / "waggle-lab" / self.name

    @property
    def netns_prefix(self) -> str:
        return f"waggle-{self.name}-"

    def owns_netns(self, file_name: str) -> bool:
        """Whether a file of `ip netns` with that name is this lab's."""
        return re.fullmatch(rf"{self.netns_prefix}({UNDERLAY}|{CLIENT}|node[0-9]+|pod-.+_.+)", file_name) is not None

    def machine(self, name: str) -> Place:
        """The place of a node, of the client or of the underlay."""
        return Place(
            name=name,
            netns=NETNS_ROOT / f"{self.netns_prefix}{name}",
            uts=self.run / "uts" / name,
            cgroup=self.cgroup / name,
        )

    @property
    def client(self) -> Place:
        return self.machine(CLIENT)

    @property
    def underlay(self) -> Place:
        return self.machine(UNDERLAY)

    def node(self, index: int) -> NodeLayout:
        name = f"node{index}"
        return NodeLayout(
            index=index,
            place=self.machine(name),
            run=self.run / name,
            state=self.state / name,
            bpf=self.bpf / name,
            segment=Segment((index - 1) % self.segment_count),
        )

    @property
    def segments(self) -> list[Segment]:
        return [Segment(index) for index in range(self.segment_count)]

    def nodes(self, count: int) -> list[NodeLayout]:
        return [self.node(index) for index in range(1, count + 1)]

    def node_named(self, name: str, count: int) -> NodeLayout | None:
        """The node with that name, None where a lab of `count` nodes has none."""
        match = _NODE_NAME.fullmatch(name)
        index = int(match[1]) if match else 0
        return self.node(index) if 1 <= index <= count else None

    def pod(self, key: ObjectKey, node: NodeLayout, *, host_network: bool = False) -> PodLayout:
        folder = f"{key.namespace}_{key.name}"
        cgroup = node.place.cgroup / "pods" / folder
        run = node.run / "pods" / folder
        if host_network:
            place = Place(name=str(key), netns=node.place.netns, uts=node.place.uts, cgroup=cgroup)
        else:
            netns = NETNS_ROOT / f"{self.netns_prefix}pod-{_short(folder)}"
            place = Place(name=str(key), netns=netns, uts=self.run / "uts" / f"pod-{_short(folder)}", cgroup=cgroup)
        return PodLayout(key=key, node=node, place=place, run=run)


def _short(name: str) -> str:
    """The name itself, or a short one made from it where a file name could not hold it."""
    return name if len(name) <= 180 else f"{name[:160]}.{sha256(name.encode()).hexdigest()[:16]}"
