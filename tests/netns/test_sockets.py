"""Services as programs see them: every kind of socket call, and what no socket hook saw, in a lab of two nodes.

All cases are data. A case is a list of (step, what must come of it). Steps are those of `socket_cases.Talk`; in both
texts `<near>` stands for address and port, `[asker]` for an address, both as a socket of the case's family writes them,
and `(asker)` for an address as the server says it. `|` separates what may come as well. Targets:

    near far both own …   a Service's cluster address          near@node1   its NodePort on a node, @loopback, @any
    near-1                a pod's own address, port 8080       near-1:7     another port of it, or of a Service

`asker` and `near-1` are pods on node1, `far-1` is one on node2. A `bare` origin is a process in that pod's network, but
outside the node's cgroup: no socket hook sees it, its packets are translated one by one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lab_machine import Lab, pod, service, unique_name

from waggle.lab import namespaces, processes
from waggle.model.objects import ObjectKey

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

PROGRAM = [sys.executable, str(Path(__file__).with_name("socket_cases.py"))]
FORMS = ("v4", "v6", "mapped")
FAMILIES = ("v4", "v6")
UDP_PORTS = range(9000, 9010)
#: Which pods serve, and on which node they are.
BACKENDS = {
    "near": {"near-1": "node1"},
    "far": {"far-1": "node2"},
    "both": {"near-1": "node1", "far-1": "node2"},
    "own": {"own-1": "node1"},  # on the node's own network
    "twin": {"near-1": "node1"},  # a second Service in front of the same pod
    "many": {"near-1": "node1"},  # ten UDP ports
    "closed": {"near-1": "node1"},  # nobody listens on its target port
    "none": {},
    "distant": {"distant-1": "node2"},  # for ICMP: never spoken to per packet, which may change a port, see below
}
NUMBERS = {name: number for number, name in enumerate(BACKENDS, 1)}
MEGABYTE = 1 << 20
#: Of the lab's Service ranges; no Service has it.
FREE = ("10.96.9.9", "fd00:10:96::9999")

Steps = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    name: str
    origin: str
    form: str
    steps: Steps

    def __str__(self) -> str:
        return f"{self.origin}-{self.form}-{self.name}"


# -- the lab ---------------------------------------------------------------------------------------------------------


def manifest() -> list[dict[str, Any]]:
    def server(name: str, node: str, labels: dict[str, str], **spec: Any) -> dict[str, Any]:
        command = [*PROGRAM, "serve", name, "8080", "8080", *map(str, UDP_PORTS)]
        ports = [("TCP", 8080), ("UDP", 8080), *(("UDP", port) for port in UDP_PORTS)]
        made = pod(name, *command, ports=ports, nodeName=node, **spec)
        made["metadata"]["labels"] = labels
        return made

    def named(name: str, selector: dict[str, str], target: int = 8080) -> dict[str, Any]:
        number = NUMBERS[name]
        ports = [(protocol, 80, target, 30700 + number) for protocol in ("TCP", "UDP")]
        if name == "many":
            ports = [("UDP", port, port, 30800 + port - UDP_PORTS[0]) for port in UDP_PORTS]
        return service(
            name,
            type="NodePort",
            selector=selector,
            clusterIPs=[f"10.96.7.{number}", f"fd00:10:96::7:{number}"],
            ports=[
                {
                    "name": f"{protocol}-{port}".lower(),
                    "protocol": protocol,
                    "port": port,
                    "targetPort": to,
                    "nodePort": at,
                }
                for protocol, port, to, at in ports
            ],
        )

    return [
        server("near-1", "node1", {"on": "pod", "side": "near"}),
        server("far-1", "node2", {"on": "pod", "side": "far"}),
        server("distant-1", "node2", {"side": "distant"}),
        server("own-1", "node1", {"on": "node"}, hostNetwork=True),
        pod("asker", "sleep", "infinity", nodeName="node1"),
        named("near", {"side": "near"}),
        named("far", {"side": "far"}),
        named("both", {"on": "pod"}),
        named("own", {"on": "node"}),
        named("twin", {"side": "near"}),
        named("many", {"side": "near"}),
        named("closed", {"side": "near"}, target=9),
        named("none", {"side": "nowhere"}),
        named("distant", {"side": "distant"}),
    ]


@dataclass
class Sockets:
    """The lab, and what came of cases there so far."""

    lab: Lab
    addresses: dict[str, tuple[str, str]]  # of machines and pods: IPv4, IPv6
    done: dict[Case, list[str]] = field(default_factory=dict)

    def address(self, name: str, form: str) -> str:
        if name in NUMBERS:
            v4, v6 = f"10.96.7.{NUMBERS[name]}", f"fd00:10:96::7:{NUMBERS[name]}"
        else:
            v4, v6 = {"loopback": ("127.0.0.1", "::1"), "any": ("0.0.0.0", "::")}.get(name) or self.addresses[name]
        return {"v4": v4, "v6": v6, "mapped": f"::ffff:{v4}"}[form]

    def end(self, target: str, form: str) -> str:
        """ "address port" of a target."""
        name, _, port = target.partition(":")
        name, _, entry = name.partition("@")
        if entry:
            return f"{self.address(entry, form)} {30700 + NUMBERS[name]}"
        return f"{self.address(name, form)} {port or (80 if name in NUMBERS else 8080)}"

    def text(self, template: str, form: str) -> str:
        plain = "v6" if form == "v6" else "v4"
        template = re.sub(r"<(.+?)>", lambda match: self.end(match[1], form), template)
        template = re.sub(r"\[(.+?)\]", lambda match: self.address(match[1], form), template)
        return re.sub(r"\((.+?)\)", lambda match: self.address(match[1], plain), template)

    def run(self, origin: str, cases: list[Case]) -> list[list[str]]:
        """Runs cases of one origin, all in one process there."""
        steps = [[self.step(step, case.form) for step, _ in case.steps] for case in cases]
        if not origin.startswith("bare "):
            return json.loads(self.lab.run("exec", origin, "--", *PROGRAM, stdin=json.dumps(steps)).stdout)
        name = origin.removeprefix("bare ")
        place = self.lab.layout.pod(ObjectKey("default", name), self.lab.layout.node(1)).place
        outside = self.lab.layout.cgroup / "bare"
        done = processes.run_in(
            place, outside, PROGRAM, env=dict(os.environ), stdin=json.dumps(steps).encode(), timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    def step(self, template: str, form: str) -> list[str | int]:
        words = self.text(template, form).split()
        if words[0] == "open":
            words.append(form)
        return [int(word) if word.isdecimal() else word for word in words]

    def wrong(self, case: Case, results: list[str]) -> str:
        """The steps that gave something else than they must, one a line."""
        return "\n".join(
            f"{case}: {step}: {result}, not {expected}"
            for (step, expected), result in zip(case.steps, results, strict=True)
            if result not in self.text(expected, case.form).split(" | ")
        )


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sockets]:
    lab = Lab(unique_name("w"))
    try:
        lab.run("up", "--nodes", "2")
        lab.apply(tmp_path_factory.mktemp("sockets"), *manifest())
        for netns in namespaces.netns_files(lab.layout):
            # Every port unreachable counts here, in quick succession.
            namespaces.write_sysctls(netns, [("ipv4/icmp_ratelimit", "0"), ("ipv6/icmp/ratelimit", "0")])
        status = lab.status()
        places = [*status["nodes"], *status["pods"], {"name": "client", **status["client"]}]
        addresses = {place["name"]: tuple(place["addresses"]) for place in places}
        for network, hop in zip(("10.96.0.0/16", "fd00:10:96::/64"), addresses["node1"], strict=True):
            lab.run("exec", "client", "--", "ip", "route", "add", network, "via", hop)
        yield Sockets(lab, addresses | {"gateway": ("10.77.0.1", "fd00:77::1"), "free": FREE})
    finally:
        lab.close()


# -- the matrix ------------------------------------------------------------------------------------------------------

#: TO: the target; ME: the origin; WIRE: whom the kernel sends to; ANSWER: from a backend that sees the right client.
CALLS: dict[str, Steps] = {
    "tcp": (
        ("open tcp", "ok"),
        ("connect <TO>", "ok"),
        ("peer", "<TO>"),
        ("wire", "WIRE"),
        ("local", "[ME]"),
        ("ask", "ANSWER"),
        ("peer", "<TO>"),
    ),
    "tcp-nonblocking": (
        ("open tcp", "ok"),
        ("connect_nonblocking <TO>", "ok"),
        ("peer", "<TO>"),
        ("ask", "ANSWER"),
    ),
    "tcp-fastopen": (("open tcp", "ok"), ("connect_by_sending <TO>", "ANSWER"), ("peer", "<TO>")),
    "udp-connected": (
        ("open udp", "ok"),
        ("connect <TO>", "ok"),
        ("peer", "<TO>"),
        ("wire", "WIRE"),
        ("local", "[ME]"),
        ("ask", "ANSWER"),
        ("send", "ok"),
        ("receive", "ANSWER, from <TO>"),
    ),
    "udp-sendto": (("open udp", "ok"), *[("ask_to <TO>", "ANSWER, from <TO>")] * 3),
    "udp-sendmsg": (("open udp", "ok"), *[("ask_by_message <TO>", "ANSWER, from <TO>")] * 3),
}
#: Origin, and the ways in that it tries: "" is the cluster address.
WAYS_IN = {
    "asker": ("", "@node1", "@node2"),
    "node1": ("", "@node1", "@node2", "@loopback"),
    "client": ("@node1", "@node2"),
    "bare asker": ("", "@node1", "@node2"),
}
SERVED = ("near", "far", "both", "own")


def translated_in_socket(origin: str, entry: str) -> bool:
    return origin in ("asker", "node1") and entry != "@node2"


def seen(origin: str, entry: str, node: str, backend: str) -> str:
    """Whom a backend on `node` sees."""
    me = origin.removeprefix("bare ")
    if backend == me:  # a pod that reaches itself: the answer must come back to the node
        return entry[1:] or "node1"
    if translated_in_socket(origin, entry) or entry == "" or (me != "client" and entry == "@node1"):
        return me
    return me if entry == f"@{node}" else entry[1:]


def row(origin: str, form: str, call: str, name: str, entry: str) -> Case:
    answers, wire = [], []
    for backend, node in BACKENDS[name].items():
        answers.append(f"{backend} saw ({seen(origin, entry, node, backend)})")
        wire.append(f"<{backend}>")
    steps = []
    for step, expected in CALLS[call]:
        if "ANSWER" in expected:
            expected = " | ".join(expected.replace("ANSWER", answer) for answer in answers)
        if expected == "WIRE":
            expected = " | ".join(wire) if translated_in_socket(origin, entry) else "<TO>"
        texts = [text.replace("TO", name + entry) for text in (step, expected)]
        steps.append((texts[0], texts[1].replace("ME", origin.removeprefix("bare "))))
    return Case(f"{call}-{name}{entry}", origin, form, tuple(steps))


MATRIX = [
    row(origin, form, call, name, entry)
    for origin, entries in WAYS_IN.items()
    for entry in entries
    for name in SERVED
    for call in CALLS
    for form in FORMS
] + [
    row("bare near-1", form, call, "near", entry)
    for entry in ("", "@node1", "@node2")
    for call in CALLS
    for form in FORMS
]


def asked(sockets: Sockets, case: Case, cases: list[Case]) -> list[str]:
    """What came of the case; runs all of its origin the first time."""
    if case not in sockets.done:
        batch = [other for other in cases if other.origin == case.origin]
        sockets.done.update(zip(batch, sockets.run(case.origin, batch), strict=True))
    return sockets.done[case]


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix(sockets: Sockets, case: Case) -> None:
    assert not sockets.wrong(case, asked(sockets, case, MATRIX))


@pytest.mark.parametrize("origin", WAYS_IN)
def test_every_backend_gets_its_share(sockets: Sockets, origin: str) -> None:
    for entry in WAYS_IN[origin]:
        cases = [case for case in MATRIX if case.origin == origin and case.name.endswith(f"-both{entry}")]
        answers = " ".join(line for case in cases for line in asked(sockets, case, MATRIX))
        assert {"near-1 saw", "far-1 saw"} == set(re.findall(r"\S+ saw", answers)), entry


# -- one socket, several peers ----------------------------------------------------------------------------------------


def both_ways(name: str, *steps: tuple[str, str], origins: tuple[str, ...] = ("asker",), forms=FORMS) -> list[Case]:
    """The case from every origin in every form; ME is the origin."""

    def of(origin: str) -> Steps:
        return tuple((step, expected.replace("ME", origin.removeprefix("bare "))) for step, expected in steps)

    return [Case(name, origin, form, of(origin)) for origin in origins for form in forms]


def ask_to(target: str, backend: str) -> tuple[str, str]:
    return f"ask_to <{target}>", f"{backend} saw (ME), from <{target}>"


def connect_and_ask(target: str, backend: str) -> list[tuple[str, str]]:
    return [
        (f"connect <{target}>", "ok"),
        ("peer", f"<{target}>"),
        ("ask", f"{backend} saw (ME)"),
    ]


TCP, UDP = ("open tcp", "ok"), ("open udp", "ok")
MANY = [f"many:{port}" for port in UDP_PORTS]
SEQUENCES = [
    *both_ways("udp-alternates", UDP, *[ask_to("near", "near-1"), ask_to("far", "far-1")] * 3),
    *both_ways("udp-more-services-than-slots", UDP, *[ask_to(target, "near-1") for target in MANY * 2]),
    *both_ways(
        "udp-eight-in-flight",
        UDP,
        *[(f"send_to <{target}>", "ok") for target in MANY[:8]],
        ("receive_all 8", "; ".join(f"near-1 saw (ME), from <{target}>" for target in MANY[:8])),
    ),
    *both_ways(
        "udp-ten-in-flight",
        UDP,
        *[(f"send_to <{target}>", "ok") for target in MANY],
        ("receive_all 10", "; ".join(f"near-1 saw (ME), from <{target}>" for target in MANY)),
    ),
    *both_ways(
        "udp-two-services-one-backend-late-answer",
        UDP,
        ask_to("near", "near-1"),
        ("send_to <twin>", "ok"),
        ("send_to <many:9000>", "ok"),
        ("receive_all 2", "near-1 saw (ME), from <twin>; near-1 saw (ME), from <many:9000>"),
    ),
    *both_ways("udp-two-services-one-backend", UDP, *[ask_to("near", "near-1"), ask_to("twin", "near-1")] * 3),
    *both_ways("udp-pod-directly-then-service", UDP, *[ask_to("near-1", "near-1"), ask_to("near", "near-1")] * 2),
    *both_ways("udp-service-then-pod-directly", UDP, *[ask_to("near", "near-1"), ask_to("near-1", "near-1")] * 2),
    *both_ways(
        "udp-pod-directly-beside-a-service-in-flight",
        UDP,
        ask_to("near", "near-1"),
        ask_to("near-1", "near-1"),
        ask_to("far", "far-1"),
        ask_to("near-1:9003", "near-1"),
        ask_to("near", "near-1"),
    ),
    *both_ways(
        "udp-connects-again",
        UDP,
        *connect_and_ask("near", "near-1"),
        *connect_and_ask("far", "far-1"),
        *connect_and_ask("far-1", "far-1"),
        ("send", "ok"),
        ("receive", "far-1 saw (ME), from <far-1>"),
        *connect_and_ask("twin", "near-1"),
        *connect_and_ask("near-1", "near-1"),
        *connect_and_ask("near", "near-1"),
    ),
    *both_ways(
        "udp-disconnects",
        UDP,
        *connect_and_ask("near", "near-1"),
        ("disconnect", "ok"),
        ("peer", "ENOTCONN"),
        # Not far: an IPv6 socket of Linux goes on hearing only the address that it was connected to.
        ask_to("near-1", "near-1"),
        ask_to("twin", "near-1"),
        ask_to("near", "near-1"),
        *connect_and_ask("far", "far-1"),
    ),
    *both_ways(
        "udp-connected-and-sendto-the-same",
        *[
            step
            for _ in range(8)
            for step in (
                UDP,
                ("connect <both>", "ok"),
                ("ask_to <both>", "near-1 saw (ME), from <both> | far-1 saw (ME), from <both>"),
                ("peer", "<both>"),
            )
        ],
    ),
    *both_ways(
        "tcp-disconnects-and-connects-again",
        TCP,
        *connect_and_ask("near", "near-1"),
        ("disconnect", "ok"),
        ("peer", "ENOTCONN"),
        *connect_and_ask("far", "far-1"),
        ("disconnect", "ok"),
        *connect_and_ask("far-1", "far-1"),
    ),
    *both_ways(
        "many-connections-at-once",
        *[
            step
            for name in ("near", "far", "twin", "near", "own", "far")
            for step in (TCP, (f"connect <{name}>", "ok"), ("keep", "ok"))
        ],
        *[
            step
            for number, (name, backend) in enumerate(
                [("near", "near-1"), ("far", "far-1"), ("twin", "near-1"), ("near", "near-1"), ("own", "own-1")]
            )
            for step in (
                (f"take {number}", "ok"),
                ("peer", f"<{name}>"),
                ("ask", f"{backend} saw (ME)"),
                ("transfer 20000", "ok"),
                ("ask", f"{backend} saw (ME)"),
            )
        ],
        origins=("asker", "node1", "bare asker"),
    ),
]

# -- refusals --------------------------------------------------------------------------------------------------------

REFUSED = "ECONNREFUSED"
REFUSALS = [
    case
    for target, origins in {
        "none": ("asker", "node1"),
        "none@node1": ("asker", "node1"),
        "none@loopback": ("node1",),
    }.items()
    for case in both_ways(
        f"no-endpoints-{target}",
        TCP,
        (f"connect <{target}>", REFUSED),
        *connect_and_ask("near", "near-1"),
        TCP,
        (f"connect_nonblocking <{target}>", REFUSED),
        UDP,
        (f"connect <{target}>", REFUSED),
        (f"send_to <{target}>", REFUSED),
        (f"ask_by_message <{target}>", REFUSED),
        *connect_and_ask("near", "near-1"),
        (f"connect <{target}>", REFUSED),
        ("peer", "<near>"),
        ("ask", "near-1 saw (ME)"),
        origins=origins,
    )
] + [
    *both_ways(
        "loopback-of-a-pod-is-its-own",
        *[
            step
            for target in ("both@loopback", "both@any")
            for step in (
                TCP,
                (f"connect <{target}>", REFUSED),
                UDP,
                (f"connect <{target}>", "ok"),
                ("ask", REFUSED),
                UDP,
                ("want_errors", "ok"),
                (f"send_to <{target}>", "ok"),
                ("error", "ECONNREFUSED from [loopback]"),
            )
        ],
        origins=("asker", "bare asker"),
        forms=FAMILIES,
    ),
    *both_ways(
        "no-listener",
        *[
            step
            for target in ("closed", "closed@node1", "near-1:7", "far-1:7")
            for step in (
                TCP,
                (f"connect <{target}>", REFUSED),
                UDP,
                (f"connect <{target}>", "ok"),
                ("ask", REFUSED),
            )
        ],
        origins=("asker", "node1"),
    ),
    *both_ways("no-listener-tcp", TCP, ("connect <closed>", REFUSED), origins=("bare asker",)),
    *both_ways(
        "no-listener-tcp",
        TCP,
        ("connect <closed@node1>", REFUSED),
        TCP,
        ("connect <closed@node2>", REFUSED),
        origins=("client",),
    ),
    *both_ways(
        "any-address-of-a-node", TCP, ("connect <near@any>", "ok"), ("ask", "near-1 saw (ME)"), origins=("node1",)
    ),
    *both_ways(
        "no-listener-udp",
        UDP,
        ("connect <near-1:7>", "ok"),
        ("ask", REFUSED),
        UDP,
        ("connect <far-1:7>", "ok"),
        ("ask", REFUSED),
        origins=("bare asker",),
    ),
    *both_ways("no-listener-udp-service", UDP, ("connect <closed>", "ok"), ("ask", REFUSED), origins=("bare asker",)),
    *both_ways(
        "no-listener-udp-nodeport", UDP, ("connect <closed@node1>", "ok"), ("ask", REFUSED), origins=("client",)
    ),
]

# -- ports that no Service defines, addresses that no Service has ------------------------------------------------------

BESIDE = [
    *both_ways(
        "undefined-port",
        TCP,
        ("connect <near:81>", REFUSED),
        TCP,
        ("connect_nonblocking <near:81>", REFUSED),
        UDP,
        # connecting sends nothing: resolvers do it to learn their source address
        ("connect <near:81>", "ok"),
        ("ask", REFUSED),
        *connect_and_ask("near", "near-1"),
        origins=("asker", "node1", "bare asker"),
    ),
    *both_ways(
        "undefined-port-sendto",
        UDP,
        ("send_to <near:81>", REFUSED),
        ask_to("near", "near-1"),
        ("send_to <near:81>", REFUSED),
        ("ask_by_message <near:81>", REFUSED),
        ask_to("near", "near-1"),
        origins=("asker", "node1"),
    ),
    *both_ways("undefined-port", TCP, ("connect <near:81>", REFUSED), origins=("client",)),
    *both_ways("undefined-port", UDP, ("connect <near:81>", "ok"), ("ask", REFUSED), origins=("client",)),
    *both_ways(
        "free-address",
        TCP,
        ("connect <free:80>", "EHOSTUNREACH"),
        UDP,
        ("send_to <free:80>", "EHOSTUNREACH"),
        ("connect <free:80>", "ok"),
        # an IPv6 socket that speaks IPv4 asks for every datagram
        ("ask", "timeout | EHOSTUNREACH"),
        origins=("asker", "node1"),
    ),
    *both_ways("free-address", TCP, ("connect <free:80>", "timeout"), origins=("bare asker", "client"), forms=FAMILIES),
    *both_ways(
        "ping-a-service",
        ("ping [near]", "ok"),
        ("ping [none]", "ok"),
        ("ping [near] 5000", "ok"),
        ("ping [free]", "no answer"),
        origins=("asker", "node1", "bare asker", "client"),
        forms=FAMILIES,
    ),
]

# -- size ------------------------------------------------------------------------------------------------------------


def transfers(origin: str, *targets: str) -> list[Case]:
    return [
        case
        for target in targets
        for case in both_ways(
            f"megabyte-{target}",
            TCP,
            (f"connect <{target}>", "ok"),
            (f"transfer {MEGABYTE}", "ok"),
            origins=(origin,),
            forms=FAMILIES,
        )
    ]


def datagrams(origin: str, *targets: str) -> list[Case]:
    """In fragments, only the first of which has ports."""
    return [
        case
        for target in targets
        for case in both_ways(
            f"fragments-{target}",
            UDP,
            (f"connect <{target}>", "ok"),
            ("datagram 1000", "ok"),
            ("datagram 5000", "ok"),
            origins=(origin,),
            forms=FAMILIES,
        )
    ]


SIZES = [
    *transfers("asker", "near", "far", "own", "near@node1", "far@node2", "near-1", "far-1"),
    *transfers("node1", "near", "far", "far@loopback"),
    *transfers("client", "near@node1", "near@node2", "own@node1", "own@node2"),
    *transfers("bare asker", "near", "far", "own", "near@node1", "far@node1", "far@node2", "near@node2"),
    *transfers("bare near-1", "near", "near@node1", "near@node2"),
    *datagrams("asker", "near", "far", "own", "near-1", "far-1"),
    *datagrams("node1", "near", "far"),
    *datagrams("bare asker", "near", "far"),
    *datagrams("client", "near@node1", "near@node2"),
]

# -- ICMP ------------------------------------------------------------------------------------------------------------

PINGS = {
    "asker": ("near-1", "far-1", "node1", "node2"),
    "node1": ("near-1", "far-1", "asker", "node2"),
    "client": ("node1", "node2"),
    "bare asker": ("near-1", "far-1"),
}


def expired(target: str, hops: int, by: str, origin: str) -> list[Case]:
    return both_ways(
        f"hop-{hops}-towards-{target}",
        UDP,
        ("want_errors", "ok"),
        (f"hop_limit {hops}", "ok"),
        (f"connect <{target}>", "ok"),
        ("send", "ok"),
        ("error", f"EHOSTUNREACH from [{by}]"),
        origins=(origin,),
        forms=FAMILIES,
    )


ICMP = [
    *(
        case
        for origin, targets in PINGS.items()
        for target in targets
        for case in both_ways(f"ping-{target}", (f"ping [{target}]", "ok"), origins=(origin,), forms=FAMILIES)
    ),
    *expired("near-1:7", 1, "node1", "asker"),
    *expired("distant-1", 1, "node1", "asker"),
    *expired("distant-1", 2, "node2", "asker"),
    *expired("distant", 1, "node1", "asker"),
    *expired("distant", 2, "node2", "asker"),
    *expired("distant-1", 1, "node2", "node1"),
    # One port of a pod to a backend through its Service, then directly: waggle gives the second flow another port.
    *both_ways(
        "hop-1-from-a-port-that-is-changed",
        UDP,
        ("bind 20001", "ok"),
        ask_to("far", "far-1"),
        ("want_errors", "ok"),
        ("hop_limit 1", "ok"),
        ("connect <far-1>", "ok"),
        ("send", "ok"),
        ("error", "EHOSTUNREACH from [node1]"),
        origins=("bare asker",),
        forms=FAMILIES,
    ),
]

BEYOND = [*SEQUENCES, *REFUSALS, *BESIDE, *SIZES, *ICMP]


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_beyond_the_matrix(sockets: Sockets, case: Case) -> None:
    assert not sockets.wrong(case, asked(sockets, case, BEYOND))


# -- a narrow path ----------------------------------------------------------------------------------------------------

#: What makes the way from node1 to distant-1 narrower than the pods' interfaces, and what undoes it, as (machine, ip
#: command); how narrow; who says so.
NARROW = {
    # a router on the way
    "router": (
        [
            ("net", "route add [asker] via [node1]"),
            ("net", "route add [distant-1] via [node2] mtu 1400"),
            ("node1", "route add [distant-1] via [gateway]"),
        ],
        [
            ("net", "route del [asker] via [node1]"),
            ("net", "route del [distant-1] via [node2]"),
            ("node1", "route del [distant-1] via [gateway]"),
        ],
        "1400",
        "gateway",
    ),
    # a route of the node; unlocked, bpf_fib_lookup minds it for IPv6 only
    "route": (
        [("node1", "route add [distant-1] via [node2] mtu lock 1390")],
        [("node1", "route del [distant-1] via [node2]")],
        "1390",
        "node1",
    ),
    # the nodes' interfaces
    "uplink": (
        [("node1", "link set eth0 mtu 1380"), ("node2", "link set eth0 mtu 1380")],
        [("node1", "link set eth0 mtu 1500"), ("node2", "link set eth0 mtu 1500")],
        "1380",
        "node1",
    ),
}


def narrow_cases(mtu: str, by: str) -> list[Case]:
    return [
        case
        for target in ("distant-1", "distant")
        for case in [
            *both_ways(
                f"datagram-{target}",
                UDP,
                ("never_fragment", "ok"),
                ("want_errors", "ok"),
                (f"connect <{target}>", "ok"),
                ("mtu", "1500"),
                ("send 1450", "ok"),
                ("error", f"EMSGSIZE {mtu} from [{by}]"),
                ("mtu", mtu),
                ("send 1450", "EMSGSIZE"),
                ("datagram 1300", "ok"),
                forms=FAMILIES,
            ),
            *both_ways(
                f"megabyte-{target}",
                TCP,
                (f"connect <{target}>", "ok"),
                (f"transfer {MEGABYTE}", "ok"),
                ("mtu", mtu),
                forms=FAMILIES,
            ),
        ]
    ]


@contextlib.contextmanager
def narrow(sockets: Sockets, kind: str) -> Iterator[Callable[[], None]]:
    """The path is narrow. The call makes everybody forget what they have learned of it."""

    def ip(place: str, command: str, form: str) -> None:
        netns = sockets.lab.layout.machine(place).netns
        version = "-6" if form == "v6" else "-4"
        subprocess.run(["ip", version, "-netns", netns.name, *sockets.text(command, form).split()], check=True)

    def forget() -> None:
        for place in ("node1", "node2", "pod-default_asker", "pod-default_distant-1"):
            for form in FAMILIES:
                ip(place, "route flush cache", form)

    begin, end, _, _ = NARROW[kind]
    with contextlib.ExitStack() as undo:
        undo.callback(forget)
        for form in FAMILIES:
            for (place, command), (undo_place, undo_command) in zip(begin, end, strict=True):
                ip(place, command, form)
                undo.callback(ip, undo_place, undo_command, form)
        yield forget


@pytest.fixture(scope="module", params=NARROW)
def narrowed(sockets: Sockets, request: pytest.FixtureRequest) -> dict[str, str]:
    """What is wrong with each case while the path is narrow."""
    _, _, mtu, by = NARROW[request.param]
    wrong = {}
    with narrow(sockets, request.param) as forget:
        for case in narrow_cases(mtu, by):
            forget()
            wrong[str(case)] = sockets.wrong(case, sockets.run(case.origin, [case])[0])
    return wrong


@pytest.mark.parametrize("case", [str(case) for case in narrow_cases("", "")])
def test_narrow_path(narrowed: dict[str, str], case: str) -> None:
    assert not narrowed[case]


@pytest.mark.parametrize("origin, target", [("bare asker", "distant"), ("client", "distant@node1")])
def test_narrow_path_behind_a_translation(sockets: Sockets, origin: str, target: str) -> None:
    steps = (TCP, (f"connect <{target}>", "ok"), (f"transfer {MEGABYTE}", "ok"))
    cases = [Case("megabyte", origin, form, steps) for form in FAMILIES]
    with narrow(sockets, "router"):
        results = sockets.run(origin, cases)
    assert [sockets.wrong(case, lines) for case, lines in zip(cases, results, strict=True)] == ["", ""]


# -- without the agents ----------------------------------------------------------------------------------------------

BASIC = [
    case for case in MATRIX if re.fullmatch(r"(tcp|udp-connected|udp-sendto)-both(@node1|@node2|@loopback)?", case.name)
]


@pytest.fixture(scope="module")
def orphaned(sockets: Sockets) -> Iterator[dict[Case, list[str]]]:
    """What came of the basic cases while no agent was alive."""
    for node in ("node1", "node2"):
        os.kill(sockets.lab.agent_pid(node), signal.SIGKILL)
    try:
        assert {node["agent"]["state"] for node in sockets.lab.status()["nodes"]} == {"dead"}
        done: dict[Case, list[str]] = {}
        for origin in WAYS_IN:
            batch = [case for case in BASIC if case.origin == origin]
            done.update(zip(batch, sockets.run(origin, batch), strict=True))
        assert {node["agent"]["state"] for node in sockets.lab.status()["nodes"]} == {"dead"}
    finally:
        sockets.lab.run("up")
    yield done


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_without_agents(sockets: Sockets, orphaned: dict[Case, list[str]], case: Case) -> None:
    assert not sockets.wrong(case, orphaned[case])
