"""Which ports something listens on in a network namespace, read from /proc without connecting to them."""

from __future__ import annotations

from pathlib import Path

from waggle.kernel.netns import call_in_netns

_TCP_LISTEN = "0A"
_UDP_UNCONNECTED = "07"


def listening(netns: Path) -> set[tuple[str, int]]:
    """{("TCP", 80), ("UDP", 53), …}: listening TCP ports and bound, unconnected UDP ports, of both families."""

    def read() -> set[tuple[str, int]]:
        found: set[tuple[str, int]] = set()
        for protocol, state in (("TCP", _TCP_LISTEN), ("UDP", _UDP_UNCONNECTED)):
            for family in ("", "6"):
                # /proc/net would show the namespace of the process, not that of this thread.
                path = Path(f"/proc/thread-self/net/{protocol.lower()}{family}")
                if path.exists():
                    found |= {(protocol, port) for port in _ports(path.read_text(), state)}
        return found

    return call_in_netns(netns, read)


def _ports(table: str, state: str) -> set[int]:
    """Local ports of the rows in that state. Columns (Documentation/networking/proc_net_tcp): sl, local, remote, st."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == state}
