"""List and watch of one Kubernetes resource into the store, for ever.

The loop: list in chunks → hand the complete list to the store → watch from its resourceVersion → when the connection
ends, watch again from the last version seen. A new list is needed only where the API cannot say what happened since:
410 Gone, or a history that went backwards (etcd restored from a backup).

An optional resource may be missing: that the API does not know it is an answer too, and means that there are none.

Invariants:
- Nothing is deleted from the store by a failure. Only a DELETED event or a complete newer list removes an object, or an
  optional resource that is missing twice: an apiserver that has just started may not know all of its resources yet.
- An object that does not fit the types is refused on its own; what the store knew of it before stays.
- Every failure is retried: with exponential backoff up to `Timing.backoff_most`, jittered so that the nodes of a
  cluster do not come back in step, and never earlier than a Retry-After asked for.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from waggle.errors import ApiError, ApiSilent, ApiUnreachable, WaggleError
from waggle.model.objects import Object, ObjectKey
from waggle.sources.apiserver import ApiServer
from waggle.sources.collector import paused_collector
from waggle.sources.problem import Problem, ProblemSet
from waggle.sources.wire import Event, Refused, Wire
from waggle.store.store import API, Store

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Object)

ORIGIN = API


@dataclass(frozen=True, slots=True)
class Timing:
    """Sizes and times (seconds) of the list and watch protocol."""

    chunk: int = 500  # objects per answer; what the other clients of Kubernetes use
    watch_least: float = 300.0  # a watch is ended by the server after a random time between these two
    watch_most: float = 600.0
    # Without a byte on a watch. Bookmarks come about every minute, but not of a resource that had no event since the
    # server started: such a watch is opened again and again.
    idle: float = 150.0
    backoff_least: float = 0.25
    backoff_most: float = 15.0
    healthy: float = 10.0  # a watch that lasted this long starts the backoff anew
    retry_after_most: float = 120.0  # a server that asks for more is asked again after this
    absent: float = 60.0  # between two looks for an optional resource: it may come with an upgrade, or be installed
    unwanted: float = 60.0  # what nobody needs any more is followed for so long: the next one may need it again


@dataclass(frozen=True, slots=True)
class Resource(Generic[T]):
    """What to list and watch, and the names that an RBAC rule gives it."""

    kind: type[T]
    group: str  # API group, "" for the core
    plural: str
    path: str
    selectors: Mapping[str, str] = field(default_factory=dict)  # fieldSelector, labelSelector
    optional: bool = False  # an API server without it is no problem, and nothing waits for its first list
    earlier: tuple[str, ...] = ()  # paths of versions that say the same, where an API server has no newer one


class Backoff:
    """Delays that double from `least` to `most`, each shortened by up to half at random."""

    def __init__(self, least: float, most: float) -> None:
        self._least, self._most, self._next = least, most, least

    def reset(self) -> None:
        self._next = self._least

    def delay(self) -> float:
        """The next delay in seconds."""
        delay, self._next = self._next, min(self._next * 2, self._most)
        return delay * random.uniform(0.5, 1.0)


class Informer(Generic[T]):
    """Keeps the store in step with one resource. `synced` is set when its first complete list is in the store,
    `answered` with it, or when the API has said that it has no such resource."""

    def __init__(
        self, api: ApiServer, store: Store, resource: Resource[T], problems: ProblemSet, timing: Timing | None = None
    ) -> None:
        self.synced = asyncio.Event()
        self.answered = asyncio.Event()
        self.lists = 0  # complete lists, watches that opened, events: for metrics
        self.watches = 0
        self.events = 0
        self._api = api
        self._store = store
        self._resource = resource
        self._problems = problems
        self._timing = timing or Timing()
        self._wire: Wire[T] = Wire(resource.kind)
        self._kind = resource.kind.__name__
        rows: Any = store.rows(self._kind)
        self._rows: Mapping[ObjectKey, T] = rows
        self._backoff = Backoff(self._timing.backoff_least, self._timing.backoff_most)
        self._server = ""
        self._version = ""  # where the next watch starts; "" = a list is needed first
        self._broken = False  # the last watch ended badly: the server may not be the one it was
        self._away = False  # the last attempt got no answer at all
        self._refused: dict[ObjectKey, str] = {}
        self._delay = 0.0  # before the next attempt
        self._list_unproven = False  # no watch from the last list's version was accepted yet
        self._missing = False  # the API said so, and nothing else since
        self._paths = (resource.path, *resource.earlier)
        self._path = resource.path
        self._unknown = 0  # paths in a row that the API does not know

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._delay, answers = 0.0, self._api.answers
            try:
                if self._server != (server := self._api.current_server()):
                    self._server, self._version = server, ""  # versions of another cluster mean nothing
                if self._broken and self._version:
                    await self._check_history()
                if not self._version:
                    await self._list()
                await self._watch()
            except WaggleError as error:  # besides the API's own: kubeconfig, network namespace
                self._broken = True
                failure = error if isinstance(error, ApiError) else ApiError(str(error))
                if self._away and failure.status in (401, 403):
                    # A server that has just started refuses what it grants a moment later, when it has read its
                    # rules. How long it was away says nothing about that.
                    self._backoff.reset()
                self._away = isinstance(failure, ApiUnreachable)
                self._failed(failure)
                if isinstance(failure, ApiUnreachable):  # an answer to anybody ends the wait
                    came_back = await self._api.wait(self._delay, answers)
                    self._delay = random.uniform(0.0, self._timing.backoff_least) if came_back else 0.0
            await asyncio.sleep(self._delay)

    # -- list ---------------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        objects: list[T] = []
        refused: list[Refused] = []
        limit, token, version = self._timing.chunk, "", ""
        with paused_collector(freeze=not self.synced.is_set()):
            while True:
                parameters = {**self._resource.selectors, "limit": str(limit)}
                if token:
                    parameters["continue"] = token
                try:
                    page = self._wire.decode_list(await self._api.get(self._path, parameters))
                except ApiError as error:
                    if error.status != 410 or not token:
                        raise
                    # etcd compacted the version this list was reading: once more, in fewer and larger chunks, so
                    # that a list which is too slow for its server ends all the same.
                    log.info("list of %s expired after %d objects; starting again", self._name, len(objects))
                    limit, token = limit * 4, ""
                    objects.clear()
                    refused.clear()
                    continue
                objects += [self._known(obj) for obj in page.objects]
                refused += page.refused
                token, version = page.token, page.version
                if not token:
                    break
            if not version:
                raise ApiError("the API's list has no metadata.resourceVersion")
            self._refused = {refusal.key: refusal.reason for refusal in refused}
            kept = [old for key in self._refused if (old := self._mine(key)) is not None]
            self._store.replace(self._kind, [*objects, *kept], ORIGIN)
        self._version, self._broken = version, False
        self._list_unproven = True
        self.lists += 1
        self._works()
        self._report_refused()
        self._missing, self._unknown = False, 0
        self.synced.set()
        self.answered.set()
        log.info("listed %d %s at version %s", len(objects), self._name, version)

    def _known(self, obj: T) -> T:
        """The stored object if it is equal: a second list then costs no memory while it comes in."""
        old = self._rows.get(obj.key)
        return old if old == obj else obj

    def _mine(self, key: ObjectKey) -> T | None:
        return self._rows.get(key) if self._store.owner(self._kind, key) == ORIGIN else None

    async def _check_history(self) -> None:
        """After a connection broke: does the server still know the version we watched up to?

        A watch from a version the server has not reached yet answers nothing at all until it has, so a restored
        etcd would be followed late, and wrongly. One object, listed, tells the server's version.
        """
        parameters = {**self._resource.selectors, "limit": "1"}
        page = self._wire.decode_list(await self._api.get(self._path, parameters))
        if _older(page.version, self._version):
            log.warning("%s: the API went back from version %s to %s", self._name, self._version, page.version)
            self._version = ""
        self._broken = False

    # -- watch --------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """One watch. Returns at its end, with `_delay` set; raises ApiError where it did not even start."""
        timing = self._timing
        seconds = random.uniform(timing.watch_least, timing.watch_most)
        parameters = {
            **self._resource.selectors,
            "watch": "true",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, round(seconds))),
        }
        loop = asyncio.get_running_loop()
        started: float | None = None
        holds: asyncio.TimerHandle | None = None
        try:
            async with self._api.lines(self._path, parameters, timing.idle) as lines:
                started = loop.time()
                self._missing, self._unknown = False, 0
                # a watch may be silent for long: that it holds is enough to say that it works
                holds = loop.call_later(timing.healthy, self._problems.clear, self._scope("watch"))
                self.watches += 1
                self._problems.clear(self._scope("reach"))
                # the server ends the watch; the limit is for one that forgets to, but goes on sending bookmarks
                async with asyncio.timeout(seconds + timing.idle):
                    async for line in lines:
                        self._apply(self._wire.decode_event(line))
        except ApiError as error:
            if started is None:
                raise
            self._ended_badly(error, loop.time() - started)
            return
        except TimeoutError:
            log.info("watch of %s: the server did not end it in time", self._name)
            self._broken = True
        finally:
            if holds is not None:
                holds.cancel()
        self._list_unproven = False
        lasted = loop.time() - (started or loop.time())
        if lasted >= min(timing.healthy, timing.watch_least):
            self._backoff.reset()
        else:
            self._delay = self._backoff.delay()
        log.debug("watch of %s ended after %.1f s at version %s", self._name, lasted, self._version)

    def _ended_badly(self, error: ApiError, lasted: float) -> None:
        self._broken = True
        if error.status != 410:
            self._list_unproven = False
        if lasted >= self._timing.healthy:
            self._backoff.reset()
            if error.status == 0:
                # connections end; only what goes on is a problem, and the next attempt tells
                level = logging.DEBUG if isinstance(error, ApiSilent) else logging.INFO
                log.log(level, "watch of %s broke after %.0f s: %s", self._name, lasted, error)
                self._delay = self._backoff.delay()
                return
        self._failed(error, "watch")

    def _apply(self, event: Event[T]) -> None:
        self.events += 1
        if event.deleted is None and _older(event.version, self._version):
            raise ApiError(f"the API went back from version {self._version} to {event.version}", 410)
        if event.changed is not None:
            self._forget_refusal(event.changed.key)
            self._store.upsert(event.changed, ORIGIN)
        elif event.deleted is not None:
            self._forget_refusal(event.deleted)
            self._store.delete(self._kind, event.deleted, ORIGIN)
        elif event.refused is not None:
            self._refused[event.refused.key] = event.refused.reason
            self._report_refused()
        if event.version and not _older(event.version, self._version):
            self._version = event.version
        self._list_unproven = False
        self._problems.clear(self._scope("watch"))

    def forget(self) -> None:
        """Takes out of the store all that the API said of this resource."""
        self._store.replace(self._kind, [], ORIGIN)
        self._version = ""
        self._refused = {}
        for part in ("reach", "watch", "objects"):
            self._problems.clear(self._scope(part))

    @property
    def optional(self) -> bool:
        """Whether it may be missing."""
        return self._resource.optional

    # -- what is wrong ------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self._resource.plural

    def _scope(self, part: str) -> str:
        return f"{self._name} ({part})"

    def _failed(self, error: ApiError, part: str = "reach") -> None:
        if error.status == 410:
            log.info("watch of %s: version %s is gone (%s); listing again", self._name, self._version, error)
            self._version = ""
            # What the store has is old, and the API answers: list soon, however long the outage before it was. Only
            # where a list led to no watch at all would that be a storm of lists.
            soon = random.uniform(0.0, self._timing.backoff_least)
            self._delay = self._backoff.delay() if self._list_unproven else soon
            return
        if error.status == 404 and self._unknown < len(self._paths) - 1:
            self._unknown += 1
            self._path = self._paths[(self._paths.index(self._path) + 1) % len(self._paths)]
            self._delay = 0.0
            return
        if error.status == 404 and self._resource.optional:
            self._unknown = 0
            if not self._missing:
                log.info("the API has no %s; looking again every %.0f s", self._name, self._timing.absent)
            self._works()
            self._delay = random.uniform(0.8, 1.2) * self._timing.absent
            if self._missing and self._version:
                self.forget()
            self._missing = True
            self.answered.set()
            return
        self._delay = max(self._backoff.delay(), min(error.retry_after, self._timing.retry_after_most))
        if part == "reach":
            self._problems.clear(self._scope("watch"))  # older news of the same
        self._problems.report(self._scope(part), [Problem(f"Kubernetes {self._name}", self._in_words(error))])

    def _in_words(self, error: ApiError) -> str:
        match error.status:
            case 403:
                group, plural = self._resource.group, self._resource.plural
                rule = f'apiGroups: ["{group}"], resources: ["{plural}"], verbs: ["list", "watch"]'
                return f"the API refuses it (403: {error}); the agent's ClusterRole needs the rule {rule}"
            case 404:
                return f"the API does not know {self._path} (404: {error})"
            case 429:
                return f"the API is overloaded and asks to wait (429: {error})"
            case status if status >= 400 and status != 401:
                return f"the API answers with an error ({status}: {error})"
        return str(error)

    def _works(self) -> None:
        self._problems.clear(self._scope("reach"))
        self._problems.clear(self._scope("watch"))

    def _forget_refusal(self, key: ObjectKey) -> None:
        if self._refused.pop(key, None) is not None:
            self._report_refused()

    def _report_refused(self) -> None:
        found = [Problem(f"{self._kind} {key}", f"is refused: {reason}") for key, reason in self._refused.items()]
        self._problems.report(self._scope("objects"), found)


def _older(version: str, than: str) -> bool:
    """Whether one resourceVersion precedes another. They are decimal numbers by definition since Kubernetes 1.35 and
    in practice always were; any other are not compared."""
    return version.isdecimal() and than.isdecimal() and int(version) < int(than)
