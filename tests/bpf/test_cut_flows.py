"""Flows that policies cut: as they were opened, for both ends, and what opens them again."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest
from packets import CLIENT, REMOTE, A, B, both, tcp, udp
from sandboxes import sandbox_of

from waggle.abi._generated import Conn, PolicyFlag, PolicyKey, PolicyRun, PolicyState, PolicyStep
from waggle.kernel.netns import call_in_netns
from waggle.testing.machine import DROP, REDIRECT, Machine

ANY_CLASS = 2**64 - 1
IN = 22  # B is asked by this set; what it sends is its own affair
hooks = pytest.mark.parametrize("peer", [A, REMOTE], ids=["here", "elsewhere"])


def middle(source: str, sport: int, target: str, dport: int) -> bytes:
    """Of a TCP connection."""
    return tcp(source, sport, target, dport, flags="A")


class Guarded:
    """B with policies about who may ask it."""

    def __init__(self, node: Machine) -> None:
        self.node = node
        self.revision = 0
        for v in (4, 6):
            node.add_pod(B[v], 102, ingress=IN)
        self.say(allowed=True)

    def say(self, *, allowed: bool, keep: bool = False) -> None:
        """Everybody may ask B, or nobody."""
        verdict = int(PolicyFlag.ALLOW) if allowed else 0
        self.revision += 1
        self.node.maps["wag_policy_steps"].update(bytes(4), PolicyStep(0, 7, verdict, 0, 0).pack())
        self.node.maps["wag_policy"].update(PolicyKey(IN, ANY_CLASS).pack(), PolicyRun(0, 1).pack())
        self.node.maps["wag_policy_state"].update(bytes(4), PolicyState(self.revision, int(keep)).pack())

    def to_b(self, packet: bytes, source: str) -> int:
        hook = "wag_pod_egress" if source in A.values() else "wag_node_ingress"
        return self.node.run(hook, packet).verdict

    def from_b(self, packet: bytes) -> int:
        return self.node.run("wag_pod_egress", packet).verdict


@pytest.fixture
def guarded(node: Machine) -> Guarded:
    return Guarded(node)


@both
@hooks
def test_a_connection_is_cut_for_who_was_asked_too(guarded: Guarded, v: int, peer: dict[int, str]) -> None:
    source = peer[v]
    assert guarded.to_b(tcp(source, 1000, B[v], 80), source) == REDIRECT
    assert guarded.from_b(tcp(B[v], 80, source, 1000, flags="SA")) == REDIRECT
    guarded.say(allowed=False)
    for _ in range(2):
        assert guarded.from_b(tcp(B[v], 80, source, 1000, flags="PA")) == DROP
        assert guarded.to_b(tcp(source, 1000, B[v], 80, flags="A"), source) == DROP
    assert guarded.to_b(tcp(source, 1000, B[v], 80), source) == DROP  # begins anew
    guarded.say(allowed=True)
    assert guarded.from_b(tcp(B[v], 80, source, 1000, flags="PA")) == REDIRECT
    assert guarded.to_b(tcp(source, 1000, B[v], 80, flags="A"), source) == REDIRECT


@both
@hooks
def test_an_answer_on_its_way_does_not_open_what_was_cut(guarded: Guarded, v: int, peer: dict[int, str]) -> None:
    source = peer[v]
    assert guarded.to_b(udp(source, 1000, B[v], 53), source) == REDIRECT
    guarded.say(allowed=False)
    assert guarded.from_b(udp(B[v], 53, source, 1000)) == DROP
    assert guarded.to_b(udp(source, 1000, B[v], 53), source) == DROP
    assert guarded.from_b(udp(B[v], 53, source, 1001)) == REDIRECT  # what it begins itself


@both
@pytest.mark.parametrize(("make", "opens"), [(udp, True), (middle, False)], ids=["udp", "tcp"])
def test_half_a_minute_later_a_datagram_is_no_answer_any_more(
    guarded: Guarded, v: int, make: Callable[..., bytes], opens: bool
) -> None:
    assert guarded.to_b(make(A[v], 1000, B[v], 53), A[v]) == REDIRECT
    guarded.say(allowed=False)
    assert guarded.from_b(make(B[v], 53, A[v], 1000)) == DROP
    conns = guarded.node.maps["wag_conns"]
    ((key, raw),) = list(conns.dump())
    conn = Conn.unpack(raw)
    conns.update(key, conn._replace(seen_ns=(conn.seen_ns - 31 * 10**9) % 2**64).pack())
    guarded.node.forget_open_flows(older=31)
    assert guarded.from_b(make(B[v], 53, A[v], 1000)) == (REDIRECT if opens else DROP)


@both
def test_who_was_asked_may_begin_a_connection_of_its_own(guarded: Guarded, v: int) -> None:
    assert guarded.to_b(tcp(A[v], 1000, B[v], 80), A[v]) == REDIRECT
    guarded.say(allowed=False)
    assert guarded.from_b(tcp(B[v], 80, A[v], 1000, flags="A")) == DROP
    assert guarded.from_b(tcp(B[v], 80, A[v], 1000)) == REDIRECT
    assert guarded.to_b(tcp(A[v], 1000, B[v], 80, flags="SA"), A[v]) == REDIRECT


def test_kept_flows_go_on_in_both_directions(guarded: Guarded) -> None:
    assert guarded.to_b(tcp(CLIENT[4], 1000, B[4], 80), CLIENT[4]) == REDIRECT
    guarded.say(allowed=False, keep=True)
    assert guarded.from_b(tcp(B[4], 80, CLIENT[4], 1000, flags="A")) == REDIRECT
    assert guarded.to_b(tcp(CLIENT[4], 1000, B[4], 80, flags="A"), CLIENT[4]) == REDIRECT


# -- connections that are not known: begun before there was a policy, or evicted --------------------------------------

NETNS_ID = 8  # of the pod B's namespace, as the node's knows it


@pytest.fixture(scope="module")
def sandbox(loaded: Machine) -> Iterator[str]:
    """That of pod B."""
    with sandbox_of(loaded, "cut", B, NETNS_ID) as name:
        yield name


@pytest.fixture
def closed(guarded: Guarded, sandbox: str) -> Guarded:
    """Nobody may ask B, which has sockets."""
    for v in (4, 6):
        guarded.node.add_pod(B[v], 102, netns=NETNS_ID, ingress=IN)
    guarded.say(allowed=False)
    return guarded


def listens(v: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET if v == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    sock.bind(("::" if v == 6 else "", 80))
    sock.listen()
    return sock


def connects(v: int, peer: str) -> socket.socket:
    """Waits for its answer, which is as good as connected."""
    sock = socket.socket(socket.AF_INET if v == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.bind((B[v], 80))
    with contextlib.suppress(BlockingIOError):
        sock.connect((peer, 1000))
    return sock


@both
@hooks
def test_a_pod_that_listens_was_asked(closed: Guarded, sandbox: str, v: int, peer: dict[int, str]) -> None:
    source = peer[v]
    with call_in_netns(f"/run/netns/{sandbox}", lambda: listens(v)):
        assert closed.from_b(tcp(B[v], 80, source, 1000, flags="PA")) == DROP
        assert closed.to_b(tcp(source, 1000, B[v], 80, flags="A"), source) == DROP
        closed.say(allowed=True)
        assert closed.from_b(tcp(B[v], 80, source, 1000, flags="PA")) == REDIRECT
        closed.say(allowed=False)
        assert closed.to_b(tcp(source, 1000, B[v], 80, flags="A"), source) == DROP  # it was opened by the other end


@both
@hooks
def test_a_pod_that_is_connected_and_does_not_listen_has_asked(
    closed: Guarded, sandbox: str, v: int, peer: dict[int, str]
) -> None:
    source = peer[v]
    with call_in_netns(f"/run/netns/{sandbox}", lambda: connects(v, source)):
        assert closed.to_b(tcp(source, 1000, B[v], 80, flags="A"), source) == REDIRECT
        assert closed.from_b(tcp(B[v], 80, source, 1000, flags="PA")) == REDIRECT


@both
def test_where_no_socket_tells_either_end_may_have_asked(closed: Guarded, sandbox: str, v: int) -> None:
    assert closed.from_b(tcp(B[v], 80, A[v], 1000, flags="FA")) == REDIRECT
    assert closed.to_b(tcp(A[v], 1000, B[v], 80, flags="A"), A[v]) == REDIRECT
    assert closed.to_b(tcp(A[v], 1000, B[v], 80), A[v]) == REDIRECT  # of an open flow
    assert closed.to_b(tcp(A[v], 1001, B[v], 80), A[v]) == DROP
