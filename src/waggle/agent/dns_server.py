"""Answers DNS on the node: names of Services from the store, all others by way of the node's resolvers.

The addresses are link-local, on the loopback interface of every node: containers reach their own node there and nothing
else. Only containers of this node and the node itself are answered, so that it is no open resolver, whoever finds a way
to the address. While the agent is away questions wait (reconcile.held_sockets).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Sequence
from typing import Any, cast

import dns.exception
import dns.message
import dns.rcode
import prometheus_client

from waggle.agent.dns_forward import Forwarder
from waggle.agent.dns_messages import Unanswerable, question_of, read_query, refusal, reply_of, to_udp
from waggle.errors import WaggleError
from waggle.plan.names import Outcome, ServiceNames
from waggle.sources.problem import Problem

log = logging.getLogger(__name__)

PORT = 53
RETRY_SECONDS = 2.0
PATIENCE_SECONDS = 3.0  # for sources that have not given their view; clients wait for 5
IDLE_SECONDS = 10.0  # of a TCP connection
MOST_QUESTIONS = 1024  # under way
MOST_PER_CLIENT = 128
MOST_CONNECTIONS = 256


class DnsServer:
    """`addresses` are what it listens on; `bind` gives the sockets, in a worker thread. `ready` says whether the names
    are complete; `clients` gives the addresses that are answered, None while they are not known."""

    def __init__(
        self,
        addresses: Sequence[str],
        names: ServiceNames,
        *,
        bind: Callable[[], Sequence[socket.socket]],
        ready: Callable[[], bool],
        clients: Callable[[], Container[str] | None],
        requests: prometheus_client.Counter,
        forwarder: Forwarder | None = None,
    ) -> None:
        self.addresses = tuple(addresses)
        self._names = names
        self._bind = bind
        self._ready = ready
        self._clients = clients
        self._requests = requests
        self._forwarder = forwarder or Forwarder(self.addresses)
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: Counter[str] = Counter()
        self._connected = 0
        self._error = ""
        self.listening = False

    def problems(self) -> list[Problem]:
        """Why names cannot be resolved."""
        return ([Problem("DNS", self._error)] if self._error else []) + self._forwarder.problems()

    async def run(self) -> None:
        """Until cancelled. What keeps it from listening is told, and tried again."""
        while True:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    for bound in await asyncio.to_thread(self._bind):
                        stack.callback(bound.close)
                        await self._listen(bound, stack)
                    self._forwarder.resolvers()
                    self._error = ""
                    self.listening = True
                    log.info("answering DNS on %s", ", ".join(self.addresses))
                    await asyncio.get_running_loop().create_future()
            except (WaggleError, OSError) as error:
                if str(error) != self._error:
                    log.error("DNS: %s; trying again", error)
                self._error = str(error)
            finally:
                self.listening = False
                for task in self._tasks:
                    task.cancel()
            await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self, bound: socket.socket, stack: contextlib.AsyncExitStack) -> None:
        if bound.type == socket.SOCK_STREAM:
            server = await asyncio.start_server(self._connection, sock=bound)
            stack.callback(server.close)
        else:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=bound)
            stack.callback(transport.close)

    # -- questions

    async def answer(self, wire: bytes, client: str, *, tcp: bool) -> bytes | None:
        """The answer's bytes; None for what gets no answer."""
        if not await self._is_client(client):
            self._requests.labels("none", "dropped").inc()
            return None
        query = None
        try:
            query = read_query(wire)
            source, reply = await self._reply(query, tcp=tcp)
        except Unanswerable as refused:
            if refused.reply is None:
                return None
            source, reply = "own", refused.reply
        self._requests.labels(source, dns.rcode.to_text(reply.rcode())).inc()
        return reply.to_wire() if tcp else to_udp(query, reply)

    async def _is_client(self, client: str) -> bool:
        await self._until(lambda: self._clients() is not None)
        clients = self._clients()
        return clients is not None and client in clients

    async def _reply(self, query: dns.message.Message, *, tcp: bool) -> tuple[str, dns.message.Message]:
        name, kind = question_of(query)
        found = self._names.answer(name, kind)
        if found.outcome is Outcome.ELSEWHERE:
            return "forwarded", await self._forward(query, tcp=tcp)
        if not self._ready():
            # what is not known yet must not be called missing: clients would believe it
            await self._until(self._ready)
            if not self._ready():
                return "own", refusal(query, dns.rcode.SERVFAIL)
            found = self._names.answer(name, kind)
        reply = reply_of(query, found)
        if found.records and found.records[0].type == "CNAME" and kind not in ("CNAME", "ANY"):
            await self._follow(query, reply, kind)
        return "own", reply

    async def _forward(self, query: dns.message.Message, *, tcp: bool) -> dns.message.Message:
        reply = await self._forwarder.ask(query, tcp=tcp)
        return reply if reply is not None else refusal(query, dns.rcode.SERVFAIL)

    async def _follow(self, query: dns.message.Message, reply: dns.message.Message, kind: str) -> None:
        """Adds what an ExternalName stands for: stub resolvers do not ask again by themselves."""
        target = reply.answer[0][0].target
        further = await self._forwarder.ask(dns.message.make_query(target, kind), tcp=False)
        if further is not None:
            reply.answer.extend(further.answer)

    async def _until(self, condition: Callable[[], bool]) -> None:
        deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while not condition() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 (at starts only)
            await asyncio.sleep(0.02)

    # -- transports

    def take(self, client: str, work: Callable[[], Awaitable[None]]) -> None:
        """Does the work, unless there is too much of this client's, or of all, under way."""
        if len(self._tasks) >= MOST_QUESTIONS or self._asking[client] >= MOST_PER_CLIENT:
            self._requests.labels("none", "overload").inc()
            return
        self._asking[client] += 1
        task = asyncio.ensure_future(self._do(client, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, client: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (OSError, dns.exception.DNSException) as error:
            log.debug("DNS client %s: %s", client, error)
        except Exception:  # one question must not cost the others their answers
            log.exception("a DNS question of %s could not be answered", client)
        finally:
            self._asking[client] -= 1
            if not self._asking[client]:
                del self._asking[client]

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _plain(writer.get_extra_info("peername"))
        self._connected += 1
        try:
            if self._connected <= MOST_CONNECTIONS:
                await self._serve(client, reader, writer)
        except (OSError, EOFError, TimeoutError, dns.exception.DNSException) as error:
            log.debug("DNS client %s: %s", client, error)
        finally:
            self._connected -= 1
            writer.close()

    async def _serve(self, client: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                length = await reader.readexactly(2)
                wire = await reader.readexactly(int.from_bytes(length, "big"))
            answer = await self.answer(wire, client, tcp=True)
            if answer is None:
                return
            async with asyncio.timeout(IDLE_SECONDS):
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is none by its class

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        client = _plain(addr)

        async def work() -> None:
            answer = await self._server.answer(data, client, tcp=False)
            if answer is not None and self._transport is not None:
                self._transport.sendto(answer, addr)

        self._server.take(client, work)


def _plain(address: tuple[Any, ...]) -> str:
    """The address without an IPv6 scope."""
    return str(address[0]).partition("%")[0]
