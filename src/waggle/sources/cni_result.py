"""The result of ADD, in the version asked for, and its comparison with what a later CHECK brings back.

Source: CNI specification 1.1.0, "ADD Success". Versions before 1.0.0 carry the IP version in every `ips` entry.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from waggle.errors import CniError
from waggle.sources.cni_interface import default_route_of, gateway_of
from waggle.sources.cni_records import Attachment
from waggle.sources.cni_request import INVALID_CONFIG, CniRequest
from waggle.sources.ipam import IPAddress

_LISTS = ("interfaces", "ips", "routes")


def add_result(
    request: CniRequest, record: Attachment, mtu: int, dns: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What earlier plugins of the chain made (prevResult) and, after it, what this one made. `dns` is the node's own,
    for networks that do not say."""
    earlier = request.prev_result or {}
    interfaces, ips, routes = (list_of(earlier, key) for key in _LISTS)
    pod_side = len(interfaces) + 1
    size = {"mtu": mtu} if mtu and request.version == "1.1.0" else {}
    interfaces += [
        {"name": record.host_ifname, "mac": record.host_mac, **size},
        {"name": record.ifname, "mac": record.pod_mac, "sandbox": request.netns, **size},
    ]
    for address in record.ips:
        gateway = str(gateway_of(address))
        version = {"version": str(address.version)} if request.version.startswith("0.") else {}
        prefix = f"{address}/{address.max_prefixlen}"
        ips.append({**version, "interface": pod_side, "address": prefix, "gateway": gateway})
        routes.append({"dst": str(default_route_of(address)), "gw": gateway})
    dns = request.dns or earlier.get("dns") or dict(dns)
    return {"cniVersion": request.version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": dns}


def faults_of_result(result: dict[str, Any], record: Attachment) -> tuple[list[str], list[IPAddress]]:
    """(what `result` says otherwise than the record, the addresses whose default route `result` lists).

    Later plugins of the chain may have added to the result and taken routes out of it. Raises CniError (7).
    """
    interfaces, ips, routes = (list_of(result, key) for key in _LISTS)
    mine = [i for i, entry in enumerate(interfaces) if entry.get("name") == record.ifname and entry.get("sandbox")]
    if not mine:
        return [f"prevResult lists no interface {record.ifname} in a sandbox"], []
    faults = []
    if not any(_mac(interfaces[i]) in ("", record.pod_mac) for i in mine):
        faults.append(f"prevResult gives {record.ifname} the MAC {_mac(interfaces[mine[0]])}, not {record.pod_mac}")
    listed = {str(e.get("address", "")).partition("/")[0] for e in ips if e.get("interface") in mine}
    addresses = {_address(text) for text in listed}
    faults += [f"prevResult lacks address {a} of {record.ifname}" for a in record.ips if a not in addresses]
    foreign = sorted(str(address) for address in addresses - set(record.ips))
    faults += [f"prevResult gives {record.ifname} address {address}, which it was not given" for address in foreign]
    ours = {(route.get("dst"), route.get("gw")) for route in routes}
    return faults, [a for a in record.ips if (str(default_route_of(a)), str(gateway_of(a))) in ours]


def passed_on(request: CniRequest) -> dict[str, Any]:
    """The result of a chain whose interface an earlier plugin made: what that one said."""
    return {**(request.prev_result or {}), "cniVersion": request.version}


def list_of(result: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects in a result; an empty one where it is not there. Raises CniError (7)."""
    value = result.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise CniError(INVALID_CONFIG, f"prevResult.{key}: not a list of objects")
    return list(value)


def _mac(interface: dict[str, Any]) -> str:
    return str(interface.get("mac") or "").lower()


def _address(text: str) -> IPAddress:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise CniError(INVALID_CONFIG, f"prevResult.ips: {error}") from error
