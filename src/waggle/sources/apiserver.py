"""HTTP towards one Kubernetes API: one answer (`get`) or the lines of a watch (`lines`), and every failure in words.

Invariants:
- All exceptions that leave this module are WaggleErrors. ApiError.status is the HTTP status, 0 where there was no
  usable answer; ApiError.retry_after is what the server asked for.
- No request waits for ever: connecting, the answer's head, every read and every complete answer have a limit, and
  TCP keep-alive plus TCP_USER_TIMEOUT find a peer that vanished without a word within half a minute.
- Redirects are not followed and proxies not used: credentials go to the configured server only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult

from waggle import __version__
from waggle.errors import ApiError, ApiSilent, ApiUnreachable, ConfigError
from waggle.kernel.netns import call_in_netns
from waggle.sources.credentials import Credentials, Login
from waggle.sources.kubeconfig import IN_CLUSTER, Access, load_access

log = logging.getLogger(__name__)

_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_PROBES = 15, 5, 3  # seconds, seconds, count: dead after 30 s
_LONGEST_LINE = 64 << 20  # bytes; etcd refuses objects beyond 1.5 MiB, so this is no watch event


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait, in seconds."""

    connect: float = 10.0
    head: float = 60.0  # until the status line; the apiserver's own request timeout is 60 s
    read: float = 30.0  # between two pieces of an answer
    whole: float = 120.0  # one complete answer that is not a watch


class _Details(msgspec.Struct, rename="camel"):
    retry_after_seconds: float = 0.0


