"""Sockets on ports that lead elsewhere, and the ports that the kernel must keep off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waggle.errors import KernelError
from waggle.model.bound import BoundSocket, LocalPort, sockets_in_vain
from waggle.model.service import Family
from waggle.reconcile.reserved_ports import ReservedPorts, format_ports, parse_ports

SERVING = {"192.0.2.1", "2001:db8::1", "127.0.0.1", "::1"}


def node_port(protocol: str = "TCP", family: Family = Family.IPV4, address: str = "", everywhere: bool = False):
    return LocalPort(protocol, family, address, 30080, everywhere)


def bound(address: str, protocol: str = "TCP", port: int = 30080, only_v6: bool = False) -> BoundSocket:
    return BoundSocket(protocol, address, port, only_v6, 1)


@pytest.mark.parametrize(
    ("socket", "port", "expected"),
    [
        (bound("0.0.0.0"), node_port(), True),
        (bound("0.0.0.0"), node_port("UDP"), False),
        (bound("0.0.0.0", port=30081), node_port(), False),
        (bound("0.0.0.0"), node_port(family=Family.IPV6), False),
        (bound("::"), node_port(family=Family.IPV6), True),
        (bound("::"), node_port(), True),  # takes IPv4 too
        (bound("::", only_v6=True), node_port(), False),
        (bound("::", only_v6=True), node_port(family=Family.IPV6), True),
        (bound("192.0.2.1"), node_port(), True),
        (bound("192.0.2.1"), node_port(family=Family.IPV6), False),
        (bound("2001:db8::1"), node_port(family=Family.IPV6), True),
        (bound("127.0.0.1"), node_port(), True),
        (bound("192.0.2.9"), node_port(), False),  # serves no NodePorts
        (bound("192.0.2.9"), node_port(everywhere=True), True),  # but host ports
        (bound("192.0.2.9"), node_port(address="192.0.2.9", everywhere=True), True),
        (bound("192.0.2.1"), node_port(address="192.0.2.9", everywhere=True), False),
        (bound("0.0.0.0"), node_port(address="192.0.2.9", everywhere=True), False),
    ],
)
def test_which_sockets_get_nothing_any_more(socket: BoundSocket, port: LocalPort, expected: bool) -> None:
    assert bool(sockets_in_vain([socket], [port], SERVING.__contains__)) is expected


# -- what the kernel must keep off -----------------------------------------------------------------------------------


@given(st.sets(st.integers(1, 65535), max_size=50))
def test_lists_of_ports(ports: set[int]) -> None:
    assert parse_ports(format_ports(ports) + "\n") == ports


def test_runs_of_ports_are_written_as_such() -> None:
    assert format_ports({9000, 9002, 9001, 8080}) == "8080,9000-9002"
    assert format_ports(()) == ""


class Machine:
    def __init__(self, directory: Path) -> None:
        self.state, self.sysctls = directory / "state", directory / "sysctls"
        self.state.mkdir()
        self.sysctls.mkdir()
        (self.sysctls / "ip_local_port_range").write_text("30000\t40000\n")
        self.write("")

    @property
    def ports(self) -> ReservedPorts:
        """As a new agent sees them."""
        return ReservedPorts(self.state, self.sysctls)

    def read(self) -> str:
        return (self.sysctls / "ip_local_reserved_ports").read_text()

    def write(self, text: str) -> None:
        (self.sysctls / "ip_local_reserved_ports").write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_only_what_the_kernel_could_hand_out_is_reserved(machine: Machine) -> None:
    machine.ports.apply({80, 30080, 30081, 39999, 40001})
    assert machine.read() == "30080-30081,39999\n"


def test_ports_come_and_go_and_what_others_reserved_stays(machine: Machine) -> None:
    machine.write("30005,31000-31002\n")
    machine.ports.apply({30080, 31001})
    assert machine.read() == "30005,30080,31000-31002\n"
    machine.ports.apply({31001, 30090})
    assert machine.read() == "30005,30090,31000-31002\n"
    machine.write("30005,30007,30090,31000-31002\n")  # meanwhile, somebody else
    machine.ports.apply({30095})
    assert machine.read() == "30005,30007,30095,31000-31002\n"
    assert machine.ports.any
    machine.ports.release()
    assert machine.read() == "30005,30007,31000-31002\n"
    assert not machine.ports.any


def test_a_setting_that_was_reset_is_set_again(machine: Machine) -> None:
    machine.ports.apply({30080})
    machine.write("\n")  # the machine has booted
    machine.ports.apply({30080})
    assert machine.read() == "30080\n"


def test_an_agent_that_was_killed_in_between_takes_away_no_more_than_it_added(machine: Machine) -> None:
    machine.write("30005")
    # the file is written before the setting: killed there
    (machine.state / "reserved-ports.json").write_text(json.dumps([30080]))
    machine.ports.apply({30081})
    assert machine.read() == "30005,30081\n"


def test_without_ports_nothing_is_written(machine: Machine) -> None:
    machine.ports.apply({80})
    assert list(machine.state.iterdir()) == []
    assert not machine.ports.any


def test_a_setting_that_cannot_be_written_is_said(machine: Machine) -> None:
    (machine.sysctls / "ip_local_reserved_ports").unlink()
    with pytest.raises(KernelError, match="cannot reserve ports"):
        machine.ports.apply({30080})
