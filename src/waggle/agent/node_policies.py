"""NodePolicies on this node: what is confirmed, what is on trial, and who may confirm it.

What is to be in force is on disk before it is in the kernel. So whenever this process ends, the next one finds what was
confirmed, and the kernel ends a trial by itself meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from waggle.agent.ssh_sessions import SshSession, logged_in
from waggle.errors import ApiError, KernelError, NotReady
from waggle.kernel.sockets import connections
from waggle.model import node_policy
from waggle.model.node_policy import Clock, Essentials, Guests, Peers, State, Trial
from waggle.model.node_trace import OwnPolicies
from waggle.model.objects import ObjectKey
from waggle.model.policy_rules import Direction
from waggle.plan.policy_node import NodePlan, NodeTrial
from waggle.sources.problem import Problem
from waggle.store import Store

log = logging.getLogger(__name__)

_FILE = "node-policies.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NOTHING = State()
RETRY_SECONDS = 1.0
LOOK_SECONDS = 60.0  # between two looks at what is essential, if nothing else has it looked at


class Confirmation(NamedTuple):
    """Who confirms. `session`: the SSH session that the command runs in; None: in none that can be found."""

    session: SshSession | None
    local: bool
    force: bool


class NodePolicies:
    """`essentials` finds what no policy may cut. `changed` has everything planned again."""

    def __init__(
        self,
        store: Store,
        node: str,
        state_dir: Path,
        essentials: Callable[[], Awaitable[Essentials]],
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._node = ObjectKey("", node)
        self._file = state_dir / _FILE
        self._find_essentials = essentials
        self._changed = changed
        self.state = _NOTHING
        self.known = False  # what sources want has been compared with what is in force
        self._lock = asyncio.Lock()  # of the state
        self._in_force_until = 0  # the end of the trial that the kernel has, and since when it has it
        self._in_force_since_ns = 0
        self._essentials: Essentials | None = None  # as they were planned last
        self._timer: asyncio.TimerHandle | None = None
        self._unreadable = ""
        self._unwritten = ""  # why a change is not tried

    def load(self) -> None:
        """Reads what was in force. Blocking."""
        try:
            self.state = msgspec.json.decode(self._file.read_bytes(), type=State)
        except FileNotFoundError:
            self.state = _NOTHING
        except (OSError, msgspec.MsgspecError) as error:
            self._unreadable = f"{self._file} cannot be read ({error}): every NodePolicy has to be confirmed again"
            log.error("%s", self._unreadable)

    @property
    def is_active(self) -> bool:
        """Whether `plan` may say something else than before, or than that there is nothing."""
        return bool(self._store.node_policies) or self.state != _NOTHING or not self.known

    async def plan(self) -> NodePlan | None:
        """What is to be in force now; None for nothing. A change that cannot be kept on disk is not made."""
        own = self._store.nodes.get(self._node)
        labels = (own.metadata.labels or {}) if own is not None else {}
        wanted = node_policy.of_node(self._store.node_policies.values(), labels)
        async with self._lock:
            new = node_policy.follow(self.state, wanted, clock())
            if new != self.state:
                await self._try_to_enter(new)
        self.known = True
        if not self.state.confirmed and self.state.trial is None:
            self._schedule(None)
            return None
        essentials = self._essentials = await self._find_essentials()
        trial = self.state.trial
        self._schedule(trial)
        return NodePlan(essentials, tuple(self.state.confirmed.values()), _planned(trial))

    def in_force(self) -> OwnPolicies:
        """What holds on this node now, as far as it has been told to the kernel."""
        state = node_policy.expired(self.state, clock())
        trial = state.trial
        if trial is None:
            return OwnPolicies(tuple(state.confirmed.values()), self._essentials, known=True)
        guests = Guests(trial.guests, trial.ports)
        return OwnPolicies(tuple(trial.policies.values()), self._essentials, guests, known=True, on_trial=True)

    async def _try_to_enter(self, new: State) -> None:
        try:
            await asyncio.to_thread(self._enter, new)
        except KernelError as error:
            if str(error) != self._unwritten:
                log.error("NodePolicies stay as they were, trying again: %s", error)
            self._unwritten = str(error)
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._changed)
        else:
            self._unwritten = ""

    def written(self, until_ns: int) -> None:
        """The kernel has what was planned last; the end of its trial, 0 for none."""
        if until_ns != self._in_force_until:
            self._in_force_until = until_ns
            self._in_force_since_ns = clock().boottime_ns

    def _enter(self, new: State) -> None:
        """Makes this the state. Blocking."""
        old, trial = self.state, new.trial
        if trial is not None and (old.trial is None or old.trial.policies != trial.policies):
            ports, guests = logged_in()
            if old.trial is not None:  # they were there before the first one
                ports, guests = {*ports, *old.trial.ports}, {*guests, *old.trial.guests}
            trial = msgspec.structs.replace(trial, guests=tuple(sorted(guests)), ports=tuple(sorted(ports)))
            new = msgspec.structs.replace(new, trial=trial)
            log.warning(
                "NodePolicies on trial for %d s: %s. Keep them with `waggle node-policy confirm %s`",
                (trial.until_ns - trial.began_ns) // 10**9,
                ", ".join(trial.changed),
                trial.changed[0],
            )
        if new.refused and new.refused != old.refused:
            log.warning("NodePolicies were not confirmed and are taken back: %s", ", ".join(new.refused_names))
        self._save(new)
        self.state = new
        self._unreadable = ""

    def _save(self, state: State) -> None:
        """On disk, whole or not at all, before anything of it is in force."""
        scratch = self._file.with_suffix(".tmp")
        try:
            with scratch.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(state)))
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self._file)
        except OSError as error:
            raise KernelError(f"cannot write {self._file}: {error.strerror}", error.errno or 0) from error

    def _schedule(self, trial: Trial | None) -> None:
        """Has everything planned again when the trial is over, and when essentials may be others."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.state.confirmed and trial is None:
            return
        seconds = LOOK_SECONDS
        now = clock()
        if trial is not None and node_policy.is_live(trial, now):
            seconds = min(seconds, (trial.until_ns - now.boottime_ns) / 1e9 + 0.01)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._changed)

    # -- what people do -----------------------------------------------------------------------------------------

    async def confirm(self, names: Sequence[str], by: Confirmation) -> dict[str, Any]:
        """What is on trial stays, all of it: so it was tried. ApiError says why not."""
        async with self._lock:
            return await self._confirm(names, by)

    async def _confirm(self, names: Sequence[str], by: Confirmation) -> dict[str, Any]:
        trial = self._trial(names)
        if self._in_force_until != trial.until_ns:
            raise NotReady("what is on trial is not in force yet, or cannot be: see `waggle status`")
        warnings = []
        if not by.local:
            await asyncio.to_thread(_check_session, by.session, self._in_force_since_ns)
        session = by.session
        if session is not None and not self._may_enter(trial, session.client, session.port):
            reason = (
                f"once confirmed, these policies let nobody log in from {session.client} (TCP port {session.port}): it "
                "only works now because you were logged in before. Allow it, or use --force"
            )
            if not by.force:
                raise ApiError(reason, 409)
            warnings.append(reason)
        shut_out = [a for a in trial.guests if not any(self._may_enter(trial, a, port) for port in trial.ports)]
        if shut_out and not warnings:
            warnings.append(f"who is logged in from {', '.join(shut_out)} cannot log in again")
        await asyncio.to_thread(self._enter, node_policy.confirmed(self.state))
        self._changed()
        log.info("NodePolicies confirmed: %s", ", ".join(trial.changed))
        return {"confirmed": list(trial.changed), "warnings": warnings}

    async def revert(self, names: Sequence[str]) -> dict[str, Any]:
        """What is on trial is taken back now. ApiError says why not."""
        async with self._lock:
            trial = self._trial(names)
            await asyncio.to_thread(self._enter, node_policy.refused(self.state))
        self._changed()
        return {"reverted": list(trial.changed)}

    async def retry(self) -> dict[str, Any]:
        """What was tried and not confirmed is tried again. ApiError where there is nothing."""
        async with self._lock:
            state = node_policy.expired(self.state, clock())
            if not state.refused:
                raise ApiError("there is no NodePolicy that was tried and not confirmed", 409)
            await asyncio.to_thread(self._enter, State(state.confirmed))
        self._changed()
        return {"tried": list(state.refused_names)}

    def _trial(self, names: Sequence[str]) -> Trial:
        if not self.known:
            raise NotReady("the sources have not told everything yet: try again in a moment")
        trial = node_policy.expired(self.state, clock()).trial
        if trial is None:
            why = ""
            if self.state.refused or self.state.trial is not None:
                why = ": time was up, and what was confirmed before is in force. `waggle node-policy retry` tries again"
            raise ApiError(f"no NodePolicy is on trial{why}", 409)
        if unknown := [name for name in names if name not in trial.changed]:
            raise ApiError(f"{', '.join(unknown)} is not on trial, but {', '.join(trial.changed)}", 409)
        return trial

    def _may_enter(self, trial: Trial, address: str, port: int) -> bool:
        known = Peers(
            list(self._store.pods.values()),
            {key.name: namespace for key, namespace in self._store.namespaces.items()},
            list(self._store.nodes.values()),
        )
        return node_policy.allows(trial.policies.values(), Direction.INGRESS, address, "TCP", port, known)

    # -- for people ---------------------------------------------------------------------------------------------

    def problems(self) -> list[Problem]:
        """What waits for somebody."""
        found = [Problem("NodePolicies", reason) for reason in (self._unreadable, self._unwritten) if reason]
        now = clock()
        state = node_policy.expired(self.state, now)
        if state.trial is not None:
            left = (state.trial.until_ns - now.boottime_ns) // 10**9
            reason = f"on trial for {left} s more, then taken back: `waggle node-policy confirm` keeps it"
            found += [Problem(f"NodePolicy {name}", reason) for name in state.trial.changed]
        elif state.refused:
            reason = "was tried and not confirmed, and is not in force: change it, or `waggle node-policy retry`"
            found += [Problem(f"NodePolicy {name}", reason) for name in state.refused_names]
        return found

    def status(self) -> dict[str, Any]:
        """What `waggle node-policy status -o json` prints."""
        now = clock()
        state = node_policy.expired(self.state, now)
        trial = state.trial
        return {
            "confirmed": sorted(state.confirmed),
            "trial": None
            if trial is None
            else {
                "changed": list(trial.changed),
                "policies": sorted(trial.policies),
                "began": trial.began,
                "secondsLeft": round((trial.until_ns - now.boottime_ns) / 1e9, 1),
                "letIn": [f"{address}: TCP {port}" for address in trial.guests for port in trial.ports],
            },
            "notConfirmed": list(state.refused_names),
        }

    def rows(self, place: Callable[[ObjectKey], tuple[str, int | None]]) -> list[dict[str, Any]]:
        """The policies that are about this node, by name."""
        state = node_policy.expired(self.state, clock())
        tried = state.trial.policies if state.trial is not None else {}
        present = {key.name: policy for key, policy in self._store.node_policies.items()}
        waiting = state.trial.changed if state.trial is not None else state.refused_names
        names = {*state.confirmed, *tried, *(name for name in waiting if name in present)}
        rows = []
        for name in sorted(names):
            policy = tried.get(name) or present.get(name) or state.confirmed[name]
            word = "confirmed"
            if name in waiting:
                word = "on trial" if state.trial is not None else "not confirmed"
                word = word if name in present else f"removal {word}"
            origin, line = place(ObjectKey("", name))
            file = origin.removeprefix("file:") if origin.startswith("file:") else None
            rows.append(
                {
                    "name": name,
                    "state": word,
                    "directions": sorted(node_policy.policy_types(policy), reverse=True),
                    "audit": node_policy.is_audited(policy),
                    "confirmSeconds": policy.spec.confirm_seconds,
                    "origin": "file" if file is not None else origin,
                    "file": file,
                    "line": line,
                }
            )
        return rows


def clock() -> Clock:
    """Now, as trials are timed."""
    return Clock(time.time(), time.clock_gettime_ns(time.CLOCK_BOOTTIME), _BOOT_ID.read_text().strip())


def _planned(trial: Trial | None) -> NodeTrial | None:
    if trial is None:
        return None
    return NodeTrial(tuple(trial.policies.values()), Guests(trial.guests, trial.ports), trial.until_ns)


def _check_session(session: SshSession | None, since_ns: int) -> None:
    """The connection that the command came over must have worked since then, under what is tried."""
    if session is None:
        raise ApiError(
            "this command runs in no SSH session that could show that you still get in. On the console of the machine, "
            "or where you know better, use --local",
            409,
        )
    found = [one for one in connections() if session.is_of(one)]
    if not found:
        raise ApiError(
            f"the SSH connection from {session.client}:{session.client_port} is no more: log in again and confirm from "
            "there",
            409,
        )
    since_ms = (clock().boottime_ns - since_ns) // 10**6
    if min(one.quiet_ms for one in found) > since_ms:
        raise ApiError(
            f"nothing has come by the SSH connection from {session.client}:{session.client_port} since the trial "
            "began: confirm over a connection that works",
            409,
        )
