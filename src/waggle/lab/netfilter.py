"""Evidence that Netfilter had no part in what happened inside a network namespace.

Three things are looked at, each from inside: the rules of nftables, the rules of iptables for both families, and the
number of connections that Netfilter's conntrack follows. What cannot be looked at is reported as not checked.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from waggle.errors import LabError
from waggle.kernel.netns import call_in_netns

_CONNTRACK_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
# Tables of iptables in the namespace of the thread that reads; iptables-nft makes tables of nftables instead.
_TABLE_NAMES = (Path("/proc/thread-self/net/ip_tables_names"), Path("/proc/thread-self/net/ip6_tables_names"))


@dataclass(frozen=True, slots=True)
class NetfilterState:
    """What one namespace holds; None is "not checked"."""

    name: str
    nft_rules: int | None
    iptables_rules: int | None
    conntrack_entries: int | None

    @property
    def is_clean(self) -> bool:
        """Nothing was found. Not having been able to look is no finding."""
        return not (self.nft_rules or self.iptables_rules or self.conntrack_entries)


def inspect(name: str, netns: Path) -> NetfilterState:
    """The state of the namespace at `netns`; `name` is for people."""
    return NetfilterState(
        name=name,
        nft_rules=_nft(netns),
        iptables_rules=_iptables(netns),
        conntrack_entries=call_in_netns(netns, _conntrack),
    )


def _conntrack() -> int | None:
    try:
        return int(_CONNTRACK_COUNT.read_text())
    except FileNotFoundError:  # the kernel has no conntrack, or its module is not loaded
        return None


def _has_iptables() -> bool:
    """Whether there is a table at all. Looked at first: the tool would make the tables that it is to list."""
    return any(names.exists() and names.read_text().split() for names in _TABLE_NAMES)


def _nft(netns: Path) -> int | None:
    """Lines of the ruleset: an untouched namespace has none, not even an empty table."""
    output = _run(netns, "nft", "list", "ruleset")
    return None if output is None else len([line for line in output.splitlines() if line.strip()])


def _iptables(netns: Path) -> int | None:
    if not call_in_netns(netns, _has_iptables):
        return 0
    outputs = [_run(netns, tool) for tool in ("iptables-save", "ip6tables-save")]
    known = [output for output in outputs if output is not None]
    if not known:
        return None
    return sum(line.startswith("-A") for output in known for line in output.splitlines())


def _run(netns: Path, *command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(["nsenter", f"--net={netns}", "--", *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)} in {netns.name}: {' '.join(done.stderr.split())}")
    return done.stdout
