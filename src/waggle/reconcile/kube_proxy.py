"""kube-proxy's rules on this node: told apart from others, written down, removed, put back.

iptables (legacy and nft, IPv4 and IPv6) and the tables of its nftables mode. Established flows need none of the rules,
but the hooks by which conntrack translates packets: iptables leaves them with its built-in chains; where a whole table
goes, a table without rules of our own keeps them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from waggle.errors import KernelError, MissingFeature

_RECORD = "kube-proxy-rules.json"
_VARIANTS = tuple(f"{tool}-{variant}" for variant in ("legacy", "nft") for tool in ("iptables", "ip6tables"))
_NFT_TABLES = ("ip kube-proxy", "ip6 kube-proxy")
_KEPT = "waggle-takeover"
# Its own; the kubelet's (KUBE-FIREWALL, KUBE-KUBELET-CANARY) are none of them.
_CHAIN = re.compile(
    r"KUBE-(SERVICES|EXTERNAL-SERVICES|NODEPORTS|POSTROUTING|FORWARD|PROXY-FIREWALL|PROXY-CANARY|MARK-MASQ|LOAD-BALANCER"
    r"|(SVC|SVL|SEP|EXT|FW|XLB)-[A-Z0-9]+)"
)


@dataclass(frozen=True, slots=True)
class TableRules:
    """kube-proxy's part of one iptables table: its chains, its rules there, and the jumps from built-in chains."""

    table: str
    chains: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    jumps: list[str] = field(default_factory=list)  # "PREROUTING -m comment … -j KUBE-SERVICES", in their order


def parse(saved: str) -> list[TableRules]:
    """kube-proxy's part of what iptables-save prints."""
    found: list[TableRules] = []
    for line in saved.splitlines():
        if line.startswith("*"):
            found.append(TableRules(line[1:].strip()))
        elif line.startswith(":") and _CHAIN.fullmatch(line[1:].split()[0]):
            found[-1].chains.append(line[1:].split()[0])
        elif line.startswith("-A "):
            chain = line.split()[1]
            target = re.search(r" -[jg] (\S+)", line)
            if _CHAIN.fullmatch(chain):
                found[-1].rules.append(line)
            elif target and _CHAIN.fullmatch(target[1]):
                found[-1].jumps.append(line.removeprefix("-A "))
    return [table for table in found if table.chains or table.jumps]


def removal(tables: list[TableRules]) -> str:
    """What takes it away, for iptables-restore --noflush: each table in one step."""
    lines: list[str] = []
    for table in tables:
        lines += [f"*{table.table}", *(f":{chain} - [0:0]" for chain in table.chains)]
        lines += [f"-D {jump}" for jump in table.jumps]
        lines += [f"-X {chain}" for chain in table.chains]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def restoration(tables: list[TableRules]) -> str:
    """What puts it back: the jumps first in their chains, where kube-proxy puts them."""
    lines: list[str] = []
    for table in tables:
        lines += [f"*{table.table}", *(f":{chain} - [0:0]" for chain in table.chains), *table.rules]
        lines += [f"-I {jump}" for jump in reversed(table.jumps)]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


class KubeProxyRules:
    """Those of the current network namespace; `state_dir` holds what was removed."""

    def __init__(self, state_dir: Path) -> None:
        self._record = state_dir / _RECORD

    def remove(self, *, dry_run: bool = False) -> list[str]:
        """Writes the rules down, then removes them. What was removed, in words; nothing where there are none.

        MissingFeature where no tool is there to look with, KernelError where one fails.
        """
        if not shutil.which("nft") and not any(shutil.which(f"{tool}-save") for tool in _VARIANTS):
            raise MissingFeature(
                "neither iptables nor nft is here to remove kube-proxy's rules with: apt install iptables"
            )
        saved: dict[str, str] = {}
        for tool in _VARIANTS:
            if shutil.which(f"{tool}-save"):
                text = _run(f"{tool}-save")
                if parse(text):
                    saved[tool] = text
        if shutil.which("nft"):
            for table in _NFT_TABLES:
                text = _run("nft", "--stateless", "list", "table", *table.split(), missing_ok=True)
                if text:
                    saved[f"nft {table}"] = text
        done = [self._describe(what, text) for what, text in saved.items()]
        if dry_run or not saved:
            return done
        if not self._record.exists():  # else what is there now is less than what there was
            scratch = self._record.with_suffix(".tmp")
            scratch.write_text(json.dumps(saved))
            scratch.chmod(0o600)
            scratch.replace(self._record)
        for what, text in saved.items():
            if what.startswith("nft "):
                family, name = what.split()[1:]
                _run("nft", "-f", "-", stdin=_keeper(family) + f"delete table {family} {name}\n")
            else:
                _run(f"{what}-restore", "--noflush", "-w", stdin=removal(parse(text)))
        return done

    def restore(self, *, dry_run: bool = False) -> list[str]:
        """Puts back what `remove` took away. What that was, in words."""
        try:
            saved: dict[str, str] = json.loads(self._record.read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise KernelError(f"cannot read {self._record}: {error}") from error
        if not dry_run:
            for what, text in saved.items():
                if what.startswith("nft "):
                    family, name = what.split()[1:]
                    again = f"add table {family} {name}\ndelete table {family} {name}\n"
                    kept = f"add table {family} {_KEPT}\ndelete table {family} {_KEPT}\n"
                    _run("nft", "-f", "-", stdin=again + text + kept)
                else:
                    present = parse(_run(f"{what}-save"))
                    if any(table.jumps for table in present):
                        _run(f"{what}-restore", "--noflush", "-w", stdin=removal(present))
                    _run(f"{what}-restore", "--noflush", "-w", stdin=restoration(parse(text)))
            self._record.unlink()
        return [self._describe(what, text) for what, text in saved.items()]

    @staticmethod
    def _describe(what: str, text: str) -> str:
        if what.startswith("nft "):
            return f"nftables table {what.removeprefix('nft ')}"
        tables = parse(text)
        return f"{what}: {sum(len(t.chains) for t in tables)} chains, {sum(len(t.jumps) for t in tables)} jumps"


def _keeper(family: str) -> str:
    chains = (("prerouting", -100), ("input", 100), ("output", -100), ("postrouting", 100))
    lines = "".join(f"  chain {hook} {{ type nat hook {hook} priority {level}; }}\n" for hook, level in chains)
    return (
        f'table {family} {_KEPT} {{\n  comment "keeps conntrack translating flows that kube-proxy began"\n{lines}}}\n'
    )


def _run(*command: str, stdin: str = "", missing_ok: bool = False) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        if missing_ok and "No such file" in done.stderr:
            return ""
        raise KernelError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
    return done.stdout
