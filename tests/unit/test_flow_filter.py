"""Which events the questions of `waggle flows` let through."""

from __future__ import annotations

import pytest

from waggle.abi._generated import Event, EventKind, Hook, Outcome, Reason
from waggle.abi.address import PROTOCOLS, pack_address
from waggle.observe.events import Seen
from waggle.observe.flow_filter import parse_duration, parse_filter

CLIENT, WEB, DNS, VIP, WORLD = "10.244.1.10", "10.244.2.10", "fd00:10:244:2::53", "10.96.0.10", "203.0.113.9"
NAMES = {CLIENT: "pod shop/client-7d", WEB: "pod shop/web-1", DNS: "pod kube-system/dns", "192.0.2.1": "node n1"}
ENDPOINTS = {"shop/web": frozenset((WEB,)), "default/dns": frozenset((DNS,))}


def seen(
    source: str = CLIENT,
    target: str = WEB,
    dport: int = 80,
    *,
    proto: str = "TCP",
    backend: str = "",
    bport: int = 0,
    service: str = "",
    verdict: Outcome = Outcome.FORWARDED,
    reason: Reason = Reason.NONE,
) -> Seen:
    kind = EventKind.FLOW if verdict is Outcome.FORWARDED else EventKind.DROP
    event = Event(
        *(1, 0, 1, 0),
        *(pack_address(text) if text else bytes(16) for text in (source, target, backend)),
        *(40000, dport, bport, PROTOCOLS[proto], kind, Hook.POD_EGRESS, reason, verdict, 0, 7, 0, 0),
    )
    return Seen(1, 0.0, event.pack(), *(NAMES.get(one, "") for one in (source, target, backend)), service, None, ())


DIRECT = seen()
ASKED = seen(target=VIP, backend=WEB, bport=8080, service="shop/web")
OUT = seen(target=WORLD, dport=443)
PROBE = seen("192.0.2.1", CLIENT, 8443)
LOOKUP = seen("", DNS, 53, proto="UDP")  # of a socket, which has no address yet
REFUSED = seen(target=VIP, service="shop/web", verdict=Outcome.REJECTED, reason=Reason.NO_BACKEND)
ALL = {"DIRECT": DIRECT, "ASKED": ASKED, "OUT": OUT, "PROBE": PROBE, "LOOKUP": LOOKUP, "REFUSED": REFUSED}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "DIRECT ASKED OUT PROBE LOOKUP REFUSED"),
        ({"from": ["shop/client-7d"]}, "DIRECT ASKED OUT REFUSED"),
        ({"from": ["shop/client-*"]}, "DIRECT ASKED OUT REFUSED"),
        ({"from": ["client-7d"]}, ""),  # of default
        ({"from": ["shop/"]}, "DIRECT ASKED OUT REFUSED"),
        ({"from": ["sho/"]}, ""),
        ({"from": [CLIENT]}, "DIRECT ASKED OUT REFUSED"),
        ({"from": ["192.0.2.0/24"]}, "PROBE"),
        ({"from": ["0.0.0.0/0"]}, "DIRECT ASKED OUT PROBE REFUSED"),
        ({"from": ["::/0"]}, ""),
        ({"from": ["node:n1"]}, "PROBE"),
        ({"from": ["node:*", "shop/"]}, "DIRECT ASKED OUT PROBE REFUSED"),
        ({"to": ["shop/web-1"]}, "DIRECT ASKED"),
        (
            {"to": ["shop/web"]},
            "DIRECT ASKED REFUSED",
        ),  # the Service: who asked it, and who reached one of its endpoints
        ({"to": ["service:shop/web"]}, "DIRECT ASKED REFUSED"),
        ({"to": ["pod:shop/web"]}, ""),
        ({"to": ["dns"]}, "LOOKUP"),
        ({"to": ["kube-system/"]}, "LOOKUP"),
        ({"to": ["fd00:10:244:2::/64"]}, "LOOKUP"),
        ({"to": [VIP]}, "ASKED REFUSED"),
        ({"to": [WEB]}, "DIRECT ASKED"),
        ({"service": ["shop/web"]}, "ASKED REFUSED"),
        ({"service": ["shop/*"]}, "ASKED REFUSED"),
        ({"service": ["web"]}, ""),
        ({"verdict": ["forwarded"]}, "DIRECT ASKED OUT PROBE LOOKUP"),
        ({"verdict": ["rejected"]}, "REFUSED"),
        ({"verdict": ["dropped"]}, ""),
        ({"verdict": ["drop"]}, "REFUSED"),
        ({"verdict": ["dropped", "forwarded"]}, "DIRECT ASKED OUT PROBE LOOKUP"),
        ({"port": ["80"]}, "DIRECT ASKED REFUSED"),
        ({"port": ["8080"]}, "ASKED"),
        ({"port": ["0"]}, ""),  # no backend is no port 0
        ({"port": ["8000-9000", "53"]}, "ASKED PROBE LOOKUP"),
        ({"proto": ["UDP"]}, "LOOKUP"),
        ({"proto": ["6", "udp"]}, "DIRECT ASKED OUT PROBE LOOKUP REFUSED"),
        ({"proto": ["icmp"]}, ""),
        ({"reason": ["no_backend", "policy_egress"]}, "REFUSED"),
        ({"from": ["shop/"], "port": ["443"]}, "OUT"),
        ({"from": ["shop/"], "proto": ["udp"]}, ""),
    ],
)
def test_questions(asked, expected: str):
    wanted = parse_filter(asked)
    assert [name for name, one in ALL.items() if wanted.wants(one, lambda key: ENDPOINTS.get(key, frozenset()))] == (
        expected.split()
    )


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        ("from", "", "no pod"),
        ("from", "a/b/c", "no pod"),
        ("to", "10.0.0.1/8", "host bits"),
        ("to", "node:", "no pod"),
        ("service", "web!", "no pod"),
        ("verdict", "denied", "one of forwarded, dropped, rejected, audit"),
        ("port", "70000", "no port, or more"),
        ("port", "90-80", "no port, or more"),
        ("port", "-1", "no port"),
        ("proto", "http", "no protocol"),
        ("reason", "because", "one of malformed"),
        ("colour", "red", "one of from"),
    ],
)
def test_what_is_no_answer(question: str, answer: str, words: str):
    with pytest.raises(ValueError, match=f"^{question}: .*{words}"):
        parse_filter({question: [answer]})


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("1h30m", 5400), ("90", 90), ("1.5s", 1.5), ("250ms", 0.25), ("2d", 172800)]
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5 m", "5x", "-5m", "5m!", "now"])
def test_no_durations(text: str):
    with pytest.raises(ValueError, match="is no time such as"):
        parse_duration(text)
