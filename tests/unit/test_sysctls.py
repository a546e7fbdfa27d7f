"""Settings of the kernel that the agent changes go back to what they were, unless somebody set them since."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from waggle.errors import KernelError
from waggle.reconcile.forwarding import enable_forwarding
from waggle.reconcile.sysctls import Sysctls

FORWARD = "net/ipv4/ip_forward"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    root = tmp_path / "proc-sys"
    for name, value in {
        FORWARD: "0",
        "net/ipv4/conf/all/rp_filter": "1",
        "net/ipv4/conf/eth0.100/rp_filter": "2",
        "net/ipv6/conf/all/forwarding": "0",
        "net/ipv6/conf/all/accept_ra": "1",
        "net/ipv6/conf/eth0/accept_ra": "1",
        "net/ipv6/conf/lo/accept_ra": "0",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(value + "\n")
    (tmp_path / "state").mkdir()
    return tmp_path


def sysctls(machine: Path) -> Sysctls:
    return Sysctls(machine / "state", machine / "proc-sys")


def value(machine: Path, name: str) -> str:
    return (machine / "proc-sys" / name).read_text().strip()


def write(machine: Path, name: str, text: str) -> None:
    (machine / "proc-sys" / name).write_text(text)


def everything(machine: Path) -> dict[str, str]:
    return {str(path): path.read_text().strip() for path in (machine / "proc-sys").rglob("*") if path.is_file()}


def test_put_back_by_another_process_and_forgotten(machine: Path) -> None:
    before = everything(machine)
    assert sysctls(machine).set(FORWARD, "1")
    assert value(machine, FORWARD) == "1"
    assert sysctls(machine).restore() == [FORWARD]
    assert everything(machine) == before
    assert not list((machine / "state").iterdir())


def test_a_value_that_was_right_is_no_change(machine: Path) -> None:
    assert sysctls(machine).set("net/ipv4/conf/all/rp_filter", "1")
    assert sysctls(machine).recorded() == {}


def test_what_somebody_set_since_stays(machine: Path) -> None:
    sysctls(machine).set("net/ipv4/conf/all/rp_filter", "0")
    write(machine, "net/ipv4/conf/all/rp_filter", "2")
    assert sysctls(machine).restore() == []
    assert value(machine, "net/ipv4/conf/all/rp_filter") == "2"


def test_set_again_over_what_somebody_set_goes_back_to_that(machine: Path) -> None:
    name = "net/ipv4/conf/all/rp_filter"
    sysctls(machine).set(name, "0")
    write(machine, name, "2")
    sysctls(machine).set(name, "0")
    sysctls(machine).restore()
    assert value(machine, name) == "2"


def test_two_changes_go_back_to_the_first(machine: Path) -> None:
    name = "net/ipv4/conf/all/rp_filter"
    sysctls(machine).set(name, "2")
    sysctls(machine).set(name, "0")
    sysctls(machine).restore()
    assert value(machine, name) == "1"


def test_only_what_the_pattern_names(machine: Path) -> None:
    changed = sysctls(machine)
    changed.set(FORWARD, "1")
    changed.set("net/ipv4/conf/eth0.100/rp_filter", "0")
    assert changed.restore("*/rp_filter") == ["net/ipv4/conf/eth0.100/rp_filter"]
    assert value(machine, FORWARD) == "1"
    assert changed.recorded() == {FORWARD: "0"}


def test_an_interface_that_is_gone_is_forgotten(machine: Path) -> None:
    name = "net/ipv4/conf/eth0.100/rp_filter"
    sysctls(machine).set(name, "0")
    (machine / "proc-sys" / name).unlink()
    assert not sysctls(machine).set(name, "0")
    assert sysctls(machine).restore() == []
    assert not list((machine / "state").iterdir())


def test_a_record_of_another_boot_counts_for_nothing(machine: Path) -> None:
    sysctls(machine).set(FORWARD, "1")
    record = machine / "state" / "sysctls.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"boot": "another"}))
    assert sysctls(machine).restore() == []
    assert value(machine, FORWARD) == "1"


def test_an_unreadable_record_is_told_and_replaced(machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = machine / "state" / "sysctls.json"
    record.write_text("{")
    sysctls(machine).set(FORWARD, "1")
    assert "unreadable" in caplog.text
    assert sysctls(machine).recorded() == {FORWARD: "0"}
    assert record.stat().st_mode & 0o777 == 0o600


def test_nothing_is_changed_that_cannot_be_recorded(machine: Path) -> None:
    (machine / "state").rmdir()
    with pytest.raises(KernelError, match="no setting is changed"):
        sysctls(machine).set(FORWARD, "1")
    assert value(machine, FORWARD) == "0"


def test_what_the_kernel_changes_along_is_put_back_too(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel copies the switch of a family to each interface, in both directions."""
    write_of = Sysctls._write

    def kernel(self: Sysctls, name: str, text: str) -> None:
        write_of(self, name, text)
        if name == "net/ipv6/conf/all/forwarding":
            for interface in ("eth0", "lo"):
                write(machine, f"net/ipv6/conf/{interface}/forwarding", text)

    monkeypatch.setattr(Sysctls, "_write", kernel)
    write(machine, "net/ipv6/conf/eth0/forwarding", "1")
    write(machine, "net/ipv6/conf/lo/forwarding", "0")
    write(machine, "net/ipv6/conf/lo/accept_ra", "1")
    before = everything(machine)
    enable_forwarding(sysctls(machine))
    assert value(machine, "net/ipv6/conf/lo/forwarding") == "1"
    assert value(machine, "net/ipv6/conf/eth0/accept_ra") == "2"
    assert value(machine, "net/ipv6/conf/all/accept_ra") == "1"
    sysctls(machine).restore()
    assert everything(machine) == before
