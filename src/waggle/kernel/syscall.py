"""bpf(2), as thin as it gets: commands, the attribute union as bytes, and errno turned into KernelError.

Attribute layouts follow `union bpf_attr` of include/uapi/linux/bpf.h. All integers are in host byte order, as the
kernel ABI has them. Pointers are passed as addresses of ctypes buffers that live until the call returns.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

from waggle.errors import KernelError, NotFound, TableFull

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_NUMBERS = {"x86_64": 321, "aarch64": 280, "ppc64le": 361, "s390x": 351, "riscv64": 280}
_SYS_BPF = _NUMBERS.get(platform.machine(), 321)

MAP_LOOKUP_ELEM = 1
MAP_UPDATE_ELEM = 2
MAP_DELETE_ELEM = 3
MAP_GET_NEXT_KEY = 4
OBJ_PIN = 6
OBJ_GET = 7
PROG_TEST_RUN = 10
MAP_GET_NEXT_ID = 12
PROG_GET_FD_BY_ID = 13
MAP_GET_FD_BY_ID = 14
OBJ_GET_INFO_BY_FD = 15
PROG_QUERY = 16
MAP_CREATE = 0
MAP_LOOKUP_BATCH = 24
MAP_UPDATE_BATCH = 26
MAP_DELETE_BATCH = 27
LINK_CREATE = 28
LINK_UPDATE = 29
LINK_DETACH = 34
ITER_CREATE = 33

BPF_ANY = 0
BPF_NOEXIST = 1
BPF_EXIST = 2
BPF_F_RDONLY = 1 << 3


class Fd:
    """A file descriptor that closes itself. Not duplicated, not inherited."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def fileno(self) -> int:
        return self.number

    def close(self) -> None:
        if self.number >= 0:
            os.close(self.number)
            self.number = -1

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self.close()
        except (OSError, TypeError, AttributeError):
            # the interpreter is going down, or somebody closed the number: nothing is left to close
            self.number = -1


def raise_errno(number: int, what: str) -> None:
    """Raises the KernelError that fits `number`; `what` names the operation and its object."""
    message = f"{what}: {os.strerror(number)}"
    if number in (errno.EPERM, errno.EACCES) and os.geteuid() != 0:
        message += ": run as root"
    if number in (errno.ENOENT, errno.ENODEV):
        raise NotFound(message, number)
    if number in (errno.E2BIG, errno.ENOSPC):
        raise TableFull(message, number)
    raise KernelError(message, number)


def bpf_raw(command: int, attr: ctypes.Array[ctypes.c_char]) -> tuple[int, int]:
    """(result, errno) of bpf(2); `attr` is written by the kernel where the command says so."""
    result = _libc.syscall(_SYS_BPF, command, attr, len(attr))
    return result, ctypes.get_errno() if result < 0 else 0


def bpf(command: int, attr: ctypes.Array[ctypes.c_char], what: str) -> int:
    """Result of bpf(2) or a KernelError naming `what`."""
    result, number = bpf_raw(command, attr)
    if result < 0:
        raise_errno(number, what)
    return result


def attr_of(layout: str, *values: int, size: int = 0) -> ctypes.Array[ctypes.c_char]:
    """The attribute union: `struct`-packed values (native order, no implicit padding), zero-filled to `size`."""
    packed = struct.pack("=" + layout, *values)
    return ctypes.create_string_buffer(packed, max(size, len(packed)))


def path_buffer(path: str | os.PathLike[str]) -> ctypes.Array[ctypes.c_char]:
    """A NUL-terminated path in memory."""
    return ctypes.create_string_buffer(os.fsencode(path))


def obj_pin(fd: int, path: str | os.PathLike[str]) -> None:
    """Pins an object on bpffs. EEXIST is an error."""
    name = path_buffer(path)
    bpf(OBJ_PIN, attr_of("QII", ctypes.addressof(name), fd, 0), f"pin {path}")


def obj_get(path: str | os.PathLike[str], flags: int = 0) -> Fd:
    """A new descriptor of a pinned object; NotFound when there is none, errno EISDIR for a directory."""
    name = path_buffer(path)
    if os.path.isdir(path):  # noqa: PTH112 - the kernel says EACCES, which sounds as if root could not read it
        raise_errno(errno.EISDIR, f"open {path}")
    return Fd(bpf(OBJ_GET, attr_of("QII", ctypes.addressof(name), 0, flags), f"open {path}"))


def obj_info(fd: int, size: int) -> bytes:
    """The kernel's info structure (bpf_map_info, bpf_prog_info or bpf_link_info), `size` bytes of it."""
    buffer = ctypes.create_string_buffer(size)
    bpf(OBJ_GET_INFO_BY_FD, attr_of("IIQ", fd, size, ctypes.addressof(buffer)), "object info")
    return buffer.raw


def prog_info(fd: int) -> tuple[int, int, str]:
    """(type, id, name) of a program. Layout: struct bpf_prog_info."""
    raw = obj_info(fd, 128)
    kind, number = struct.unpack_from("=II", raw)
    return kind, number, raw[64:80].split(b"\0", 1)[0].decode(errors="replace")


def prog_map_ids(fd: int) -> frozenset[int]:
    """The ids of the maps that a program uses. Layout: struct bpf_prog_info, nr_map_ids at 52, map_ids at 56."""
    most = 64  # the kernel's MAX_USED_MAPS
    ids = (ctypes.c_uint32 * most)()
    buffer = ctypes.create_string_buffer(128)
    struct.pack_into("=IQ", buffer, 52, most, ctypes.addressof(ids))
    bpf(OBJ_GET_INFO_BY_FD, attr_of("IIQ", fd, 128, ctypes.addressof(buffer)), "object info")
    return frozenset(ids[: struct.unpack_from("=I", buffer, 52)[0]])


def link_prog_id(fd: int) -> int:
    """The id of the program a link runs. Layout: struct bpf_link_info {type, id, prog_id}."""
    return int(struct.unpack_from("=III", obj_info(fd, 64))[2])


def prog_fd_by_id(number: int) -> Fd:
    """A descriptor of a loaded program by its id."""
    return Fd(bpf(PROG_GET_FD_BY_ID, attr_of("III", number, 0, 0), f"program {number}"))


def map_fd_by_id(number: int) -> Fd:
    """A descriptor of a map by its id."""
    return Fd(bpf(MAP_GET_FD_BY_ID, attr_of("III", number, 0, 0), f"map {number}"))
