"""The DNS server on real sockets: UDP, TCP, truncation, forwarding, who is answered, what comes before it is ready."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import dns.asyncquery
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_service_names import HTTP, piece, service

from waggle.agent import dns_forward, dns_server
from waggle.agent.dns_forward import Forwarder
from waggle.agent.dns_messages import Unanswerable, read_query
from waggle.agent.dns_server import DnsServer
from waggle.metrics import Metrics
from waggle.plan.names import ServiceNames
from waggle.reconcile.held_sockets import bind_all
from waggle.store import Store

HERE = "127.0.0.1"


def free_port() -> int:
    for _ in range(100):
        with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            stream.bind((HERE, 0))
            try:
                datagrams.bind(stream.getsockname())
            except OSError:
                continue
            return stream.getsockname()[1]
    raise AssertionError("no port is free for both")


class Upstream(asyncio.DatagramProtocol):
    """A resolver that knows one name, and counts. By TCP it says more."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.silent = False

    def reply(self, wire: bytes, *, tcp: bool) -> bytes:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        self.asked.append(f"{question.name} {dns.rdatatype.to_text(question.rdtype)} {'tcp' if tcp else 'udp'}")
        reply = dns.message.make_response(query, recursion_available=True)
        if question.name == dns.name.from_text("big.example") and not tcp:
            reply.flags |= dns.flags.TC
        elif question.name.to_text().endswith("example.") and question.rdtype == dns.rdatatype.A:
            texts = [f"192.0.2.{number}" for number in range(1, 200 if tcp else 2)]
            reply.answer.append(dns.rrset.from_text_list(question.name, 60, "IN", "A", texts))
        else:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply.to_wire()

    def connection_made(self, transport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr) -> None:
        if not self.silent:
            self.transport.sendto(self.reply(data, tcp=False), addr)

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        answer = self.reply(wire, tcp=True)
        writer.write(len(answer).to_bytes(2, "big") + answer)
        await writer.drain()
        writer.close()


class Bench:
    """A server and the resolver it forwards to."""

    def __init__(self, directory: Path) -> None:
        self.store = Store()
        for obj in (
            service("web", HTTP, cluster_ip="10.96.0.1"),
            service("many", HTTP, cluster_ip="None"),
            service("far", type="ExternalName", external_name="far.example"),
            piece("many", *((str(ipaddress.ip_address("10.0.0.0") + n), True) for n in range(200))),
        ):
            self.store.upsert(obj, "test")
        self.port, self.upstream_port = free_port(), free_port()
        self.resolv_conf = directory / "resolv.conf"
        self.resolv_conf.write_text(f"nameserver {HERE}\n")
        self.upstream = Upstream()
        self.is_ready = True
        self.clients: set[str] | None = {HERE}
        self.metrics = Metrics()
        self.forwarder = Forwarder((), self.resolv_conf, self.upstream_port)
        self.server = DnsServer(
            [HERE],
            ServiceNames(self.store, "cluster.local"),
            bind=lambda: bind_all([HERE], self.port),
            ready=lambda: self.is_ready,
            clients=lambda: self.clients,
            requests=self.metrics.dns_requests,
            forwarder=self.forwarder,
        )

    async def udp(self, name: str, kind: str = "A", **more) -> dns.message.Message:
        query = dns.message.make_query(name, kind, **more)
        return await dns.asyncquery.udp(query, HERE, 4, self.port)

    async def tcp(self, name: str, kind: str = "A") -> dns.message.Message:
        return await dns.asyncquery.tcp(dns.message.make_query(name, kind), HERE, 4, self.port)

    async def raw(self, wire: bytes, seconds: float = 4) -> bytes:
        loop = asyncio.get_running_loop()
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.connect((HERE, self.port))
            await loop.sock_sendall(client, wire)
            return await asyncio.wait_for(loop.sock_recv(client, 65535), seconds)

    def count(self, source: str, answer: str) -> float:
        return (
            self.metrics.registry.get_sample_value("waggle_dns_requests_total", {"source": source, "answer": answer})
            or 0.0
        )


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: made.upstream, (HERE, made.upstream_port))
    stream = await asyncio.start_server(made.upstream.stream, HERE, made.upstream_port)
    task = asyncio.create_task(made.server.run())
    async with asyncio.timeout(5):
        while not made.server.listening:  # noqa: ASYNC110 (a flag is what it has)
            await asyncio.sleep(0.005)
    yield made
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    transport.close()
    stream.close()


