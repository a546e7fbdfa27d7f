"""Pods that talk to pods by their own addresses: waggle beside the `bridge` plugin, plain namespaces and VXLAN."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from bench.east_west import drop_time_wait
from bench.figures import Figures
from bench.plain import ACROSS_NODES, PlainNetwork
from bench.pod_networks import BridgeNetwork, OtherPods, VxlanNetwork
from bench.rounds import measure
from bench.traffic import ClientSettings, Sample, cpus
from bench.ways import PlainRouting, Way

KEY = "pods"
#: Ways that are one another's peers: over the nodes' own network, and through an overlay.
NATIVE = ("plain", "bridge", "direct")
OVERLAY = ("plain-vxlan", "direct-vxlan")


def measure_pods(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    """Every test, on one node and across, by every way; skips what `figures` holds already."""
    cells = [(placement, test) for placement in options.places for test in options.pod_tests]
    if all(_there(options, figures, placement, test.key) for placement, test in cells):
        return
    from bench.lab_network import Direct, LabNetwork, remove_leftover_labs

    remove_leftover_labs()
    client_cpu, server_cpu = cpus()
    settings = ClientSettings(options.seconds, options.warmup, options.close, client_cpu, options.attempts)
    with ExitStack() as stack:

        def lab(name: str, tag: str, title: str, **settings: str) -> Direct:
            progress(f"lab: {title}")
            network = stack.enter_context(LabNetwork(options.servers, server_cpu, tag, **settings))
            return Direct(network, options.family, name, title)

        progress("plain namespaces, the bridge plugin, plain VXLAN")
        native: list[Way] = [
            PlainRouting(stack.enter_context(PlainNetwork(options.servers, server_cpu)), options.family)
        ]
        if reason := BridgeNetwork.missing():
            figures.document.setdefault("missing_peers", {})["bridge"] = reason
        else:
            bridge = stack.enter_context(BridgeNetwork(options.servers, server_cpu))
            native.append(OtherPods(bridge, options.family, "the bridge plugin, with masquerade"))
        overlay: list[Way] = []
        if ACROSS_NODES in options.places:
            vxlan = stack.enter_context(VxlanNetwork(options.servers, server_cpu))
            overlay.append(OtherPods(vxlan, options.family, "plain namespaces and VXLAN"))
            overlay.append(lab("direct-vxlan", "vxlan", "waggle, routing: vxlan", routing="vxlan"))
        native.append(lab("direct", "pods", "waggle"))
        drop_time_wait([*native, *overlay])
        for placement, test in cells:
            if _there(options, figures, placement, test.key):
                continue
            ways = [*native, *overlay] if placement == ACROSS_NODES else native
            progress(f"pods, {placement}: {test.title}")
            rows = figures.rows(KEY)

            def record(sample: Sample, rows: list[dict[str, object]] = rows) -> None:
                rows.append(dataclasses.asdict(sample))

            measure(ways, test, placement, 0, options.rounds, settings, record)
            figures.save()


def _there(options: argparse.Namespace, figures: Figures, placement: str, test: str) -> bool:
    ways: Sequence[str] = (*NATIVE, *OVERLAY) if placement == ACROSS_NODES else NATIVE
    missing = figures.document.get("missing_peers", {})
    count = options.rounds * sum(way not in missing for way in ways)
    return figures.complete(KEY, count, placement=placement, test=test)
