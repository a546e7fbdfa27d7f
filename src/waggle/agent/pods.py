"""The programs on the interfaces of this node's pods."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from waggle.errors import KernelError, WaggleError
from waggle.kernel.netns import call_in_netns, netns_cookie_of_self
from waggle.model.interface import PodInterface
from waggle.observe.names import Names
from waggle.reconcile.datapath import Datapath, pod_title

log = logging.getLogger(__name__)

QUIET_SECONDS = 1.0  # runtimes make pods one after the other: none is to wait for what can be done later


class PodPrograms:
    """What CNI tells of pods becomes programs, endpoints and names for events. `pods` gives those that are there,
    `changed` is told of every change, from whichever thread."""

    def __init__(
        self,
        datapath: Datapath,
        names: Names,
        pods: Callable[[], Iterable[PodInterface]],
        changed: Callable[[], None],
    ) -> None:
        self._datapath = datapath
        self._names = names
        self._pods = pods
        self._changed = changed
        self.lock = threading.Lock()  # CNI requests against a new load of the programs
        self._hurried: dict[str, float] = {}  # host interface → when it was attached quickly

    def attach(self, pod: PodInterface) -> None:
        """A pod was made, and its runtime waits. KernelError."""
        with self.lock:
            self._datapath.attach(pod, quickly=True)
            if not pod.chained:  # those are never attached quickly
                self._hurried[pod.host_ifname] = time.monotonic()
        self._name(pod)
        self._changed()

    def detach(self, pod: PodInterface) -> None:
        """A pod goes. KernelError."""
        with self.lock:
            self._hurried.pop(pod.host_ifname, None)
            self._datapath.detach(pod)
        self._names.stale = True
        self._changed()

    def settle(self) -> None:
        """Attaches what was attached quickly as all others are, while no runtime has asked for anything in a while.
        Blocking. What fails stays as it is, at work, until programs are loaded anew."""
        while waiting := dict(self._hurried):
            if time.monotonic() - max(waiting.values()) < QUIET_SECONDS:
                return
            with self.lock:
                self._attach(next(iter(waiting)))

    def attach_all(self) -> None:
        """Programs that were loaded anew, on every pod. Blocking."""
        for name in [pod.host_ifname for pod in self._pods()]:
            with self.lock:
                pod = self._attach(name)
                if pod is not None:
                    self._name(pod)  # with the lock: after `detach` its name must not come back

    def _attach(self, name: str) -> PodInterface | None:
        """With the lock held. Pods may come and go meanwhile: this one as it is now, or not at all (None)."""
        self._hurried.pop(name, None)
        pod = next((pod for pod in self._pods() if pod.host_ifname == name), None)
        if pod is None:
            return None
        try:
            self._datapath.attach(pod)
        except KernelError as error:
            log.warning("pod %s/%s (%s): %s", pod.namespace, pod.name, pod.host_ifname, error)
            return None
        return pod

    def _name(self, pod: PodInterface) -> None:
        """Learns which pod a network namespace is, for events of its sockets."""
        self._names.stale = True
        try:
            cookie = call_in_netns(pod.netns, netns_cookie_of_self)
        except WaggleError:
            return  # the namespace is going away: its events stay without a name
        self._datapath.set_netns(cookie, map(str, pod.addresses), pod.host_ifname)
        self._names.by_netns[cookie] = pod_title(pod)