def addresses(reply: dns.message.Message) -> list[str]:
    return [item.to_text() for rrset in reply.answer for item in rrset if rrset.rdtype == dns.rdatatype.A]


async def test_a_service(bench: Bench) -> None:
    for reply in (await bench.udp("Web.Default.svc.cluster.local"), await bench.tcp("Web.Default.svc.cluster.local")):
        assert addresses(reply) == ["10.96.0.1"] and reply.rcode() == dns.rcode.NOERROR
        assert reply.flags & dns.flags.AA and reply.flags & dns.flags.RA
        assert str(reply.answer[0].name) == "Web.Default.svc.cluster.local.", "as it was asked for"
    assert bench.upstream.asked == [] and bench.count("own", "NOERROR") == 2


async def test_negative_answers_carry_the_zone(bench: Bench) -> None:
    missing = await bench.udp("nope.default.svc.cluster.local")
    assert missing.rcode() == dns.rcode.NXDOMAIN
    nothing = await bench.udp("web.default.svc.cluster.local", "AAAA")
    assert nothing.rcode() == dns.rcode.NOERROR and not nothing.answer
    for reply in (missing, nothing):
        (soa,) = reply.authority
        assert str(soa.name) == "cluster.local." and soa.rdtype == dns.rdatatype.SOA and soa[0].minimum == soa.ttl == 5


async def test_what_does_not_fit_is_cut_and_whole_by_tcp(bench: Bench) -> None:
    for more, room in (({}, 512), ({"use_edns": 0, "payload": 900}, 900), ({"use_edns": 0, "payload": 65535}, 1232)):
        wire = await bench.raw(dns.message.make_query("many.default.svc", "A", **more).to_wire())
        reply = dns.message.from_wire(wire)
        assert len(wire) <= room and reply.flags & dns.flags.TC
        assert (reply.edns == 0) is bool(more)
    assert len(addresses(await bench.tcp("many.default.svc"))) == 200


async def test_several_questions_on_one_connection(bench: Bench) -> None:
    reader, writer = await asyncio.open_connection(HERE, bench.port)
    for name in ("web.default.svc", "nope.default.svc", "one.example"):
        wire = dns.message.make_query(name, "A").to_wire()
        writer.write(len(wire).to_bytes(2, "big") + wire)
    for code in ("NOERROR", "NXDOMAIN", "NOERROR"):
        wire = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        assert dns.rcode.to_text(dns.message.from_wire(wire).rcode()) == code
    writer.close()


async def test_other_names_are_forwarded(bench: Bench) -> None:
    assert addresses(await bench.udp("one.example")) == ["192.0.2.1"]
    assert (await bench.udp("nope.test")).rcode() == dns.rcode.NXDOMAIN
    assert (await bench.udp("big.example")).flags & dns.flags.TC
    assert len(addresses(await bench.tcp("big.example"))) == 199
    assert bench.upstream.asked == [
        "one.example. A udp",
        "nope.test. A udp",
        "big.example. A udp",
        "big.example. A tcp",
    ]
    assert bench.count("forwarded", "NOERROR") == 3


async def test_an_external_name_is_followed(bench: Bench) -> None:
    reply = await bench.udp("far.default.svc.cluster.local")
    assert reply.answer[0].rdtype == dns.rdatatype.CNAME and addresses(reply) == ["192.0.2.1"]


async def test_resolvers_change(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_forward, "TIMEOUT_SECONDS", 0.2)
    bench.upstream.silent = True
    assert (await bench.udp("one.example")).rcode() == dns.rcode.SERVFAIL
    bench.upstream.silent = False
    bench.resolv_conf.write_text(f"nameserver 127.0.0.9\nnameserver {HERE}\n")  # nobody is at the first
    assert addresses(await bench.udp("one.example")) == ["192.0.2.1"]
    bench.resolv_conf.unlink()
    assert (await bench.udp("one.example")).rcode() == dns.rcode.SERVFAIL
    assert str(bench.resolv_conf) in bench.server.problems()[0].reason
    bench.resolv_conf.write_text(f"nameserver {HERE}\n")
    assert addresses(await bench.udp("one.example")) == ["192.0.2.1"] and bench.server.problems() == []


