"""Host ports of pods become rows of the frontend and backend tables, beside those of Services."""

from __future__ import annotations

from collections.abc import Iterable

from waggle.abi._generated import Scope, ServiceFlag, ServiceKey
from waggle.abi.address import PROTOCOLS, pack_address
from waggle.abi.backends import pack_backends
from waggle.model.host_port import ANY, PodPorts, frontend_address
from waggle.model.service import family_of
from waggle.plan.services import FrontendSettings, ServiceRow


def plan_host_ports(pod: PodPorts | None, node_addresses: Iterable[str], *, held: bool = False) -> list[ServiceRow]:
    """One row per host port and address of the pod; none for a pod that is gone (None). `held`: the runtime has sockets
    on the ports."""
    if pod is None:
        return []
    everywhere = frozenset(node_addresses)
    rows: dict[bytes, ServiceRow] = {}
    for address in pod.addresses:
        family = family_of(address)
        for port in pod.ports:
            at = frontend_address(port, family, everywhere)
            if at is None or port.protocol not in PROTOCOLS:
                continue
            flags = ServiceFlag.HOST_PORT if at else ServiceFlag.HOST_PORT | ServiceFlag.NODEPORT
            flags |= ServiceFlag.HELD if held else ServiceFlag(0)
            key = ServiceKey(
                pack_address(at or ANY[family]), port.port, PROTOCOLS[port.protocol], Scope.INTERNAL
            ).pack()
            # given twice: the first counts, as with the rules of other plugins
            rows.setdefault(
                key,
                ServiceRow((key,), (FrontendSettings(int(flags)),), pack_backends([(address, port.container_port)])),
            )
    return list(rows.values())
