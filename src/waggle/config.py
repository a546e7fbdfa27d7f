"""The agent's settings: parsed once, from a YAML file and from flags, into one frozen dataclass.

A setting has the same name as a flag (`--pod-cidr`) and as a key of the file (`pod-cidr:`); a flag wins over the
file, the file over the default. Unknown keys are refused, with the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import itertools
import re
import socket
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from waggle.errors import ConfigError

DEFAULT_SOCKET = Path("/run/waggle/agent.sock")


def _setting(default: Any, help_text: str) -> Any:
    if isinstance(default, (list, dict)):
        raise TypeError("use tuples for defaults")
    return field(default=default, metadata={"help": help_text})


#: RFC 1918, 3927, 6598, 4193, 4291.
PRIVATE_NETWORKS = (
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "fc00::/7",
    "fe80::/10",
)
#: Link-local and unique local: of no network that a machine may be in.
DNS_ADDRESSES = ("169.254.53.53", "fd77:6167:676c::53")
NO_DNS = "none"
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
XDP_MODES = ("none", "native", "generic")
FLOW_EVENTS = ("off", "services", "all")
_MAY_BE_OFF = ("podman", "flow_events")  # which YAML reads as false
MAX_NON_MASQUERADE = 16  # WAG_NETWORKS in bpf/include/waggle/config.h


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Everything an agent can be told. Paths are absolute; addresses are canonical strings."""

    node_name: str = _setting("", "Name of this node in Kubernetes or in the manifests. Default: the host name.")
    manifests: Path | None = _setting(None, "Directory of Kubernetes YAML to watch.")
    kubeconfig: Path | None = _setting(
        None, "Kubernetes API to watch; 'in-cluster' uses the pod's service account. Default: no Kubernetes."
    )
    kubernetes_netns: Path | None = _setting(
        None, "Network namespace from which the Kubernetes API is reached (the lab uses it). Default: the agent's own."
    )
    pod_cidr: tuple[str, ...] = _setting(
        (),
        "Pod address ranges of this node; of several of one family the next is used when one is full. Default: the "
        "Node object's podCIDRs.",
    )
    node_ip: tuple[str, ...] = _setting(
        (), "Address of this node, at most one per family. Default: those of the interface of the default route."
    )
    devices: tuple[str, ...] = _setting(
        (), "Uplink interfaces: NodePorts are served there. Default: those that carry a default route or the node IP."
    )
    nodeport_addresses: tuple[str, ...] = _setting(
        (),
        "Addresses of this node that serve NodePorts and health ports: networks, or 'primary' for the node IPs. "
        "Default: all; loopback addresses for processes of the node.",
    )
    routing: str = _setting(
        "auto",
        "How pods of other nodes are reached: auto (natively where the other node's address is on a network of this "
        "node, else by VXLAN), native, or vxlan. The same on all nodes.",
    )
    vxlan_port: int = _setting(
        8472,
        "UDP port of the tunnels between nodes, the same on all of them. Default: the one that firewalls between "
        "nodes of Kubernetes usually let through, and not 4789, which hypervisors and switches take for theirs.",
    )
    vxlan_vni: int = _setting(119, "Number of the virtual network in the tunnels (VNI), the same on all nodes.")
    service_cidr: tuple[str, ...] = _setting(
        (),
        "Ranges that cluster addresses come from: traffic to an address there that no Service has is dropped; 'none' "
        "where another proxy serves part of them. Services of manifests that come without an address get one from "
        "there, unless there is Kubernetes. Default: the ServiceCIDR objects.",
    )
    masquerade: bool = _setting(True, "What pods send out of the cluster gets this node's address as its source.")
    non_masquerade: tuple[str, ...] = _setting(
        PRIVATE_NETWORKS,
        "Networks that know a way to pods: nothing sent there is masqueraded, nor are pods that are in none of them. "
        "Default: private and link-local networks.",
    )
    balancing: str = _setting(
        "random",
        "How flows of packets choose their backend: random, or maglev (by a hash, the same on every node). A Service "
        "may say otherwise: annotation waggle.dev/balancing.",
    )
    forwarding: str = _setting(
        "snat",
        "How packets from outside reach backends on other nodes: snat (answers come back through this node) or dsr "
        "(the backend's node answers the client; takes Node objects with addresses). A Service may say otherwise: "
        "annotation waggle.dev/forwarding.",
    )
    xdp: str = _setting(
        "none",
        "XDP on uplinks, for packets that go to other nodes: none, native (in the driver; attaching may reset its "
        "link) or generic (for tests: no faster than tc).",
    )
    beside_kube_proxy: bool = _setting(
        False,
        "Start although kube-proxy runs on this node, to take its place: established flows are taken over, new ones "
        "are waggle's. `waggle takeover` then removes its rules.",
    )
    cgroup_root: Path | None = _setting(None, "cgroup2 directory whose sockets are load-balanced. Default: the mount.")
    bpf_root: Path = _setting(Path("/sys/fs/bpf/waggle"), "Directory on bpffs for pinned maps and links.")
    state_dir: Path = _setting(Path("/var/lib/waggle"), "Directory for address reservations, kept over reboots.")
    api_socket: Path = _setting(DEFAULT_SOCKET, "Unix socket of the agent's API; the CNI plugin and CLI use it.")
    api_group: str = _setting("", "Group that may ask the API besides root, and so see everything. Default: none.")
    cni_bin_dir: Path | None = _setting(
        None,
        "Directory of CNI plugins, usually /opt/cni/bin: the agent puts waggle-cni there, and loopback, which "
        "containerd needs, where there is none. Default: nowhere.",
    )
    cni_conf_dir: Path | None = _setting(
        None,
        "Directory of networks that container runtimes read, usually /etc/cni/net.d: the agent writes its own there "
        "when it can answer. Default: nowhere.",
    )
    podman: str = _setting(
        "auto",
        "How Podman is asked for the labels of its containers: auto (the command podman, where there is one), off, or "
        "a command with its options, such as 'podman --root /srv/containers'.",
    )
    dns_address: tuple[str, ...] = _setting(
        (),
        "Address at which this node's containers resolve names of Services, at most one per family: it is put on the "
        "loopback interface, and given to containers by CNI. 'none': nowhere. Default: 169.254.53.53 and "
        "fd77:6167:676c::53 where cni-conf-dir is set and there is no Kubernetes, else none.",
    )
    cluster_domain: str = _setting("cluster.local", "Domain of the names of Services: web.default.svc.cluster.local.")
    metrics_address: str = _setting(
        "127.0.0.1:9970", "HOST:PORT for /metrics, /healthz, /livez and /readyz; empty turns it off."
    )
    flow_events: str = _setting(
        "all",
        "Which flows are reported besides drops: off, services (those to Services), or all (those of pods with "
        "anyone). Flows between the same ends are counted together, and reported once a second at most.",
    )
    event_rate: int = _setting(
        500,
        "Most events of one kind (flows, drops, verdicts of policies) that one CPU reports per second; of a flood the "
        "rest is only counted.",
    )
    flow_history: int = _setting(
        8 << 20, "Bytes of memory for the latest events, which `waggle flows` shows. 0: none are kept."
    )
    flow_log: Path | None = _setting(
        None, "File that gets every event as a line of JSON; `waggle flows -o json` shows the same. Default: none."
    )
    flow_log_size: int = _setting(
        64 << 20, "Size in bytes at which the flow log is renamed and begun anew. Four older files are kept: .1 to .4."
    )
    max_services: int = _setting(131072, "Size of the frontend table (one entry per address, port and protocol).")
    max_backends: int = _setting(393216, "Size of the backend table (one entry per endpoint and Service port).")
    max_nat: int = _setting(
        0,
        "Size of the NAT table (two entries per translated flow); it takes memory as flows come. Default, 0: one entry "
        "for every 64 KiB of the machine's memory. Another size takes effect at the next start, and flows that are "
        "there stay; one that begins in the moment of the change may be lost.",
    )
    nat_tcp_timeout: int = _setting(21600, "Seconds that a translated TCP or SCTP connection lives without a packet.")
    nat_udp_timeout: int = _setting(180, "Seconds that a translated UDP flow lives without a packet.")
    policy_established: str = _setting(
        "cut",
        "What happens to established flows that policies do not allow any more: cut, from the next packet on, or keep.",
    )
    max_policy_flows: int = _setting(
        65536,
        "How many flows of pods with policies are remembered (about 120 bytes each, taken at the start). More flows "
        "work as well; one that was forgotten is judged again by its next packet.",
    )
    max_policy_names: int = _setting(
        16384,
        "How many addresses are remembered that DNS answers gave pods for names in their policies (about 280 bytes "
        "each, taken at the start). Of more, those make room that were not used for longest.",
    )
    drift_check: int = _setting(
        60, "Seconds between two checks that the maps hold what they should; what does not is repaired. 0: no checks."
    )
    log_level: str = _setting("info", "debug, info, warning or error.")

    def validated(self) -> AgentConfig:
        """This configuration with names filled in and values checked. Raises ConfigError naming the setting."""
        node_name = self.node_name or socket.gethostname().lower()  # as kubelet names its node
        if len(node_name) > 253 or not all((c.isascii() and c.isalnum()) or c in "-." for c in node_name):
            raise ConfigError(f"node-name: {node_name!r} is not a valid node name")
        pod_cidr = _canonical("pod-cidr", self.pod_cidr, ipaddress.ip_network, many=True)
        _refuse_overlaps("pod-cidr", pod_cidr)
        node_ip = _canonical("node-ip", self.node_ip, ipaddress.ip_address)
        non_masquerade = _canonical("non-masquerade", self.non_masquerade, ipaddress.ip_network, many=True)
        if len(non_masquerade) > MAX_NON_MASQUERADE:
            raise ConfigError(f"non-masquerade: at most {MAX_NON_MASQUERADE} networks, not {len(non_masquerade)}")
        _check_networks("nodeport-addresses", self.nodeport_addresses, alone="primary")
        _check_networks("service-cidr", self.service_cidr, alone="none")
        dns_address = self._dns_address()
        if len(self.cluster_domain) > 200 or not _DOMAIN.fullmatch(self.cluster_domain):
            raise ConfigError(f"cluster-domain: {self.cluster_domain!r} is not a domain such as cluster.local")
        if self.metrics_address:
            split_host_port(self.metrics_address)
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"log-level: {self.log_level!r} is not one of debug, info, warning, error")
        if self.drift_check < 0:
            raise ConfigError("drift-check: must not be negative")
        for name, known in (
            ("balancing", ("random", "maglev")),
            ("forwarding", ("snat", "dsr")),
            ("xdp", XDP_MODES),
            ("routing", ("auto", "native", "vxlan")),
            ("flow_events", FLOW_EVENTS),
        ):
            if getattr(self, name) not in known:
                label = name.replace("_", "-")
                raise ConfigError(f"{label}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("nat_tcp_timeout", "nat_udp_timeout"):
            if not 1 <= getattr(self, name) <= 1 << 24:
                raise ConfigError(f"{name.replace('_', '-')}: must lie between 1 and {1 << 24} seconds")
        if not 1 <= self.event_rate <= 1_000_000:
            raise ConfigError("event-rate: must lie between 1 and 1000000 events per second")
        if not 0 <= self.flow_history <= 1 << 32:
            raise ConfigError(f"flow-history: must lie between 0 and {1 << 32} bytes")
        if self.flow_log_size < 1 << 16:
            raise ConfigError(f"flow-log-size: must be at least {1 << 16} bytes")
        if not 1 <= self.vxlan_port <= 65535:
            raise ConfigError("vxlan-port: must lie between 1 and 65535")
        if not 1 <= self.vxlan_vni < 1 << 24:
            raise ConfigError(f"vxlan-vni: must lie between 1 and {(1 << 24) - 1}")
        if self.policy_established not in ("cut", "keep"):
            raise ConfigError(f"policy-established: {self.policy_established!r} is neither cut nor keep")
        for name in ("max_services", "max_backends", "max_policy_flows", "max_policy_names", "max_nat"):
            if not 16 <= getattr(self, name) <= 1 << 24 and (name, self.max_nat) != ("max_nat", 0):
                raise ConfigError(f"{name.replace('_', '-')}: must lie between 16 and {1 << 24}")
        return dataclasses.replace(
            self,
            node_name=node_name,
            pod_cidr=pod_cidr,
            node_ip=node_ip,
            non_masquerade=non_masquerade,
            dns_address=dns_address,
        )

    def _dns_address(self) -> tuple[str, ...]:
        """The addresses in force, () for none."""
        if self.dns_address == (NO_DNS,):
            return self.dns_address
        found = _canonical("dns-address", self.dns_address, ipaddress.ip_address)
        for text in found:
            address = ipaddress.ip_address(text)
            if address.is_loopback or address.is_multicast or address.is_unspecified:
                raise ConfigError(f"dns-address: {text} is no address that containers can reach")
            if address.version == 6 and address.is_link_local:
                raise ConfigError(f"dns-address: {text} means another machine on every link; take one of fd00::/8")
        return found

    @property
    def dns_addresses(self) -> tuple[str, ...]:
        """Where names of Services are resolved; () for nowhere."""
        if self.dns_address:
            return () if self.dns_address == (NO_DNS,) else self.dns_address
        alone = self.cni_conf_dir is not None and self.kubeconfig is None
        return DNS_ADDRESSES if alone else ()


def _check_networks(name: str, values: tuple[str, ...], alone: str) -> None:
    """Networks, or the one word `alone`."""
    if values == (alone,):
        return
    for value in values:
        try:
            ipaddress.ip_network(value)
        except ValueError as error:
            hint = f"; {alone!r} stands alone" if value == alone else ""
            raise ConfigError(f"{name}: {error}{hint}") from error


def _refuse_overlaps(name: str, values: tuple[str, ...]) -> None:
    networks = [ipaddress.ip_network(value) for value in values]
    for one, other in itertools.combinations(networks, 2):
        if one.version == other.version and one.overlaps(other):
            raise ConfigError(f"{name}: {one} and {other} overlap")


def split_host_port(text: str) -> tuple[str, int]:
    """("127.0.0.1", 9970) from "127.0.0.1:9970" or "[::1]:9970"; the host may be empty for all addresses."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if (
        not colon
        or not (port.isascii() and port.isdigit())
        or int(port) > 65535
        or any(c in bare for c in "[]")
        or (":" in bare) is not bracketed  # ::1 alone would be the port 1 of nothing
    ):
        raise ConfigError(f"metrics-address: {text!r} is not HOST:PORT")
    return bare, int(port)


def _canonical(
    name: str, values: tuple[str, ...], parse: Callable[[str], Any], *, many: bool = False
) -> tuple[str, ...]:
    try:
        parsed = [parse(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    for value in values:
        if "%" in value:
            raise ConfigError(f"{name}: {value!r} has a scope, which means nothing on other nodes")
    if not many and len({item.version for item in parsed}) != len(parsed):
        raise ConfigError(f"{name}: more than one value of the same address family: {', '.join(values)}")
    return tuple(str(item) for item in parsed)


def load_config(file: Path | None, flags: Mapping[str, Any]) -> AgentConfig:
    """Settings from `file` (YAML) overlaid with `flags` (None = not given). Raises ConfigError."""
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read_file(file))
    values.update({name: value for name, value in flags.items() if value is not None and value != ()})
    return AgentConfig(**{name: _coerce(name, value) for name, value in values.items()}).validated()


def _read_file(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"config: cannot read {file}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"config: {file} is not valid YAML: {line}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no text, or a date that there is not
        raise ConfigError(f"config: {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"config: {file} must hold a mapping of settings")
    return _by_field(document, f"config: {file}")


def _by_field(document: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Settings by the names of their fields."""
    known = {f.name.replace("_", "-"): f.name for f in dataclasses.fields(AgentConfig)}
    for key in document:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown setting {key!r}{hint}")
    return {known[key]: value for key, value in document.items()}


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Settings as a configuration file has them, from "forwarding=dsr" and the like. Raises ConfigError."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r} is not SETTING=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: {value!r} is not valid YAML") from error
    load_config(None, _by_field(found, "settings"))
    return found


def _coerce(name: str, value: Any) -> Any:
    kind = typing.get_type_hints(AgentConfig)[name]
    label = name.replace("_", "-")
    if kind in (Path, Path | None):
        if value is None and kind != Path:
            return None
        if not isinstance(value, (str, Path)) or not str(value):
            raise ConfigError(f"{label}: must be a path, not {value!r}")
        if name == "kubeconfig" and str(value) == "in-cluster":
            return Path(value)
        return Path(value).absolute()
    if kind == tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{label}: must be a list of strings, not {value!r}")
        return tuple(item.strip() for item in items if item.strip())
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{label}: must be true or false, not {value!r}")
    if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError(f"{label}: must be a number, not {value!r}")
    if value is False and name in _MAY_BE_OFF:
        return "off"
    if kind is str:
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ConfigError(f"{label}: must be a string, not {value!r}")
        return str(value)  # a node may be called 17
    return value
