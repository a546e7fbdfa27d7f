"""Who is logged in by SSH, and over which connection a command came."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from waggle.kernel.sockets import Connection, bound_sockets, connections, socket_owners

SSH_PORT = 22
SERVERS = ("sshd", "dropbear")
_VARIABLE = b"SSH_CONNECTION="
_MOST_ANCESTORS = 64


class SshSession(NamedTuple):
    """The connection of a session, as sshd tells its shell."""

    client: str
    client_port: int
    server: str
    port: int

    def is_of(self, connection: Connection) -> bool:
        """Whether it is this connection."""
        return (connection.remote, connection.remote_port, connection.local_port) == (
            self.client,
            self.client_port,
            self.port,
        )


def session_of(pid: int) -> SshSession | None:
    """The SSH session that a process runs in; None for none. The nearest ancestor that knows counts: sudo forgets."""
    for _ in range(_MOST_ANCESTORS):
        if pid <= 1:
            return None
        process = Path("/proc") / str(pid)
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            status = (process / "status").read_text()
        except OSError:
            return None  # it has ended, or is none of ours to see
        for variable in variables:
            if variable.startswith(_VARIABLE) and (found := parse(variable.removeprefix(_VARIABLE).decode())):
                return found
        pid = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
    return None


def parse(text: str) -> SshSession | None:
    """SSH_CONNECTION: address and port of the client, and of the server; None for anything else."""
    parts = text.split()
    if len(parts) != 4 or not (parts[1].isdecimal() and parts[3].isdecimal()):
        return None
    client, server = (part.partition("%")[0].removeprefix("::ffff:") for part in (parts[0], parts[2]))
    return SshSession(client, int(parts[1]), server, int(parts[3]))


def logged_in() -> tuple[set[int], set[str]]:
    """(TCP ports that sshd serves, addresses that are connected to one of them). Raises KernelError."""
    listening = {one.inode: one.port for one in bound_sockets() if one.protocol == "TCP"}
    served = {*listening.values()}
    present = [one for one in connections() if one.local_port in served]
    ports = {SSH_PORT}
    # systemd may listen for it: then only the sessions are sshd's
    sockets = listening | {one.inode: one.local_port for one in present}
    for inode, owner in socket_owners(sockets).items():
        if owner.startswith(SERVERS):
            ports.add(sockets[inode])
    return ports, {one.remote for one in present if one.local_port in ports}
