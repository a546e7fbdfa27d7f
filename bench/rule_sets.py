"""The modes of kube-proxy that waggle is compared with: what each loads, with which command, and whether it can."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import iptables_rules, nftables_rules
from bench.leftovers import PREFIX, delete_netns
from bench.places import BenchError, checked
from bench.service_ports import Endpoint, ServicePort

POD_CIDR, SERVICE_CIDR = "10.244.0.0/16", "10.96.0.0/12"
#: Services per transaction of nft where a table is filled to be measured; the table that comes of it is the same.
#: How long a single transaction takes, as kube-proxy makes it, is what `peer_sync` measures.
_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Load:
    """A command that loads rules, and its standard input."""

    command: Sequence[str]
    text: str


class RuleSet(ABC):
    """One mode. `command` is what kube-proxy runs for a sync."""

    name: str
    title: str
    command: Sequence[str]

    def base(self) -> str:
        """What kube-proxy makes by other means before its first sync, as input of `command`; empty for nothing."""
        return ""

    @abstractmethod
    def full(self, ports: Sequence[ServicePort]) -> str:
        """A sync that writes everything."""

    @abstractmethod
    def partial(self, ports: Sequence[ServicePort], changed: Mapping[int, ServicePort]) -> str:
        """A sync after the ports at these indices have changed into the ones given."""

    @abstractmethod
    def loads(self, ports: Sequence[ServicePort], added: Sequence[ServicePort]) -> list[Load]:
        """How a namespace gets `ports`, of which it has all but `added`, in order."""

    def missing(self) -> str:
        """Why it cannot be measured on this machine; empty when it can."""
        if shutil.which(self.command[0]) is None:
            return f"{self.command[0]} is not installed"
        name = f"{PREFIX}-probe"
        probe = ServicePort("bench", "probe", "p", "TCP", "10.96.0.1", 80, [Endpoint("10.244.1.1", 80, True)], 30000)
        checked(["ip", "netns", "add", name])
        try:
            for load in self.loads([probe], [probe]):
                checked(["ip", "netns", "exec", name, *load.command], stdin=load.text)
        except BenchError as error:
            return f"not in this kernel ({str(error).splitlines()[0]})"
        finally:
            delete_netns(name)
        return ""


class IptablesRules(RuleSet):
    """`variant`: legacy, or nft for the commands that translate to nf_tables."""

    def __init__(self, variant: str) -> None:
        self.name = f"iptables-{variant}"
        self.title = f"kube-proxy's iptables rules ({variant})"
        self.command = (f"iptables-{variant}-restore", "-w", "5", "--noflush", "--counters")

    def base(self) -> str:
        return iptables_rules.jumps()

    def full(self, ports: Sequence[ServicePort]) -> str:
        return iptables_rules.sync(ports, POD_CIDR)

    def partial(self, ports: Sequence[ServicePort], changed: Mapping[int, ServicePort]) -> str:
        now = [changed.get(index, port) for index, port in enumerate(ports)]
        return iptables_rules.sync(now, POD_CIDR, {str(port) for port in changed.values()})

    def loads(self, ports: Sequence[ServicePort], added: Sequence[ServicePort]) -> list[Load]:
        first = [Load(self.command, self.base())] if len(added) == len(ports) else []
        return [*first, Load(self.command, self.full(ports))]


class NftablesRules(RuleSet):
    name = "nftables"
    title = "kube-proxy's nftables rules"
    command = ("nft", "-f", "-")

    def full(self, ports: Sequence[ServicePort]) -> str:
        return nftables_rules.full_sync(ports, POD_CIDR, SERVICE_CIDR)

    def partial(self, ports: Sequence[ServicePort], changed: Mapping[int, ServicePort]) -> str:
        return nftables_rules.partial_sync(changed.values())

    def loads(self, ports: Sequence[ServicePort], added: Sequence[ServicePort]) -> list[Load]:
        texts = [nftables_rules.setup(POD_CIDR, SERVICE_CIDR)] if len(added) == len(ports) else []
        texts += [nftables_rules.added(added[at : at + _CHUNK]) for at in range(0, len(added), _CHUNK)]
        return [Load(self.command, text) for text in texts]


#: By name. The legacy variant of iptables is measured unless another is asked for: it loads faster by far, and its
#: rules are no slower.
RULE_SETS: dict[str, RuleSet] = {
    each.name: each for each in (IptablesRules("legacy"), IptablesRules("nft"), NftablesRules())
}


def load_environment(folder: Path) -> dict[str, str]:
    """For commands that load rules: iptables' lock is one per machine, and here every namespace stands for one."""
    return {**os.environ, "XTABLES_LOCKFILE": str(folder / "xtables.lock")}


def ipvs_missing() -> str:
    """Why kube-proxy's third mode, IPVS, is not among the peers."""
    if Path("/proc/net/ip_vs").exists():
        return "this kernel has it; it is not generated here, since kube-proxy has deprecated the mode"
    return "not in this kernel"