class Status(msgspec.Struct, rename="camel"):
    """metav1.Status: what the API answers instead of an object."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: _Details | None = None


def status_error(status: Status, retry_after: float = 0.0) -> ApiError:
    """The exception for a Status that the API sent."""
    if status.details is not None:
        retry_after = max(retry_after, status.details.retry_after_seconds)
    return ApiError(status.message or status.reason or "no reason given", status.code, retry_after)


class ApiServer:
    """A session with the API that `kubeconfig` names, opened from the network namespace `netns`.

    The kubeconfig is read at the first request and again whenever it changed; a change that cannot be used leaves
    the one before in force. Use as an async context manager.
    """

    def __init__(self, kubeconfig: Path, netns: Path | None = None, limits: Limits | None = None) -> None:
        self._kubeconfig = kubeconfig
        self._netns = netns
        self._limits = limits or Limits()
        self._session: aiohttp.ClientSession | None = None
        self._access: Access | None = None
        self._credentials: Credentials | None = None
        self._stamp: object = None
        self.answers = 0  # that the server gave, of all kinds but its own failures
        self._answered = asyncio.Event()

    async def __aenter__(self) -> ApiServer:
        connector = aiohttp.TCPConnector(
            limit=0,
            socket_factory=self._make_socket,
            resolver=None if self._netns is None else _NetnsResolver(self._netns),
            keepalive_timeout=30.0,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect, sock_read=self._limits.read),
            headers={"User-Agent": f"waggle/{__version__}", "Accept": "application/json"},
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def current_server(self) -> str:
        """URL of the API as the kubeconfig names it now. Raises ConfigError while it cannot be read at all."""
        return self._current_access()[0].server

    async def wait(self, seconds: float, since: int) -> bool:
        """Sleep, but only until any request gets an answer: an API that was away is back for all who wait.

        `since` is what `answers` was before the caller's own attempt; True if there was an answer after that.
        """
        if self.answers == since:
            try:
                async with asyncio.timeout(seconds):
                    await self._answered.wait()
            except TimeoutError:
                return False
        return True

    async def get(self, path: str, parameters: Mapping[str, str]) -> bytes:
        """The whole body of a 200 answer."""
        try:
            async with asyncio.timeout(self._limits.whole), self._answer(path, parameters, self._limits.read) as answer:
                return await answer.read()
        except TimeoutError as error:
            raise ApiError(f"{self.current_server()} did not answer within {self._limits.whole:g} s") from error

    @asynccontextmanager
    async def lines(self, path: str, parameters: Mapping[str, str], idle: float) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of a 200 answer as they come; no byte for `idle` seconds is an error, an orderly end is none."""
        async with self._answer(path, parameters, idle) as answer:
            yield _split_lines(answer.content)

    @asynccontextmanager
    async def _answer(
        self, path: str, parameters: Mapping[str, str], idle: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The head of a 200 answer; translates what goes wrong before, and inside the `async with` block."""
        access, credentials = self._current_access()
        login = await credentials.login()
        answered = False
        try:
            answer = await self._request(access, login, path, parameters, idle)
            if answer.status == 401 and credentials.renewable:
                answer.release()
                credentials.invalidate(login)
                login = await credentials.login()
                answer = await self._request(access, login, path, parameters, idle)
            answered = True
            async with answer:
                if answer.status < 500:
                    self._wake_the_waiting()
                if answer.status != 200:
                    raise await _refusal(answer, access)
                yield answer
        except (aiohttp.ClientError, OSError, ssl.CertificateError) as error:
            kind: type[ApiError] = ApiError if answered else ApiUnreachable
            if answered and isinstance(error, aiohttp.ServerTimeoutError):
                kind = ApiSilent
            raise kind(_in_words(error, access)) from error

    def _wake_the_waiting(self) -> None:
        self.answers += 1
        self._answered.set()
        self._answered = asyncio.Event()  # for those who wait from now on

    async def _request(
        self, access: Access, login: Login, path: str, parameters: Mapping[str, str], idle: float
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            raise RuntimeError("ApiServer is used outside of its `async with`")
        # gzip of large lists saves network, not time: a kubeconfig can turn it off (disable-compression)
        headers = {**login.headers, "Accept-Encoding": "gzip" if access.compression else "identity"}
        try:
            async with asyncio.timeout(self._limits.head):
                return await self._session.get(
                    access.server + path,
                    params=parameters,
                    headers=headers,
                    ssl=login.tls,
                    server_hostname=access.tls_server_name,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect, sock_read=idle),
                )
        except aiohttp.ClientError:
            raise  # some are TimeoutErrors too, and know better what happened
        except TimeoutError as error:
            raise ApiUnreachable(f"{access.server} did not answer within {self._limits.head:g} s") from error

    # -- kubeconfig ---------------------------------------------------------------------------------------------

    def _current_access(self) -> tuple[Access, Credentials]:
        stamp = self._file_stamp()
        if self._access is None or self._credentials is None or stamp != self._stamp:
            try:
                access = load_access(self._kubeconfig)
            except ConfigError as error:
                if self._access is None or self._credentials is None:
                    raise
                log.warning("%s; going on with what it said before", error)
            else:
                if access != self._access or self._credentials is None:
                    self._access, self._credentials = access, Credentials(access)
            self._stamp = stamp
        return self._access, self._credentials

    def _file_stamp(self) -> object:
        if self._kubeconfig == IN_CLUSTER:
            return None
        try:
            stat = self._kubeconfig.stat()
        except OSError as error:
            return error.errno
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    # -- sockets ------------------------------------------------------------------------------------------------

    def _make_socket(self, address: tuple[int, int, int, str, Any]) -> socket.socket:
        family, kind, protocol = address[:3]

        def make() -> socket.socket:
            return socket.socket(family, kind, protocol)

        made = make() if self._netns is None else call_in_netns(self._netns, make)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        lifetime = _KEEPALIVE_IDLE + _KEEPALIVE_INTERVAL * _KEEPALIVE_PROBES
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, lifetime * 1000)
        return made


class _NetnsResolver(AbstractResolver):
    """getaddrinfo(3) as a process of that network namespace would see it."""

    def __init__(self, netns: Path) -> None:
        self._netns = netns

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        def look_up() -> list[tuple[Any, ...]]:
            found: list[tuple[Any, ...]] = call_in_netns(
                self._netns, lambda: socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
            )
            return found

        return [
            ResolveResult(
                hostname=host,
                host=address[0],
                port=address[1],
                family=found_family,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for found_family, _, protocol, _, address in await asyncio.to_thread(look_up)
        ]

    async def close(self) -> None:
        """Nothing is held open."""


async def _split_lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Complete lines only: what follows the last newline of a connection that ended is half an event."""
    parts: list[bytes] = []  # of the line that is not complete yet; joined once, however large it grows
    held = 0
    async for piece in content.iter_any():
        first, *rest = piece.split(b"\n")
        parts.append(first)
        held += len(first)
        if held > _LONGEST_LINE:
            raise ApiError(f"a watch event is longer than {_LONGEST_LINE} bytes")
        for following in rest:
            line = b"".join(parts)
            parts, held = [following], len(following)
            if line.strip():
                yield line


# -- failures in words ------------------------------------------------------------------------------------------


async def _refusal(answer: aiohttp.ClientResponse, access: Access) -> ApiError:
    body = await answer.content.read(1 << 16)
    try:
        status = msgspec.json.decode(body, type=Status)
    except msgspec.MsgspecError:
        status = Status()
    text = status.message or " ".join(body.decode(errors="replace").split())[:200] or str(answer.reason)
    header = answer.headers.get("Retry-After", "")
    retry_after = float(header) if header.isdigit() else 0.0
    if answer.status == 401:
        text = f"{access.server} does not accept the credentials of {access.origin} (401 {text})"
    elif 300 <= answer.status < 400:
        text = f"{access.server} redirects to {answer.headers.get('Location', 'nowhere')}; this is no Kubernetes API"
    status.message, status.code = text, answer.status
    return status_error(status, retry_after)


def _in_words(error: Exception, access: Access) -> str:
    """One sentence a user can act on, stable over retries (addresses and times vary, reasons do not)."""
    server = access.server
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return _certificate_in_words(error.certificate_error, access)
        case ssl.SSLCertVerificationError():
            return _certificate_in_words(error, access)
        case aiohttp.ClientConnectorSSLError() | ssl.SSLError():
            return f"TLS with {server} failed: {_reason(error)}; is it a TLS port, and is the client certificate valid?"
        case aiohttp.ClientConnectorDNSError():
            return f"the host name of {server} does not resolve: {_reason(error)}"
        case aiohttp.ClientConnectorError():
            return f"cannot connect to {server}: {_reason(error)}"
        case aiohttp.ConnectionTimeoutError():
            return f"cannot connect to {server}: no answer"
        case aiohttp.ServerTimeoutError():
            return f"{server} stopped sending"
        case aiohttp.ServerDisconnectedError():
            # with TLS 1.3 a server refuses a certificate after the handshake, by closing
            hint = "; is the client certificate missing or refused?" if server.startswith("https:") else ""
            return f"{server} closed the connection without an answer{hint}"
        case aiohttp.ClientPayloadError():
            return f"the connection to {server} broke in the middle of an answer"
        case aiohttp.ClientResponseError():
            return f"{server} does not speak HTTP as it should: {error.message or error.status}"
        case _:
            return f"the connection to {server} broke: {_reason(error)}"


def _reason(error: BaseException) -> str:
    inner = getattr(error, "os_error", error)
    if isinstance(inner, ssl.SSLError):
        reason = (inner.reason or str(inner)).replace("_", " ")
    elif isinstance(inner, OSError) and inner.errno is not None and inner.errno > 0:
        reason = os.strerror(inner.errno)  # asyncio puts its own words, and the address, into strerror
    else:
        reason = str(inner) or type(inner).__name__
    return reason[:1].lower() + reason[1:]


def _certificate_in_words(error: Exception, access: Access) -> str:
    message = getattr(error, "verify_message", "") or str(error)
    code = getattr(error, "verify_code", 0)
    if code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        hint = "use a name that the certificate holds, or set tls-server-name"
    elif code in (10, 9):  # X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID
        hint = "renew it, and compare the clocks"
    else:
        hint = "compare certificate-authority"
    return f"the certificate of {access.server} is not trusted: {message.rstrip('.')}; {hint} in {access.origin}"
