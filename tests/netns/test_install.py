"""`waggle install` and `waggle uninstall` on a machine of their own, with a real systemd and all that its unit forbids.

What the machine is like before and after must be the same, whatever was done in between.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import PLUGIN, endpoints, service
from systemd_machine import SystemdMachine, lines

WAGGLE = str(Path(sys.executable).with_name("waggle"))
VIP, NODE = "10.96.0.10", "192.0.2.1"
#: Everything about a machine that waggle may change, as text.
FACTS = {
    "interfaces": "ip -o link | sed 's/ \\+/ /g'",
    "addresses": "ip -o address",
    "routes": "ip route show table all; ip -6 route show table all",
    "rules": "ip rule; ip -6 rule",
    "neighbours": "ip neigh show nud permanent",
    "settings": "grep -rs '' /proc/sys/net | grep -v nf_conntrack_count",
    "nftables": "nft list ruleset",
    "iptables": "iptables-legacy-save; ip6tables-legacy-save",
    "pins": "find /sys/fs/bpf | sort",
    "cgroups": "find /sys/fs/cgroup -type d | grep -v '/system[.]slice/' | sort",
    "files": "find /etc /run /var/lib /opt -xdev -maxdepth 4 \\( -path /run/systemd -o -path /run/log -o"
    " -path /var/lib/systemd -o -path /var/lib/waggle-lab \\) -prune -o -type d -printf '%p %M %u:%g\\n' -o"
    " -printf '%p %M %u:%g %s %T@ %l\\n' | sort",
    "processes": "ps -eo comm= | grep -v '^ps$\\|^sh$\\|^sort$\\|^grep$' | sort",
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdMachine]:
    if reason := SystemdMachine.missing():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("systemd") / "machine"
    directory.mkdir()
    machine = SystemdMachine(directory)
    try:
        machine.boot()
        machine.sh(
            "for f in accept_dad router_solicitations; do sysctl -q -w net.ipv6.conf.default.$f=0; done; "
            "ip link set lo up; ip link add up0 type veth peer name far; ip address add $1/24 dev up0; "
            "ip link set up0 up; ip link set far up; ip route add default via 192.0.2.2; mkdir -p /run/netns; "
            "ip netns add warm; ip netns del warm; sysctl -q -w net.ipv4.conf.up0.forwarding=0; "
            "mkdir -p /etc/NetworkManager/conf.d; rm -rf /opt/cni /etc/cni /etc/waggle /var/lib/waggle /var/lib/cni",
            NODE,
        )
        yield machine
    finally:
        machine.close()


def facts(machine: SystemdMachine) -> dict[str, list[str]]:
    return {what: lines(machine.sh(f"{script} || true")) for what, script in FACTS.items()}


def differences(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    return [
        f"{what}: {sign}{line}"
        for what in before
        for sign, one, other in (("-", before, after), ("+", after, before))
        for line in one[what]
        if line not in other[what]
    ]


def apply(machine: SystemdMachine, name: str, *documents: object) -> None:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})
    machine.run("sh", "-ec", "cat > /tmp/m && mv /tmp/m /etc/waggle/manifests/$1.json", "sh", name, stdin=text)


def until(condition, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "not within time"
        time.sleep(0.05)
    return found


def test_a_machine_is_after_uninstall_as_it_was_before_install(machine: SystemdMachine) -> None:
    before = facts(machine)
    dry = machine.run(WAGGLE, "install", "--dry-run", "--set", "pod-cidr=10.244.1.0/24").stdout
    assert machine.sh(FACTS["files"]).splitlines() == before["files"]
    done = machine.run(WAGGLE, "install", "--set", "pod-cidr=10.244.1.0/24").stdout
    assert [line.removeprefix("would ") for line in dry.splitlines()] == done.splitlines()
    assert machine.sh("systemctl is-active waggle; systemctl is-enabled waggle").split() == ["active", "enabled"]
    machine.run("systemd-analyze", "verify", "waggle.service")
    until(lambda: machine.sh("ls /etc/cni/net.d /opt/cni/bin").count("waggle") == 2)

    # a pod by the plugin that was installed, a Service, a health port: all that an agent does, as the unit lets it
    machine.sh("ip netns add pod")
    environment = [
        "env",
        "CNI_COMMAND=ADD",
        "CNI_CONTAINERID=pod",
        "CNI_IFNAME=eth0",
        "CNI_NETNS=/run/netns/pod",
        "CNI_PATH=/opt/cni/bin",
    ]
    network = json.loads(machine.sh("cat /etc/cni/net.d/05-waggle.conflist"))
    request = {"cniVersion": "1.0.0", "name": network["name"], **network["plugins"][0]}
    added = machine.run(*environment, f"/opt/cni/bin/{PLUGIN.name}", stdin=json.dumps(request))
    address = json.loads(added.stdout)["ips"][0]["address"].partition("/")[0]
    machine.sh(
        "systemd-run --quiet --unit=answer --property=NetworkNamespacePath=/run/netns/pod "
        "$1 -m http.server 8080 --bind :: --directory /etc/waggle/manifests",
        sys.executable,
    )
    local = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31999}
    apply(machine, "web", service("web", VIP, nodePort=30080, **local), endpoints("web", address))
    curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "2"]
    until(lambda: machine.run(*curl, f"http://{VIP}/", check=False).stdout == "200")
    until(lambda: machine.run(*curl, f"http://{NODE}:31999/", check=False).stdout in ("200", "503"))
    status = json.loads(machine.run(WAGGLE, "status", "-o", "json", check=False).stdout)
    assert status["problems"] == []

    # a restart by systemd leaves all of it at work
    machine.sh("systemctl restart waggle")
    assert machine.run(*curl, f"http://{VIP}/").stdout == "200"
    log = machine.sh("journalctl -u waggle -o cat --no-pager")
    assert not re.search(r"(?i)ERROR|WARNING|permitted|denied|read-only", log), log

    machine.sh("systemctl stop answer; ip netns del pod; rm /etc/waggle/manifests/web.json")
    machine.run(WAGGLE, "uninstall")
    assert not differences(before, facts(machine))
    again = machine.run(WAGGLE, "uninstall")
    assert "run systemctl daemon-reload" in again.stdout


def test_what_somebody_changed_is_kept(machine: SystemdMachine) -> None:
    machine.run(WAGGLE, "install", "--no-start")
    machine.sh("echo '# mine' >> /etc/waggle/agent.yaml; echo x > /etc/waggle/manifests/mine.yaml")
    done = machine.run(WAGGLE, "install", "--no-start").stdout
    assert "keep /etc/waggle/agent.yaml, which was changed" in done
    refused = machine.run(WAGGLE, "install", "--set", "xdp=generic", check=False)
    assert refused.returncode == 1 and "changed by hand: set xdp there" in refused.stderr
    done = machine.run(WAGGLE, "uninstall").stdout
    assert "keep /etc/waggle/agent.yaml, which was changed" in done
    assert "keep /etc/waggle/manifests, which is not empty" in done
    assert machine.sh("ls /etc/waggle").split() == ["agent.yaml", "manifests"]
    refused = machine.run(WAGGLE, "install", "--set", "xdp=generic", check=False)
    assert refused.returncode == 1
    machine.run(WAGGLE, "install", "--no-start")
    machine.run(WAGGLE, "uninstall", "--purge")
    assert not machine.sh("ls -d /etc/waggle /etc/systemd/system/waggle.service 2>/dev/null || true")


def test_the_unit_of_the_image_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / "etc/NetworkManager").mkdir(parents=True)
    command = [WAGGLE, "install", "--root", str(tmp_path), "--set", "cni-bin-dir=/usr/lib/cni", "-o", "json"]
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["done"]
    assert not [entry for entry in done if entry["what"] == "run"]
    unit = (tmp_path / "etc/systemd/system/waggle.service").read_text()
    assert "ReadWritePaths=-/usr/lib/cni -/etc/cni/net.d" in unit
    assert (tmp_path / "etc/systemd/system/multi-user.target.wants/waggle.service").is_symlink()
    assert (tmp_path / "etc/NetworkManager/conf.d/waggle.conf").exists()
    assert not (tmp_path / "etc/systemd/network").exists()
    subprocess.run([WAGGLE, "uninstall", "--root", str(tmp_path)], capture_output=True, check=True)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["etc", "etc/NetworkManager"]
