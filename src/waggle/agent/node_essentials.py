"""What no NodePolicy may cut, as far as this agent knows it: its API server, resolvers, tunnels, health checks."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from waggle.agent.dns_forward import Forwarder
from waggle.config import AgentConfig, split_host_port
from waggle.errors import ConfigError
from waggle.model.node_policy import Essentials
from waggle.model.objects import ObjectKey
from waggle.sources.kubeconfig import load_access
from waggle.store import Store

log = logging.getLogger(__name__)

LOOKUP_SECONDS = 60.0  # between two look-ups of the API server's name
PATIENCE_SECONDS = 1.0  # Services wait meanwhile
_API_SERVICE = ObjectKey("default", "kubernetes")
_DEFAULT_PORTS = {"https": 443, "http": 80}

Servers = frozenset[tuple[str, int]]


class NodeEssentials:
    """`own`: addresses of this node; `health_ports`: those that it answers health checks on."""

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        own: Callable[[], Iterable[str]],
        health_ports: Callable[[], Iterable[int]],
    ) -> None:
        self._config = config
        self._store = store
        self._own = own
        self._health_ports = health_ports
        self._forwarder = Forwarder(frozenset(config.dns_addresses))
        self._named: Servers = frozenset()
        self._looked = float("-inf")

    async def find(self) -> Essentials:
        """What is essential now."""
        ports = set(self._health_ports())
        if self._config.metrics_address:
            host, port = split_host_port(self._config.metrics_address)
            ports |= set() if _is_loopback(host) else {port}
        return Essentials(
            vxlan_port=self._config.vxlan_port,
            apiservers=await self._configured() | self._in_cluster(),
            own=frozenset(self._own()),
            resolvers=frozenset(self._forwarder.resolvers()),
            open_ports=frozenset(ports),
        )

    async def _configured(self) -> Servers:
        """The API server of the kubeconfig. While its name cannot be looked up: what it was."""
        kubeconfig = self._config.kubeconfig
        if kubeconfig is None or time.monotonic() - self._looked < LOOKUP_SECONDS:
            return self._named
        self._looked = time.monotonic()
        try:
            url = urlsplit(load_access(kubeconfig).server)
            port = url.port or _DEFAULT_PORTS[url.scheme]
            look_up = asyncio.get_running_loop().getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)
            found = await asyncio.wait_for(look_up, PATIENCE_SECONDS)
        except (ConfigError, OSError, TimeoutError) as error:
            log.warning("the API server's address cannot be looked up, NodePolicies let pass what it was: %s", error)
            return self._named
        self._named = frozenset((str(address[0]).partition("%")[0], port) for *_, address in found)
        return self._named

    def _in_cluster(self) -> Servers:
        """Where the cluster's own Service of the API leads."""
        return frozenset(
            (address, port.port)
            for piece in self._store.slices_of.get(_API_SERVICE, {}).values()
            for port in piece.ports or ()
            if port.port
            for endpoint in piece.endpoints or ()
            for address in endpoint.addresses
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
