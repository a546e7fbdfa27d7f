"""Putting waggle on a machine as a service, and taking it away again.

What was written, and which directories were made for it, stands in a record: only that is removed, and a file that
somebody changed is theirs. `root` is another machine's root directory (an image that is being made): then nothing of
this machine is started, stopped or cleaned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from waggle.config import AgentConfig, load_config
from waggle.errors import ConfigError, KernelError
from waggle.install import files
from waggle.install.files import File
from waggle.reconcile.cleanup import clean_node
from waggle.sources.cni_install import installed

log = logging.getLogger(__name__)

RECORD = files.ETC / "installed.json"
Done = list[tuple[str, str]]


class Installation:
    """Of the machine whose root directory is `root`. With `dry_run`, methods only say what they would do."""

    def __init__(self, root: Path = Path("/"), *, dry_run: bool = False) -> None:
        self._root = root
        self._dry_run = dry_run
        self._done: Done = []
        self._files: dict[str, str] = {}  # path → digest of what was written
        self._directories: list[str] = []
        self._made: set[Path] = set()

    @property
    def here(self) -> bool:
        """Whether it is the machine that this runs on."""
        return self._root == Path("/")

    @property
    def systemd(self) -> bool:
        """Whether systemd can be told."""
        return self.here and Path("/run/systemd/system").is_dir()

    # -- installing ---------------------------------------------------------------------------------------------

    def install(self, executable: Path, given: Mapping[str, Any], *, start: bool = True) -> Done:
        """(what was done, to what). `given`: settings for agent.yaml; ConfigError where somebody changed that."""
        if not executable.is_file() or not os.access(executable, os.X_OK):
            raise ConfigError(f"executable: {executable} is no program")
        self._load()
        settings, config = self._settings(given)
        for directory in files.directories(config):
            self._make_directory(directory)
        for file in files.files(executable, settings, config):
            if self._at(file.beside).is_dir():
                self._write(file)
        self._enable()
        if self.systemd and start:
            self._run("start", "systemctl", "daemon-reload")
            self._run("start", "systemctl", "restart", files.UNIT.name)
        return self._done

    def _settings(self, given: Mapping[str, Any]) -> tuple[Mapping[str, Any], AgentConfig]:
        present = self._at(files.SETTINGS)
        if present.exists():
            if given and self._changed(files.SETTINGS):
                raise ConfigError(f"{files.SETTINGS} was changed by hand: set {', '.join(given)} there")
            known = yaml.safe_load(present.read_text()) or {}
            config = load_config(present, {})  # says what is wrong with it
            if not given:
                return known, config
            settings = {**known, **given}
        else:
            settings = {**files.DEFAULTS, **given}
        return settings, load_config(None, {name.replace("-", "_"): value for name, value in settings.items()})

    def _make_directory(self, path: Path) -> None:
        missing = [one for one in (path, *path.parents) if not self._at(one).exists() and one not in self._made]
        for one in reversed(missing):
            self._do("make directory", one, lambda one=one: self._at(one).mkdir(mode=0o755))  # type: ignore[misc]
            self._made.add(one)
            if str(one) not in self._directories:
                self._directories.append(str(one))
            self._save()

    def _write(self, file: File) -> None:
        target = self._at(file.path)
        self._make_directory(file.path.parent)
        if target.exists():
            if file.keep and self._changed(file.path):
                self._done.append(("keep", f"{file.path}, which was changed"))
                return
            if str(file.path) not in self._files and target.read_text() != file.text:
                raise ConfigError(f"{file.path} is there already and was not written by waggle: move it away")
            if target.read_text() == file.text:
                self._files.setdefault(str(file.path), _digest(file.text))
                self._save()
                return
        self._do("write", file.path, lambda: _replace(target, file.text, file.mode))
        self._files[str(file.path)] = _digest(file.text)
        self._save()

    def _enable(self) -> None:
        link = self._at(files.WANTED)
        self._make_directory(files.WANTED.parent)
        if not link.is_symlink():
            self._do("enable", files.UNIT.name, lambda: link.symlink_to(f"../{files.UNIT.name}"))

    # -- uninstalling -------------------------------------------------------------------------------------------

    def uninstall(self, *, purge: bool = False) -> Done:
        """(what was done, to what): the service stopped, the node cleaned, what was written removed.

        What somebody changed is kept, unless `purge`.
        """
        self._load()
        config = self._configured() if self.here else AgentConfig()
        if self.systemd and self._at(files.UNIT).exists():
            self._run("stop", "systemctl", "stop", files.UNIT.name)
        if self.here:
            cni = installed(
                config.cni_bin_dir or Path("/opt/cni/bin"),
                config.cni_conf_dir or Path("/etc/cni/net.d"),
                config.api_socket,
            )
            removed = clean_node(config.bpf_root, config.state_dir, config.api_socket, cni, dry_run=self._dry_run)
            self._done += [("remove", f"{kind} {name}") for kind, name in removed]
            run = config.api_socket.parent  # made by systemd or by the agent
            if run == Path("/run/waggle") and run.is_dir() and not self._dry_run:
                self._remove_directory(run)
        if self._at(files.WANTED).is_symlink():
            self._do("disable", files.UNIT.name, self._at(files.WANTED).unlink)
        for name in self._files:
            path = Path(name)
            if self._at(path).exists():
                if self._changed(path) and not purge:
                    self._done.append(("keep", f"{path}, which was changed"))
                else:
                    self._do("remove", path, self._at(path).unlink)
        if purge and self._at(files.ETC).is_dir():
            self._do("remove", files.ETC, lambda: shutil.rmtree(self._at(files.ETC)))
        if not self._dry_run:
            self._at(RECORD).unlink(missing_ok=True)
        for directory in reversed(self._directories):
            self._remove_directory(Path(directory))
        if self.systemd:
            self._run("reload", "systemctl", "daemon-reload")
        return self._done

    def _configured(self) -> AgentConfig:
        present = self._at(files.SETTINGS)
        return load_config(present if present.exists() else None, {})

    def _remove_directory(self, path: Path) -> None:
        target = self._at(path)
        if not target.is_dir():
            return
        if not self._dry_run and any(target.iterdir()):
            self._done.append(("keep", f"{path}, which is not empty"))
            return
        self._do("remove", path, target.rmdir)

    # -- how ----------------------------------------------------------------------------------------------------

    def _at(self, path: Path) -> Path:
        return self._root / path.relative_to("/")

    def _do(self, what: str, name: object, action: Callable[[], object]) -> None:
        if not self._dry_run:
            try:
                action()
            except OSError as error:
                raise KernelError(f"cannot {what} {name}: {error.strerror}", error.errno or 0) from error
        self._done.append((what, str(name)))

    def _run(self, what: str, *command: str) -> None:
        shown = " ".join(command)
        if not self._dry_run:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                hint = f"; see journalctl -u {files.UNIT.name}" if what == "start" else ""
                raise KernelError(f"{shown}: {done.stderr.strip() or f'exit status {done.returncode}'}{hint}")
        self._done.append(("run", shown))

    def _changed(self, path: Path) -> bool:
        return self._files.get(str(path)) != _digest(self._at(path).read_text())

    def _load(self) -> None:
        try:
            document = json.loads(self._at(RECORD).read_text())
            self._files, self._directories = dict(document["files"]), list(document["directories"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{RECORD} is unreadable: {error}") from error

    def _save(self) -> None:
        target = self._at(RECORD)
        if self._dry_run or not target.parent.is_dir():
            return
        document = {"files": self._files, "directories": self._directories}
        _replace(target, json.dumps(document, indent=1) + "\n", 0o600)


def _replace(target: Path, text: str, mode: int) -> None:
    scratch = target.with_name(f".{target.name}.tmp")
    scratch.write_text(text)
    scratch.chmod(mode)
    scratch.replace(target)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
