"""Every exception waggle raises on purpose.

    WaggleError
    ├── ConfigError          a setting is missing or wrong; names the setting
    ├── ObjectError          a Kubernetes object or manifest is refused; carries file, line, reason
    ├── KernelError          bpf(2), netlink or cgroup said no; carries errno where there is one
    │   ├── LoadError        a BPF object did not load; carries the verifier's log and a one-line summary
    │   ├── MissingFeature   the kernel or the machine lacks something waggle needs
    │   ├── NotFound         a map key, interface, pin or route does not exist
    │   └── TableFull        a map has no room for what the plan needs
    ├── ApiError             the Kubernetes API or the agent's socket answered with an error
    │   └── ApiUnreachable   nobody answered at all
    ├── AlreadyRunning       another agent owns this node
    ├── NotReady             the agent does not know yet what it is asked about
    ├── CniError             a CNI request failed; carries the spec's code
    └── LabError             the lab could not do what was asked

Third-party exceptions are translated once, at the edge where they appear, with `raise … from`.
"""

from __future__ import annotations


class WaggleError(Exception):
    """Base of all errors that are shown to a user as one line, without a traceback."""


class ConfigError(WaggleError):
    """A setting is missing or wrong."""


class ObjectError(WaggleError):
    """A Kubernetes object is refused.

    `file` and `line` (1-based) say where it came from; both are None for an object of the API.
    """

    def __init__(self, reason: str, *, file: str | None = None, line: int | None = None, subject: str = "") -> None:
        self.reason = reason
        self.file = file
        self.line = line
        self.subject = subject
        where = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        what = f"{subject}: " if subject else ""
        super().__init__(f"{where}{what}{reason}")


class KernelError(WaggleError):
    """A system call towards the kernel failed. `errno` is 0 where the kernel gave none."""

    def __init__(self, message: str, errno: int = 0) -> None:
        self.errno = errno
        super().__init__(message)


class LoadError(KernelError):
    """A BPF object or program did not load. `log` is the verifier's or libbpf's whole log."""

    def __init__(self, message: str, errno: int = 0, log: str = "") -> None:
        self.log = log
        super().__init__(message, errno)


class MissingFeature(KernelError):
    """The machine lacks something waggle needs; the message says what and how to get it."""


class NotFound(KernelError):
    """A map key, interface, pin or route does not exist."""


class TableFull(KernelError):
    """A map has no room left for what the plan needs."""


class ApiError(WaggleError):
    """An HTTP API answered with an error.

    `status` is the HTTP status, 0 when there was no answer; `retry_after` the seconds the server asked to wait, or 0.
    """

    def __init__(self, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        self.status = status
        self.retry_after = retry_after
        super().__init__(message)


class ApiUnreachable(ApiError):
    """An HTTP API gave no answer: the connection failed, or ended before the status line."""


class ApiSilent(ApiError):
    """An HTTP API that had begun to answer sent nothing for longer than one waits."""


class AlreadyRunning(WaggleError):
    """Another agent owns this node."""


class NotReady(WaggleError):
    """The agent does not know yet what it is asked about: its sources have not given their first full view."""


class CniError(WaggleError):
    """A CNI request failed. `code` is the spec's error code (CNI 1.1.0, section 5 "Error")."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        self.code = code
        self.details = details
        super().__init__(message)


class LabError(WaggleError):
    """The lab could not do what was asked."""