def test_it_never_asks_itself(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 169.254.53.53\nnameserver 192.0.2.53\n")
    forwarder = Forwarder(("169.254.53.53",), file)
    assert forwarder.resolvers() == ["192.0.2.53"] and forwarder.problems() == []
    file.write_text("nameserver 169.254.53.53\n")
    os.utime(file, ns=(1, 1))
    assert forwarder.resolvers() == [] and "names no resolver but this one" in forwarder.problems()[0].reason


async def test_strangers_get_nothing(bench: Bench) -> None:
    bench.clients = {"10.244.1.2"}
    with pytest.raises(TimeoutError):
        await bench.raw(dns.message.make_query("web.default.svc", "A").to_wire(), 0.3)
    with pytest.raises(EOFError):
        await bench.tcp("one.example")
    assert bench.upstream.asked == [] and bench.count("none", "dropped") == 2


async def test_what_is_not_known_yet_is_not_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.is_ready, bench.clients = False, None
    late = asyncio.create_task(bench.udp("later.default.svc.cluster.local"))
    await asyncio.sleep(0.2)
    assert not late.done()
    bench.store.upsert(service("later", HTTP, cluster_ip="10.96.0.9"), "test")
    bench.is_ready, bench.clients = True, {HERE}
    assert addresses(await late) == ["10.96.0.9"]
    monkeypatch.setattr(dns_server, "PATIENCE_SECONDS", 0.1)
    bench.is_ready = False
    assert (await bench.udp("later.default.svc.cluster.local")).rcode() == dns.rcode.SERVFAIL
    assert addresses(await bench.udp("one.example")) == ["192.0.2.1"], "other names do not wait"


async def test_questions_that_are_none(bench: Bench) -> None:
    def code(wire: bytes) -> str:
        return dns.rcode.to_text(dns.message.from_wire(wire).rcode())

    query = dns.message.make_query("web.default.svc", "A")
    query.set_opcode(dns.opcode.UPDATE)
    assert code(await bench.raw(query.to_wire())) == "NOTIMP"
    assert code(await bench.raw(dns.message.make_query("web.default.svc", "AXFR").to_wire())) == "REFUSED"
    assert code(await bench.raw(dns.message.make_query("version.bind", "TXT", "CH").to_wire())) == "REFUSED"
    assert code(await bench.raw(dns.message.make_query("web.default.svc", "A", use_edns=1).to_wire())) == "BADVERS"
    assert code(await bench.raw(b"\x12\x34" + bytes(10))) == "FORMERR"
    assert code(await bench.raw(query.to_wire()[:14])) in ("FORMERR", "NOTIMP")
    for nothing in (b"", b"x", dns.message.make_response(dns.message.make_query("a", "A")).to_wire()):
        with pytest.raises(TimeoutError):
            await bench.raw(nothing, 0.2)
    assert addresses(await bench.udp("web.default.svc")) == ["10.96.0.1"]


@given(st.binary(max_size=80))
def test_random_bytes_are_an_answer_or_nothing(wire: bytes) -> None:
    try:
        read_query(wire)
    except Unanswerable as refused:
        assert refused.reply is None or refused.reply.to_wire()[:2] == wire[:2]


async def test_a_taken_port_is_told_with_its_holder(bench: Bench) -> None:
    second = DnsServer(
        [HERE],
        ServiceNames(bench.store, "cluster.local"),
        bind=lambda: bind_all([HERE], bench.port),
        ready=lambda: True,
        clients=lambda: {HERE},
        requests=Metrics().dns_requests,
        forwarder=bench.forwarder,
    )
    task = asyncio.create_task(second.run())
    async with asyncio.timeout(5):
        while not second.problems():  # noqa: ASYNC110 (a list is what it has)
            await asyncio.sleep(0.01)
    assert f"cannot listen on {HERE} port {bench.port}" in second.problems()[0].reason
    assert f"(pid {os.getpid()})" in second.problems()[0].reason
    task.cancel()


async def test_one_client_cannot_take_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_server, "MOST_PER_CLIENT", 5)
    bench.upstream.silent = True
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        for _ in range(50):
            client.sendto(dns.message.make_query("one.example", "A").to_wire(), (HERE, bench.port))
    async with asyncio.timeout(5):
        while bench.count("none", "overload") < 45:  # noqa: ASYNC110 (a counter is what it has)
            await asyncio.sleep(0.01)
    assert len(bench.upstream.asked) == 0
