"""Flows that another Service proxy translates when this agent begins: they go on with waggle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from waggle.abi._generated import ServiceKey
from waggle.abi.address import unpack_address
from waggle.kernel import conntrack
from waggle.reconcile import takeover
from waggle.reconcile.datapath import Datapath
from waggle.reconcile.sysctls import Sysctls

log = logging.getLogger(__name__)


class ProxyFlows:
    """`own` gives the node's addresses, `frontends` the keys of the frontend table, as they are now."""

    def __init__(
        self,
        datapath: Datapath,
        sysctls: Sysctls,
        own: Callable[[], frozenset[str]],
        frontends: Callable[[], Iterable[bytes]],
    ) -> None:
        self._datapath = datapath
        self._sysctls = sysctls
        self._own = own
        self._frontends = frontends

    def look(self) -> None:
        """Before programs are loaded: where no agent was at work, flows to Services are another proxy's."""
        self._datapath.beside_proxy = not self._datapath.is_at_work() and bool(conntrack.translated_flows())

    @contextmanager
    def attaching(self) -> Iterator[Callable[[], object]]:
        """While programs are put on their hooks; what it gives is to be called after every step: flows are taken over
        that have begun since, as their packets reach programs from then on.

        In between, conntrack sees one direction of some connections: it must not take the other for invalid.
        """
        if not self._datapath.beside_proxy:
            yield lambda: None
            return
        self._sysctls.set(takeover.LIBERAL_CONNTRACK, "1")
        try:
            self.take_over()
            yield self.take_over
        finally:
            self._sysctls.restore(takeover.LIBERAL_CONNTRACK)

    def take_over(self) -> int:
        """Flows to Services that another proxy translates go on with waggle. How many were new. Blocking."""
        if not self._datapath.beside_proxy:
            return 0
        own = self._own()
        served = {(unpack_address(key.addr), key.port, key.proto) for key in map(ServiceKey.unpack, self._frontends())}

        def is_frontend(asked: conntrack.Tuple) -> bool:
            everywhere = "::" if ":" in asked.dst else "0.0.0.0"
            return (asked.dst, asked.dport, asked.protocol) in served or (
                asked.dst in own and (everywhere, asked.dport, asked.protocol) in served
            )

        found = [flow for flow in conntrack.translated_flows() if takeover.takes(flow, is_frontend, own)]
        written = takeover.take_over(found, self._datapath.maps["wag_nat"])
        takeover.mark(found, self._datapath.maps["wag_endpoints"])
        if written:
            log.info("took over %d flows that another proxy translated", written)
        return written
