"""CNI requests as the plugin sends them, checked, and answers in the version that was asked for.

The plugin hands over its environment and standard input untouched, so everything here is input from outside: each
field is checked before anything acts on it, and what is wrong is answered with the specification's error code.
Source: CNI specification 1.1.0 (sections 2 and 5); older versions differ in `ips[].version` and in their commands.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from waggle.errors import CniError
from waggle.model.interface import NO_LIMITS, Bandwidth, HostPort, Limit

#: What `waggle-cni` (cni/waggle-cni.c) answers to VERSION too; the two lists must agree.
SUPPORTED_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
LATEST_VERSION = SUPPORTED_VERSIONS[-1]

INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_CONFIG = 7
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
# Codes from 100 on are the plugin's own.
CHECK_FAILED = 100
NO_FREE_ADDRESS = 101
KERNEL_REFUSED = 102
INTERNAL_ERROR = 103

#: The plugin sends no more than 4 MiB of configuration; a server in front of `CniService` must let this much through.
MAX_REQUEST_BYTES = 5 << 20

_SINCE = {"CHECK": (0, 4, 0), "GC": (1, 1, 0), "STATUS": (1, 1, 0)}
_COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_VERSION = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}(-[0-9A-Za-z.\-]+)?(\+[0-9A-Za-z.\-]+)?")
_IFNAME_BYTES = 15
_POD_NAME_LENGTH = 253
_CONTAINER_ID_LENGTH = 1024
_NO_BURST = (1 << 31) - 1
_LEAST_BURST = 16 << 10  # of a jumbo frame there must be tokens enough


@dataclass(frozen=True, slots=True)
class CniRequest:
    """A checked request. Fields that its command does not need are empty."""

    command: str
    version: str
    network: str = ""
    container_id: str = ""
    ifname: str = ""
    netns: str = ""
    namespace: str = ""
    pod_name: str = ""
    prev_result: dict[str, Any] | None = None
    dns: dict[str, Any] = field(default_factory=dict)
    valid_attachments: frozenset[tuple[str, str]] = frozenset()
    host_ports: tuple[HostPort, ...] = ()
    uid: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    bandwidth: Bandwidth = NO_LIMITS


def split_body(body: bytes) -> tuple[dict[str, str], bytes]:
    """The environment and the raw configuration of `NAME=value\\0…\\0\\0configuration`. Raises CniError (4)."""
    environment: dict[str, str] = {}
    offset = 0
    while True:
        end = body.find(b"\0", offset)
        if end < 0:
            raise CniError(INVALID_ENVIRONMENT, "CNI_COMMAND: the request's environment does not end")
        if end == offset:
            return environment, body[end + 1 :]
        name, equals, value = body[offset:end].partition(b"=")
        offset = end + 1
        if not equals:
            raise CniError(INVALID_ENVIRONMENT, f"CNI environment: {_shown(name)} has no value")
        try:
            environment.setdefault(name.decode(), value.decode())
        except UnicodeDecodeError as error:
            raise CniError(INVALID_ENVIRONMENT, f"{_shown(name)}: not valid UTF-8") from error


def version_asked(configuration: bytes) -> str:
    """The cniVersion to answer an error in; the latest one where the configuration does not say."""
    try:
        document = msgspec.json.decode(configuration)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return LATEST_VERSION
    version = document.get("cniVersion") if isinstance(document, dict) else None
    return version if isinstance(version, str) and _VERSION.fullmatch(version) else LATEST_VERSION


def parse_request(environment: Mapping[str, str], configuration: bytes) -> CniRequest:
    """Raises CniError with codes 1 (version), 2, 4 (environment), 6 (not JSON) or 7 (invalid configuration)."""
    command = environment.get("CNI_COMMAND", "")
    if command not in _COMMANDS:
        shown = _shown(command) if command else "not set"
        raise CniError(INVALID_ENVIRONMENT, f"CNI_COMMAND: {shown}; known are {', '.join(_COMMANDS)}")
    document = _decode(configuration)
    version = _version(document, command)
    if command in ("STATUS", "VERSION"):
        return CniRequest(command, version)
    network = _network(document)
    _refuse_unsupported(document)
    if command == "GC":
        return CniRequest(command, version, network=network, valid_attachments=_valid_attachments(document))
    prev_result = _object(document, "prevResult")
    if command == "CHECK" and prev_result is None:
        raise CniError(INVALID_CONFIG, "prevResult: missing; CHECK needs the result of ADD")
    arguments = _arguments(environment.get("CNI_ARGS", "")) if command == "ADD" else {}
    return CniRequest(
        command,
        version,
        network=network,
        container_id=_container_id(environment),
        ifname=_ifname(environment),
        netns=_netns(environment, needed=command != "DEL"),
        namespace=_pod_label(arguments, "K8S_POD_NAMESPACE"),
        pod_name=_pod_label(arguments, "K8S_POD_NAME"),
        prev_result=prev_result,
        dns=_object(document, "dns") or {},
        host_ports=_host_ports(document) if command == "ADD" else (),
        uid=_pod_label(arguments, "K8S_POD_UID"),
        labels=_labels(document) if command == "ADD" else {},
        bandwidth=_bandwidth(document) if command == "ADD" else NO_LIMITS,
    )


def encode_error(version: str, code: int, message: str, details: str = "") -> bytes:
    """The specification's error object."""
    document: dict[str, Any] = {"cniVersion": version, "code": code, "msg": message}
    if details:
        document["details"] = details
    return msgspec.json.encode(document)


