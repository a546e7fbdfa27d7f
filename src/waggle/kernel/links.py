"""BPF links: programs attached to tcx, XDP and cgroup hooks, pinned so that they outlive the agent.

`attach` is idempotent: where a pin exists, the program behind it is replaced with one atomic update, so that no packet
sees a hook without a program. A pin whose interface has gone (the kernel detached it) is removed and made again.
LINK_CREATE on an interface acts in the caller's network namespace.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import struct
from pathlib import Path

from waggle.errors import KernelError, NotFound
from waggle.kernel import maps, syscall
from waggle.kernel.syscall import Fd, attr_of, bpf, bpf_raw


class AttachType(enum.IntEnum):
    """enum bpf_attach_type, the ones waggle uses."""

    CGROUP_INET4_BIND = 8
    CGROUP_INET6_BIND = 9
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47


_BPF_F_BEFORE = 1 << 3
XDP_SKB_MODE = 1 << 1
XDP_DRV_MODE = 1 << 2

# struct bpf_link_info: type, id, prog_id, then per type; tcx and xdp begin with ifindex at offset 16
_LINK_INFO = struct.Struct("=IIIIQ")


def link_create(prog_fd: int, target: int, attach_type: AttachType, *, flags: int = 0, what: str = "") -> Fd:
    """A new link; `target` is an ifindex for tcx and XDP, a cgroup directory's descriptor for cgroup hooks.

    tcx programs are put before those that are there already, so that waggle sees packets first.
    """
    if attach_type in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS):
        # link_create.tcx: relative_fd, pad, expected_revision. BEFORE without a relative object = at the head
        attr = attr_of("IIIIIIQ", prog_fd, target, attach_type, flags | _BPF_F_BEFORE, 0, 0, 0, size=64)
    else:
        attr = attr_of("IIII", prog_fd, target, attach_type, flags, size=64)
    return Fd(bpf(syscall.LINK_CREATE, attr, what or f"attach {attach_type.name.lower()}"))


def link_update(link_fd: int, prog_fd: int, what: str) -> None:
    """Replaces the program of a link, atomically."""
    bpf(syscall.LINK_UPDATE, attr_of("IIII", link_fd, prog_fd, 0, 0, size=32), f"update {what}")


def link_target(link_fd: int) -> int:
    """The ifindex (tcx, XDP; 0 once the interface has gone) or cgroup id of a link."""
    raw = syscall.obj_info(link_fd, 64)
    kind = struct.unpack_from("=I", raw)[0]
    if kind == 3:  # BPF_LINK_TYPE_CGROUP: cgroup_id, attach_type
        return int(struct.unpack_from("=Q", raw, 16)[0])
    return int(struct.unpack_from("=I", raw, 16)[0])


def attach(
    prog_fd: int, target: int, attach_type: AttachType, pin: Path, *, expect: int | None = None, flags: int = 0
) -> bool:
    """Makes the program run at a hook through the link pinned at `pin`. True when a new link was made.

    `expect` is what `link_target` must say of an existing link (for cgroups the cgroup's id, which is the inode of its
    directory; for interfaces the ifindex, the default); a link of another target is replaced.
    """
    what = f"{attach_type.name.lower()} at {pin.name}"
    wanted = target if expect is None else expect
    try:
        with syscall.obj_get(pin) as link:
            if link_target(link.number) == wanted:
                link_update(link.number, prog_fd, what)
                return False
    except NotFound:
        pass  # no pin yet: the ordinary first time
    except KernelError as error:
        # ENOLINK: the kernel detached the link when its interface or cgroup went away; EISDIR: no pin at all
        if error.errno not in (errno.ENOLINK, errno.EINVAL, errno.EISDIR):
            raise
    maps.unpin(pin)
    with link_create(prog_fd, target, attach_type, flags=flags, what=f"attach {what}") as link:
        syscall.obj_pin(link.number, pin)
    return True


def detach(pin: Path) -> bool:
    """Ends a pinned link: the hook is free afterwards, the name too. False where there was nothing."""
    try:
        with syscall.obj_get(pin) as link:
            result, number = bpf_raw(syscall.LINK_DETACH, attr_of("I", link.number, size=16))
            if result < 0 and number not in (errno.EOPNOTSUPP, errno.ENOLINK, errno.EINVAL):
                syscall.raise_errno(number, f"detach {pin.name}")
    except NotFound:
        pass  # no pin, or a symbolic link that leads nowhere
    except KernelError as error:
        if error.errno != errno.EISDIR:
            raise
    return maps.unpin(pin)


def query_programs(target: int, attach_type: AttachType) -> list[tuple[int, str]]:
    """(id, name) of the programs attached at a hook, in the order they run."""
    ids = (ctypes.c_uint32 * 64)()
    attr = attr_of("IIIIQII", target, attach_type, 0, 0, ctypes.addressof(ids), 64, 0, size=64)
    bpf(syscall.PROG_QUERY, attr, f"query {attach_type.name.lower()}")
    count = struct.unpack_from("=I", attr, 24)[0]
    found = []
    for number in ids[:count]:
        try:
            with syscall.prog_fd_by_id(number) as program:
                found.append((number, syscall.prog_info(program.number)[2]))
        except NotFound:
            continue  # detached between the two calls
    return found
