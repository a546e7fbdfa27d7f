"""Settings of the kernel that the agent changes: what they were is written down first, so that they can be put back.

Only what is still as the agent left it is put back: a value that somebody set since then is theirs. A record is good
until the machine starts anew, for its settings start anew as well.

Names are paths below /proc/sys ("net/ipv4/ip_forward"): names of interfaces may contain dots.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from waggle.errors import KernelError

log = logging.getLogger(__name__)

_SYSCTLS = Path("/proc/sys")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FILE = "sysctls.json"
_lock = threading.Lock()  # several of these may share a file

_Records = dict[str, tuple[str, str]]
"""By name: what it was, and what the agent made of it."""


class Sysctls:
    """Of the current network namespace; the record is a file in `state_dir`."""

    def __init__(self, state_dir: Path, root: Path = _SYSCTLS) -> None:
        self._file = state_dir / _FILE
        self._root = root

    def read(self, name: str) -> str | None:
        """The value; None where the kernel has no such setting (a family that is off, an interface that is gone)."""
        try:
            return (self._root / name).read_text().strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KernelError(f"cannot read {_shown(name)}: {error.strerror}", error.errno or 0) from error

    def matching(self, pattern: str) -> list[str]:
        """The names of the settings there are."""
        return sorted(str(path.relative_to(self._root)) for path in self._root.glob(pattern))

    def set(self, name: str, value: str, disturbs: Iterable[str] = ()) -> bool:
        """Gives the setting this value. False where the kernel has no such setting.

        `disturbs`: patterns of other settings that the kernel changes along with this one; they are put back with it.
        Raises KernelError naming the setting.
        """
        with _lock:
            before = self.read(name)
            if before is None or before == value:
                return before is not None
            along = {
                other: self.read(other) for pattern in disturbs for other in self.matching(pattern) if other != name
            }
            records = self._load()
            self._record(records, name, before, value)
            self._save(records)
            try:
                self._write(name, value)
            except FileNotFoundError:
                return False  # the interface has gone meanwhile
            log.info("set %s = %s", _shown(name), value)
            for other, old in along.items():
                new = self.read(other)
                if old is not None and new is not None:  # unchanged ones too: the way back may change them
                    self._record(records, other, old, new)
            if along:
                self._save(records)
            return True

    def restore(self, pattern: str = "*") -> list[str]:
        """Puts back what the agent changed and nobody else has since; the names of what was put back.

        `pattern`: of those names only ("*/rp_filter"). A setting that cannot be written stays in the record, and raises
        KernelError after the others.
        """
        with _lock:
            records = self._load()
            chosen = {name: record for name, record in records.items() if fnmatch(name, pattern)}
            # All are looked at before the first is written: the kernel changes some along with others.
            ours = {name: was for name, (was, left) in chosen.items() if self.read(name) == left}
            failed: dict[str, str] = {}
            for name, was in [*ours.items(), *ours.items()]:  # twice: the last may have changed the first
                try:
                    if name not in failed and self.read(name) != was:
                        self._write(name, was)
                        log.info("set %s = %s, as it was", _shown(name), was)
                except FileNotFoundError:
                    continue
                except KernelError as error:
                    failed[name] = str(error)
            kept = {name: record for name, record in records.items() if name not in chosen}
            kept |= {name: chosen[name] for name in ours if self.read(name) not in (None, ours[name])}
            self._save(kept)
            if failed:
                raise KernelError("; ".join(failed.values()))
            return [name for name, was in ours.items() if chosen[name][1] != was]

    def recorded(self) -> dict[str, str]:
        """What the settings were that the agent has changed."""
        with _lock:
            return {name: was for name, (was, left) in self._load().items() if was != left}

    @staticmethod
    def _record(records: _Records, name: str, before: str, value: str) -> None:
        known = records.get(name)
        # A value that is not the one the agent left was set by somebody: that is what to go back to.
        records[name] = (known[0] if known is not None and known[1] == before else before, value)

    def _write(self, name: str, value: str) -> None:
        try:
            (self._root / name).write_text(value)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise KernelError(f"cannot set {_shown(name)} = {value}: {error.strerror}", error.errno or 0) from error

    def _load(self) -> _Records:
        try:
            document = json.loads(self._file.read_text())
            if document["boot"] != _boot():
                return {}
            return {name: (was, left) for name, (was, left) in document["settings"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning("%s is unreadable: settings that were changed before stay changed", self._file)
            return {}

    def _save(self, records: _Records) -> None:
        present = {name: record for name, record in records.items() if (self._root / name).exists()}
        try:
            if not present:
                self._file.unlink(missing_ok=True)
                return
            scratch = self._file.with_suffix(".tmp")
            scratch.write_text(json.dumps({"boot": _boot(), "settings": present}, indent=1))
            scratch.chmod(0o600)
            scratch.replace(self._file)
        except OSError as error:
            raise KernelError(
                f"cannot write {self._file}: {error.strerror}: no setting is changed that could not be put back",
                error.errno or 0,
            ) from error


def _shown(name: str) -> str:
    return name.replace(".", "\0").replace("/", ".").replace("\0", "/")


def _boot() -> str:
    return _BOOT_ID.read_text().strip()
