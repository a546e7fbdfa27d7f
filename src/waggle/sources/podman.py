"""Podman, asked what its containers are: names, labels, whether they run and are healthy.

A container is locked while it is being put on the network, so that Podman is asked afterwards, never in a CNI request.
Everything is a look at all containers (`podman ps`), begun by news: an interface was made, Podman printed an event.
What the events say does not matter; where they cannot be had, looks come by the clock. What a look tells is recorded
with the interface and stays in force while Podman is gone, slow or prints nonsense.

Podman runs only while there are interfaces that may be its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shlex
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec

from waggle.errors import ApiError, ConfigError, WaggleError
from waggle.model.workload import Workload
from waggle.sources.cni_records import Attachment
from waggle.sources.podman_output import RUNTIME, read_containers, read_pods, workloads
from waggle.sources.problem import Problem, ProblemSet

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
TIMEOUT_SECONDS = 20.0
SETTLE_SECONDS = 0.05  # news come in bursts
RESYNC_SECONDS = 30.0
UNHEARD_SECONDS = 2.0  # between looks while there are no events
OVERLAP_SECONDS = 10.0  # of the past that events begin with
MAX_OUTPUT = 64 << 20
_SUBJECT = "Podman"
_ID = re.compile(r"[0-9a-f]{64}")
_PS = ("ps", "--all", "--no-trunc", "--format", "json")
_PODS = ("pod", "ps", "--no-trunc", "--format", "json")
_EVENTS = ("events", "--stream", "--format", "{{.Status}}", "--filter", "type=container")


def podman_command(setting: str) -> tuple[str, ...]:
    """The command that the setting `podman` asks for; empty: none. Raises ConfigError."""
    if setting == OFF:
        return ()
    try:
        words = tuple(shlex.split(setting)) if setting != AUTO else ("podman",)
    except ValueError as error:
        raise ConfigError(f"podman: {setting!r} is no command: {error}") from error
    if not words:
        raise ConfigError("podman: must be auto, off, or a command such as 'podman --root /srv/containers'")
    return words


class PodmanSource:
    """`attachments` gives the records of interfaces that exist; `learn` takes what Podman says of one, by the name of
    its host side. `command` is how Podman is called; `expected`: that it is missing is worth telling."""

    def __init__(
        self,
        command: Sequence[str],
        attachments: Callable[[], Iterable[Attachment]],
        learn: Callable[[str, Workload], Awaitable[None]],
        *,
        expected: bool = False,
    ) -> None:
        self._command = tuple(command)
        self._attachments = attachments
        self._learn = learn
        self._expected = expected
        self._due = asyncio.Event()
        self._known = asyncio.Event()  # some interface is one of Podman's
        self._hears = False
        self._events: asyncio.subprocess.Process | None = None
        self._problems = ProblemSet(log)

    def notice(self) -> None:
        """Something was put on the network, or taken from it. Of the event loop's thread."""
        self._due.set()

    def problems(self) -> list[Problem]:
        """Why Podman's containers may not be what is known of them."""
        return self._problems.all()

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(), name="podman ps")
            tasks.create_task(self._listen(), name="podman events")

    # -- looks

    async def _follow(self) -> None:
        pause: float | None = None
        failures = 0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), pause)
            await asyncio.sleep(SETTLE_SECONDS)
            self._due.clear()
            records = [one for one in self._attachments() if not one.uid and _ID.fullmatch(one.container_id)]
            if not any(_is_ours(one) for one in records):
                self._rest()
            if not records:
                self._problems.clear("ps")
                pause = None
                continue
            try:
                await self._look(records)
            except (WaggleError, OSError) as error:
                failures = min(failures + 1, 5)
                pause = 2.0**failures / 2
                if self._expected or any(_is_ours(one) for one in records):
                    reason = f"{error}; what was known of containers stays in force"
                    self._problems.report("ps", [Problem(_SUBJECT, reason)])
                else:
                    pause = RESYNC_SECONDS  # nothing says that there is a Podman at all
                continue
            failures = 0
            self._problems.clear("ps")
            pause = UNHEARD_SECONDS if self._known.is_set() and not self._hears else RESYNC_SECONDS

    async def _look(self, records: Sequence[Attachment]) -> None:
        containers = read_containers(await self._output(*_PS))
        pods = read_pods(await self._output(*_PODS)) if any(one.pod for one in containers) else []
        said = workloads(containers, pods)
        for record in records:
            workload = said.get(record.container_id)
            if workload is None and _is_ours(record) and record.workload is not None:
                workload = msgspec.structs.replace(record.workload, ready=False)  # removed, and its DEL never came
            if workload is not None:
                self._known.set()
                await self._learn(record.host_ifname, workload)

    async def _output(self, *arguments: str) -> bytes:
        """What Podman prints. ApiError when it cannot, does not end in time, or prints without end."""
        what = " ".join((*self._command, *arguments[:2]))
        process = await self._start(*arguments)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                output, errors = await asyncio.gather(_read(process.stdout, what), _read(process.stderr, what))
                code = await process.wait()
        except TimeoutError as error:
            raise ApiError(f"{what} did not end within {TIMEOUT_SECONDS:g} s") from error
        finally:
            await _end(process)
        if code != 0:
            lines = errors.decode(errors="replace").strip().splitlines()
            raise ApiError(f"{what} failed: {lines[-1][:300] if lines else f'exit status {code}'}")
        return output

    async def _start(self, *arguments: str) -> asyncio.subprocess.Process:
        if shutil.which(self._command[0]) is None:
            raise ApiError(f"there is no {self._command[0]} here")
        # an agent that is killed must not leave a Podman that waits for events for ever
        leash = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *leash, *self._command, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )

    # -- news

    async def _listen(self) -> None:
        failures = 0
        while True:
            await self._known.wait()
            begin = time.monotonic()
            reason = "podman events ended"
            try:
                reason = await self._hear()
            except (WaggleError, OSError) as error:
                reason = str(error)
            finally:
                self._hears = False
            if not self._known.is_set():
                self._problems.clear("events")
                failures = 0
                continue
            failures = 0 if time.monotonic() - begin > RESYNC_SECONDS else min(failures + 1, 5)
            if failures > 1:
                told = f"{reason}; asking every {UNHEARD_SECONDS:g} s instead"
                self._problems.report("events", [Problem(_SUBJECT, told)])
            self._due.set()
            await asyncio.sleep(2.0**failures / 2)

    async def _hear(self) -> str:
        """Until Podman's events end: why they did. What happened while it started is among them."""
        since = str(int(time.time() - OVERLAP_SECONDS))
        self._events = process = await self._start(*_EVENTS, "--since", since)
        assert process.stdout is not None and process.stderr is not None
        errors = asyncio.create_task(_read(process.stderr, "podman events"))
        try:
            self._hears = True
            while chunk := await process.stdout.read(65536):
                if chunk.strip():
                    self._problems.clear("events")
                    self._due.set()
            await process.wait()
            lines = (await errors).decode(errors="replace").strip().splitlines()
            return f"podman events ended: {lines[-1][:300] if lines else f'exit status {process.returncode}'}"
        finally:
            self._events = None
            errors.cancel()
            await _end(process)

    def _rest(self) -> None:
        """No interface is one of Podman's: nothing to hear."""
        self._known.clear()
        if self._events is not None and self._events.returncode is None:
            self._events.kill()


def _is_ours(record: Attachment) -> bool:
    return record.workload is not None and record.workload.runtime == RUNTIME


async def _read(stream: asyncio.StreamReader | None, what: str) -> bytes:
    assert stream is not None
    parts = bytearray()
    while chunk := await stream.read(1 << 16):
        parts += chunk
        if len(parts) > MAX_OUTPUT:
            raise ApiError(f"{what} prints more than {MAX_OUTPUT >> 20} MiB")
    return bytes(parts)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