def _shown(value: str | bytes) -> str:
    """For an error message: printable, and not longer than a line."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _decode(configuration: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(configuration)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise CniError(DECODING_FAILURE, f"the network configuration is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CniError(DECODING_FAILURE, "the network configuration is not a JSON object")
    return document


def _version(document: dict[str, Any], command: str) -> str:
    version = document.get("cniVersion", "0.1.0")  # the meaning of a missing version since 0.2.0
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise CniError(DECODING_FAILURE, f"cniVersion: {_shown(str(version))} is not a version")
    if version not in SUPPORTED_VERSIONS:
        supported = ", ".join(SUPPORTED_VERSIONS)
        raise CniError(INCOMPATIBLE_VERSION, f"cniVersion: {version} is not supported", f"supported are {supported}")
    since = _SINCE.get(command)
    if since and tuple(map(int, version.split("."))) < since:
        first = ".".join(map(str, since))
        raise CniError(INCOMPATIBLE_VERSION, f"cniVersion: {version} has no {command}, which came with {first}")
    return version


def _network(document: dict[str, Any]) -> str:
    name = document.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = "missing" if name is None else f"{_shown(str(name))} is not a network name"
        raise CniError(INVALID_CONFIG, f"name: {shown}")
    kind = document.get("type")
    if not isinstance(kind, str) or not kind:
        raise CniError(INVALID_CONFIG, "type: missing" if kind is None else f"type: {_shown(str(kind))} is no plugin")
    return name


def _refuse_unsupported(document: dict[str, Any]) -> None:
    """What would silently give a pod another address than the one asked for."""
    ipam = _object(document, "ipam")
    if ipam:
        shown = msgspec.json.encode(ipam)
        raise CniError(UNSUPPORTED_FIELD, f"ipam: {_shown(shown)}: addresses come from the node's pod ranges")
    wanted = (_object(document, "runtimeConfig") or {}).get("ips")
    if wanted:
        raise CniError(UNSUPPORTED_FIELD, f"runtimeConfig.ips: {_shown(str(wanted))}: addresses cannot be chosen")


def _host_ports(document: dict[str, Any]) -> tuple[HostPort, ...]:
    """The capability portMappings, as containerd, CRI-O and Podman send it. A host port of 0 asks for none."""
    entries = (_object(document, "runtimeConfig") or {}).get("portMappings") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CniError(INVALID_CONFIG, "runtimeConfig.portMappings: not a list of objects")
    found = []
    for index, entry in enumerate(map(_members, entries)):
        where = f"runtimeConfig.portMappings[{index}]"
        host, container = (_port(entry, key, where) for key in ("hostPort", "containerPort"))
        protocol = str(entry.get("protocol") or "tcp").upper()
        if protocol not in ("TCP", "UDP", "SCTP"):
            raise CniError(INVALID_CONFIG, f"{where}.protocol: {_shown(protocol)} is none of tcp, udp, sctp")
        if host and not container:
            raise CniError(INVALID_CONFIG, f"{where}.containerPort: missing")
        if host:
            found.append(HostPort(protocol, host, container, _host_ip(entry, where)))
    return tuple(dict.fromkeys(found))


def _labels(document: dict[str, Any]) -> dict[str, str]:
    """Those of `args.cni.labels`: {"key": …, "value": …} each, as CNI's conventions have it. The last of a key counts.

    Other users of `args` put there what they like, so that only this path is looked at.
    """
    arguments = document.get("args")
    ours = arguments.get("cni") if isinstance(arguments, dict) else None
    entries = (ours.get("labels") if isinstance(ours, dict) else None) or []
    if not isinstance(entries, list):
        raise CniError(INVALID_CONFIG, "args.cni.labels: not a list")
    found: dict[str, str] = {}
    for index, entry in enumerate(entries):
        key, value = (entry.get("key"), entry.get("value")) if isinstance(entry, dict) else (None, None)
        if not isinstance(key, str) or not key or not isinstance(value, str):
            raise CniError(INVALID_CONFIG, f"args.cni.labels[{index}]: needs a key and a value, both strings")
        found[key] = value
    return found


def _bandwidth(document: dict[str, Any]) -> Bandwidth:
    """The capability bandwidth: rates in bits per second, bursts in bits. A rate of 0, or none, is no limit."""
    where = "runtimeConfig.bandwidth"
    value = (_object(document, "runtimeConfig") or {}).get("bandwidth") or {}
    if not isinstance(value, dict):
        raise CniError(INVALID_CONFIG, f"{where}: not an object")
    entry = _members(value)
    numbers = []
    for key in ("ingressRate", "ingressBurst", "egressRate", "egressBurst"):
        number = entry.get(key.lower()) or 0
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 64:
            raise CniError(INVALID_CONFIG, f"{where}.{key}: {_shown(str(number))} is not a number of bits")
        numbers.append(number)
    return Bandwidth(to_pod=_limit(*numbers[:2]), from_pod=_limit(*numbers[2:]))


def _limit(rate: int, burst: int) -> Limit | None:
    """In bytes. Kubelet's runtimes, which know of no burst, ask for the largest number that they can write: for seconds
    of the full rate of the machine. That, like none at all, is taken for "not given"."""
    if not rate:
        return None
    known = burst // 8 if burst < _NO_BURST else 0
    return Limit(max(rate // 8, 1), max(known or rate // 8 // 20, _LEAST_BURST))


def _members(entry: dict[str, Any]) -> dict[str, Any]:
    """An object of runtimeConfig by its keys in lower case: containerd 1 writes "HostPort", and plugins written in Go
    take that for "hostPort"."""
    return {key.lower(): value for key, value in entry.items()}


def _port(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key.lower()) or 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 65535:
        raise CniError(INVALID_CONFIG, f"{where}.{key}: {_shown(str(value))} is not a port")
    return value


def _host_ip(entry: dict[str, Any], where: str) -> str:
    value = entry.get("hostip") or ""
    try:
        return str(ipaddress.ip_address(value)) if value else ""
    except ValueError as error:
        raise CniError(INVALID_CONFIG, f"{where}.hostIP: {_shown(str(value))} is not an IP address") from error


def _object(document: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = document.get(key)
    if value is not None and not isinstance(value, dict):
        raise CniError(INVALID_CONFIG, f"{key}: not an object")
    return value


def _valid_attachments(document: dict[str, Any]) -> frozenset[tuple[str, str]]:
    # Released runtimes have used both names; a missing list must not mean "remove everything", an empty one does.
    for key in ("cni.dev/valid-attachments", "cni.dev/attachments"):
        if key in document:
            break
    else:
        raise CniError(INVALID_CONFIG, "cni.dev/valid-attachments: missing")
    valid: set[tuple[str, str]] = set()
    entries = document[key] if document[key] is not None else []
    if not isinstance(entries, list):
        raise CniError(INVALID_CONFIG, f"{key}: not a list")
    for entry in entries:
        container, ifname = (entry.get("containerID"), entry.get("ifname")) if isinstance(entry, dict) else (None, None)
        if not isinstance(container, str) or not isinstance(ifname, str):
            raise CniError(INVALID_CONFIG, f"{key}: every entry needs containerID and ifname")
        valid.add((container, ifname))
    return frozenset(valid)


def _container_id(environment: Mapping[str, str]) -> str:
    value = environment.get("CNI_CONTAINERID", "")
    if not _NAME.fullmatch(value) or len(value) > _CONTAINER_ID_LENGTH:
        shown = f"{_shown(value)} is not a container ID" if value else "not set"
        raise CniError(INVALID_ENVIRONMENT, f"CNI_CONTAINERID: {shown}")
    return value


def _ifname(environment: Mapping[str, str]) -> str:
    value = environment.get("CNI_IFNAME", "")
    bad = any(c in "/:" or c.isspace() or not c.isprintable() for c in value)
    if bad or value in ("", ".", "..", "lo") or len(value.encode()) > _IFNAME_BYTES or "%" in value:
        shown = f"{_shown(value)} cannot name an interface" if value else "not set"
        raise CniError(INVALID_ENVIRONMENT, f"CNI_IFNAME: {shown}")
    return value


def _netns(environment: Mapping[str, str], *, needed: bool) -> str:
    value = environment.get("CNI_NETNS", "")
    if needed and not value:
        raise CniError(INVALID_ENVIRONMENT, "CNI_NETNS: not set")
    if value and not value.startswith("/"):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS: {_shown(value)} is not an absolute path")
    return value


def _arguments(text: str) -> dict[str, str]:
    arguments: dict[str, str] = {}
    for pair in text.split(";"):
        name, equals, value = pair.partition("=")
        if pair and (not equals or not name):
            raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: {_shown(pair)} is not KEY=VALUE")
        if pair:
            arguments[name] = value
    if arguments.get("IP"):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: IP={_shown(arguments['IP'])}: addresses cannot be chosen")
    return arguments


def _pod_label(arguments: Mapping[str, str], name: str) -> str:
    value = arguments.get(name, "")
    if not value.isprintable() or len(value) > _POD_NAME_LENGTH or "/" in value:
        raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: {name}={_shown(value)} is not a name")
    return value
