"""Pods reach a machine that knows no way back to them, and are seen there as their node."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_machine import COMMAND, ECHO, Lab, echo_pod, pod, unique_name

from waggle.lab.traffic import Probe

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

OUTSIDE = ("203.0.113.99", "2001:db8:cb::99")  # in none of the networks that know pods
NODE = ("10.77.0.11", "fd00:77::11")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(unique_name("q"))
    try:
        made.run("up", "--nodes", "1")
        made.apply(
            tmp_path_factory.mktemp("masquerade"),
            pod("asker", "sleep", "infinity", nodeName="node1"),
            echo_pod("web-1", nodeName="node1"),
        )
        for address, via in zip(OUTSIDE, ("10.77.0.2", "fd00:77::2"), strict=True):
            made.run("exec", "client", "--", "ip", "addr", "add", address, "dev", "lo")
            made.run("exec", "node1", "--", "ip", "route", "add", address, "via", via)
        for network in ("10.244.0.0/16", "fd00:10:244::/48"):
            made.run("exec", "client", "--", "ip", "route", "replace", "unreachable", network)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[int]:
    """Answers out there, on every address; its port."""
    command = [*COMMAND, "exec", "--name", lab.name, "client", "--", *ECHO, "--name", "outside", "--port", "8080"]
    with subprocess.Popen(command) as process:
        try:
            time.sleep(1)
            yield 8080
        finally:
            process.terminate()


def test_tcp_and_udp(lab: Lab, server: int) -> None:
    probes = [Probe(address, server, protocol, 8, 2.0) for address in OUTSIDE for protocol in ("tcp", "udp")]
    for outcome, node in zip(lab.ask("asker", *probes), (NODE[0], NODE[0], NODE[1], NODE[1]), strict=True):
        assert not outcome.failed
        assert dict(outcome.answers) == {"outside": 8}
        assert set(outcome.clients) == {node}


@pytest.mark.parametrize("address", OUTSIDE)
def test_echo_and_large_packets(lab: Lab, address: str) -> None:
    for size in ("56", "1400", "4000"):  # the last in fragments
        done = lab.run("exec", "asker", "--", "ping", "-c", "3", "-i", "0.2", "-W", "2", "-s", size, address)
        assert " 0% packet loss" in done.stdout, done.stdout


def test_many_at_once(lab: Lab, server: int) -> None:
    """As many as the client side has ports for, from one address: each with a port of its own."""
    script = """
import json, socket, sys
found, opened = [], []
for _ in range(500):
    sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
    sock.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    opened.append(sock)
for sock in opened:
    found.append(json.loads(sock.recv(4096).partition(b"\\r\\n\\r\\n")[2])["client_port"])
print(len(found), len(set(found)), len(set(found) & {sock.getsockname()[1] for sock in opened}))
"""
    done = lab.run("exec", "asker", "--", sys.executable, "-c", script, OUTSIDE[0], str(server))
    answers, ports, kept = map(int, done.stdout.split())
    assert (answers, ports) == (500, 500)
    assert kept < 100  # ports are random, not the pod's


def test_a_datagram_from_outside_is_answered_as_the_pod(lab: Lab, tmp_path: Path) -> None:
    """That machine knows a way to pods after all: whoever it asks must answer with the address that it asked."""
    for network, hop in (("10.244.0.0/16", NODE[0]), ("fd00:10:244::/48", NODE[1])):
        lab.run("exec", "client", "--", "ip", "route", "replace", network, "via", hop)
    script = """
import socket, sys
for source, target in zip(sys.argv[1:3], sys.argv[3:]):
    sock = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((source, 0))
    sock.connect((target, 8080))  # takes answers from there alone
    sock.settimeout(3)
    for _ in range(3):
        sock.send(b"x")
        print(sock.recv(4096).decode().strip())
"""
    addresses = lab.pod("web-1")["addresses"]
    try:
        done = lab.run("exec", "client", "--", sys.executable, "-c", script, *OUTSIDE, *addresses)
    finally:
        for network in ("10.244.0.0/16", "fd00:10:244::/48"):
            with contextlib.suppress(AssertionError):
                lab.run("exec", "client", "--", "ip", "route", "replace", "unreachable", network)
    assert [json.loads(line)["name"] for line in done.stdout.splitlines()] == ["web-1"] * 6
