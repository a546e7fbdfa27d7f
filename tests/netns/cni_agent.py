"""The CNI part of an agent as a process of its own, so that tests can kill it: CniService behind a unix socket.

The data path is a file that says which pods are attached, one JSON object per call. `--die-at` ends the process with
SIGKILL at a chosen moment of its next ADD.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import signal
import sys
from pathlib import Path

from aiohttp import web

from waggle.errors import KernelError
from waggle.sources import cni_interface
from waggle.sources.cni import CniService, PodInterface
from waggle.sources.cni_records import AttachmentRecords


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class LoggedDatapath:
    """Writes down what it is told. Refuses pods whose name begins with "refused"."""

    def __init__(self, file: Path, die_at: str) -> None:
        self._file = file
        self._die_at = die_at

    def attach(self, pod: PodInterface) -> None:
        if self._die_at == "attach":
            die()
        if pod.name.startswith("refused"):
            raise KernelError("the data path refuses this pod", 22)
        self._write("attach", pod)

    def detach(self, pod: PodInterface) -> None:
        if self._die_at == "detach":
            die()
        self._write("detach", pod)

    def _write(self, call: str, pod: PodInterface) -> None:
        entry = {
            "call": call,
            "container_id": pod.container_id,
            "host_ifname": pod.host_ifname,
            "host_ifindex": pod.host_ifindex,
            "addresses": [str(address) for address in pod.addresses],
            "namespace": pod.namespace,
            "name": pod.name,
        }
        with self._file.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


def arrange_death(moment: str) -> None:
    """Patch the code that runs right after the moment."""
    if moment == "reserved":  # addresses chosen, nothing on disk
        AttachmentRecords.write = lambda self, record: die()  # type: ignore[method-assign]
    elif moment == "recorded":  # on disk, no interface
        cni_interface.create_interface = lambda *arguments: die()  # type: ignore[assignment]
    elif moment == "pair":  # veth pair without addresses
        cni_interface._configure_pod_side = lambda *arguments: die()  # type: ignore[assignment]
    elif moment == "removed":  # DEL: interface gone, record still there
        AttachmentRecords.remove = lambda self, name: die()  # type: ignore[method-assign]


async def serve(arguments: argparse.Namespace) -> None:
    arrange_death(arguments.die_at)
    ranges_file: Path = arguments.ranges
    service = CniService(
        state_dir=arguments.state_dir,
        ranges=lambda: [ipaddress.ip_network(text) for text in ranges_file.read_text().split()],
        datapath=LoggedDatapath(arguments.log, arguments.die_at),
        mtu=lambda: arguments.mtu,
    )
    service.load()

    async def cni(request: web.Request) -> web.Response:
        status, body = await service.handle(await request.read())
        return web.Response(status=status, body=body, content_type="application/json")

    async def pods(_: web.Request) -> web.Response:
        known = [{"container_id": pod.container_id, "host_ifindex": pod.host_ifindex} for pod in service.pods()]
        return web.json_response({"pods": known, "problems": [str(problem) for problem in service.problems()]})

    application = web.Application(client_max_size=16 << 20)
    application.router.add_post("/cni", cni)
    application.router.add_get("/pods", pods)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.UnixSite(runner, str(arguments.socket), backlog=512).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("state-dir", "socket", "ranges", "log"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--die-at", default="", choices=("", "reserved", "recorded", "pair", "attach", "detach", "removed")
    )
    parser.add_argument("--mtu", type=int, default=0)
    asyncio.run(serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
