"""Questions about names that are no Service's: asked of the resolvers that the node itself uses.

Nothing is kept, so that nobody can put a wrong answer into a store for others, and what the node's resolvers say counts
at once. /etc/resolv.conf is read again when it changes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container
from pathlib import Path

import dns.asyncbackend
import dns.asyncquery
import dns.exception
import dns.message
import dns.resolver

from waggle.sources.problem import Problem

log = logging.getLogger(__name__)

RESOLV_CONF = Path("/etc/resolv.conf")
TIMEOUT_SECONDS = 2.0  # for each resolver; clients wait for 5
_MOST_RESOLVERS = 3  # as the C library


class Forwarder:
    """`own` are addresses that are never asked: this server's."""

    def __init__(self, own: Container[str], file: Path = RESOLV_CONF, port: int = 53) -> None:
        self._own = own
        self._port = port
        self._file = file
        self._read_at: tuple[int, int] | None = None
        self._resolvers: list[str] = []
        self._reason = ""
        self._backend = dns.asyncbackend.get_backend("asyncio")

    def problems(self) -> list[Problem]:
        """Why other names cannot be resolved."""
        return [Problem("DNS", self._reason)] if self._reason else []

    async def ask(self, query: dns.message.Message, *, tcp: bool) -> dns.message.Message | None:
        """The first answer that a resolver gives; None: none did."""
        for address in self.resolvers():
            try:
                if tcp:
                    return await dns.asyncquery.tcp(query, address, TIMEOUT_SECONDS, self._port, backend=self._backend)
                return await dns.asyncquery.udp(
                    query,
                    address,
                    TIMEOUT_SECONDS,
                    self._port,
                    ignore_unexpected=True,
                    ignore_errors=True,
                    backend=self._backend,
                )
            except (dns.exception.DNSException, OSError, EOFError, ValueError) as error:
                log.debug("resolver %s: %s", address, error)
        return None

    def resolvers(self) -> list[str]:
        """The addresses to ask, in order."""
        try:
            found = self._file.stat()
            seen = (found.st_mtime_ns, found.st_ino)
            if seen != self._read_at:
                self._resolvers = self._read()
                self._read_at = seen
        except (OSError, dns.exception.DNSException) as error:
            text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            self._complain(f"{self._file}: {text}")
            self._read_at, self._resolvers = None, []
        return self._resolvers

    def _read(self) -> list[str]:
        resolver = dns.resolver.Resolver(str(self._file))
        found = [str(address) for address in resolver.nameservers if str(address) not in self._own]
        if found:
            self._reason = ""
        else:
            self._complain(f"{self._file} names no resolver but this one: only names of Services can be resolved")
        return found[:_MOST_RESOLVERS]

    def _complain(self, reason: str) -> None:
        if reason != self._reason:
            log.warning("%s", reason)
        self._reason = reason
