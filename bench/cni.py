"""How long a runtime waits for a pod's network: the plugin of waggle, and beside it Debian's `bridge` with `portmap`.

What is timed is what libcni does for one ADD: every plugin of the chain is executed, one after another, each with the
result of the one before, from right before the first process is made until the last one's answer is there. Both ways
give a pod an address and one host port, in the same network namespace, for the same pods' namespaces.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.leftovers import NETNS, PREFIX
from bench.places import BenchError, checked
from bench.scale_node import ScaleNode

DEBIAN_PLUGINS = Path("/usr/lib/cni")
ONE_BY_ONE = 40  # pods in a round, one at a time
_FIRST_PORT = 20000
_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class Network:
    """A list of plugins, each with its program, as a runtime finds it in a .conflist."""

    name: str
    plugins: Sequence[tuple[Path, dict[str, Any]]]


def missing() -> str:
    """Why the peer cannot be measured here, or ""."""
    absent = [name for name in ("bridge", "portmap", "host-local") if not (DEBIAN_PLUGINS / name).exists()]
    return f"{DEBIAN_PLUGINS} lacks {', '.join(absent)}: package containernetworking-plugins" if absent else ""


def waggle(plugin: Path, socket: Path) -> Network:
    return Network("waggle", [(plugin, {"type": plugin.name, "apiSocket": str(socket)})])


def bridge(folder: Path) -> Network:
    ipam = {"type": "host-local", "subnet": "10.245.0.0/16", "dataDir": str(folder / "ipam")}
    first = {"type": "bridge", "bridge": "wagbench0", "isGateway": True, "ipam": ipam}
    second = {"type": "portmap", "snat": False}
    return Network("bridge + portmap", [(DEBIAN_PLUGINS / "bridge", first), (DEBIAN_PLUGINS / "portmap", second)])


def add(network: Network, pod: str, port: int) -> float:
    """Milliseconds that a runtime waits."""
    began = time.perf_counter()
    result: dict[str, Any] = {}
    for program, configuration in network.plugins:
        answer = _execute(program, "ADD", pod, _configuration(network, configuration, port, result))
        result = json.loads(answer)
    return (time.perf_counter() - began) * 1000


def delete(network: Network, pod: str, port: int) -> float:
    """The same for DEL: the last plugin first."""
    began = time.perf_counter()
    for program, configuration in reversed(network.plugins):
        _execute(program, "DEL", pod, _configuration(network, configuration, port, {}))
    return (time.perf_counter() - began) * 1000


def _configuration(network: Network, own: dict[str, Any], port: int, result: dict[str, Any]) -> str:
    mappings = [{"hostPort": port, "containerPort": 80, "protocol": "tcp"}]
    document: dict[str, Any] = {"cniVersion": _VERSION, "name": "bench", **own}
    if own["type"] != "bridge":
        document["runtimeConfig"] = {"portMappings": mappings}
    if result:
        document["prevResult"] = result
    return json.dumps(document)


def _execute(program: Path, command: str, pod: str, configuration: str) -> str:
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod,
        "CNI_NETNS": str(NETNS / pod),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(DEBIAN_PLUGINS),
        "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
    }
    done = subprocess.run(
        [str(program)], env=environment, input=configuration, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise BenchError(f"{program.name} {command} of {pod}: {done.stdout.strip() or done.stderr.strip()}")
    return done.stdout


def measure_cni(rounds: int, pods: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per round and way. The ways follow each other within a round, and change places from round to round."""
    from waggle.kernel.netns import call_in_netns
    from waggle.kernel.objects import OBJECT_DIR
    from waggle.sources.cni_install import PLUGIN

    reason = missing()
    if reason:
        progress(f"bridge + portmap is left out: {reason}")
    rows: list[dict[str, Any]] = []
    with ScaleNode(name="cni") as node, tempfile.TemporaryDirectory(prefix=f"{PREFIX}-") as scratch:
        folder = Path(scratch)
        (folder / "manifests").mkdir()
        # as on a node: events and all
        node.configure({"manifests": str(folder / "manifests"), "max-nat": 1024, "metrics-address": ""})
        node.start_agent()
        socket = node.folder / "agent.sock"
        networks = [waggle(OBJECT_DIR / PLUGIN, socket)]
        node.wait("its API socket", lambda: _answers(networks[0]), 60)
        networks += [] if reason else [bridge(folder)]
        for number in range(rounds):
            for network in networks[number % len(networks) :] + networks[: number % len(networks)]:
                progress(f"CNI, round {number + 1} of {rounds}: {network.name}")
                figures = _round(network, pods, lambda function: call_in_netns(node.place.netns, function))
                rows.append({"round": number, "network": network.name, "pods": pods, **figures})
    return rows


def _answers(network: Network) -> bool:
    program, own = network.plugins[0]
    document = json.dumps({"cniVersion": "1.1.0", "name": "bench", **own})
    environment = {"CNI_COMMAND": "STATUS", "CNI_PATH": str(DEBIAN_PLUGINS)}
    done = subprocess.run([str(program)], env=environment, input=document, capture_output=True, text=True, check=False)
    return done.returncode == 0


def _round(network: Network, pods: int, in_node: Callable[[Callable[[], float]], float]) -> dict[str, Any]:
    """Each way gets namespaces that nobody has used. Plugins run in the node's namespace, by threads that are there."""

    def timed(function: Callable[[Network, str, int], float], number: int) -> float:
        return in_node(lambda: function(network, names[number], _FIRST_PORT + number))

    names = [f"{PREFIX}-cni{number}" for number in range(pods)]
    checked(["ip", "-batch", "-"], stdin="".join(f"netns add {name}\n" for name in names), timeout=120)
    try:
        figures: dict[str, Any] = {}
        for what, function in (("add", add), ("del", delete)):
            figures[f"{what}_ms"] = [timed(function, number) for number in range(min(ONE_BY_ONE, pods))]
        with ThreadPoolExecutor(pods) as pool:
            for what, function in (("add", add), ("del", delete)):
                began = time.perf_counter()
                figures[f"{what}_at_once_ms"] = list(pool.map(partial(timed, function), range(pods)))
                figures[f"{what}_all_s"] = time.perf_counter() - began
        return figures
    finally:
        commands = "".join(f"netns delete {name}\n" for name in names)
        checked(["ip", "-force", "-batch", "-"], stdin=commands, timeout=120)
