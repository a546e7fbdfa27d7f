"""What the names of Services mean: answers to DNS questions, from the objects alone.

As Kubernetes' DNS specification 1.1.0 (github.com/kubernetes/dns/docs/specification.md): NAME.NAMESPACE.svc.DOMAIN is
the cluster address, or, of a headless Service, the addresses of its endpoints; with _PORT._PROTOCOL before it, the port
too. The same names end in "svc" alone too, a domain that nobody has: so `NAME.NAMESPACE.svc` needs no search list.

A name is a tuple of labels without the root, in lower case. Addresses of records are text; names are tuples.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from waggle.model.endpoints import Endpoint
from waggle.model.objects import ObjectKey, Service, ServicePort
from waggle.model.service import Family, IPNetwork, cluster_ips, family_of
from waggle.plan.services import service_endpoints
from waggle.store import Store

Name = tuple[str, ...]
SVC = "svc"
VERSION = "1.1.0"
_WEIGHT = 100  # of every target of SRV: they are equal
_ANY_PORT = ServicePort(0)  # for addresses alone; a headless Service may have no port
_REVERSE: dict[Name, int] = {("in-addr", "arpa"): 4, ("ip6", "arpa"): 6}


class Outcome(StrEnum):
    """What is known of a name."""

    FOUND = "found"  # it exists, whether or not it has a record of the type that was asked for
    MISSING = "missing"
    ELSEWHERE = "elsewhere"  # others answer for it


class Record(NamedTuple):
    """`data` is the text of an A, AAAA or TXT record, the target of a PTR, CNAME or SRV record."""

    owner: Name
    type: str
    data: str | Name
    port: int = 0
    weight: int = 0


class Answer(NamedTuple):
    """`zone` is where the negative answer's SOA belongs; empty for ELSEWHERE."""

    outcome: Outcome
    zone: Name = ()
    records: tuple[Record, ...] = ()
    additional: tuple[Record, ...] = ()


ELSEWHERE = Answer(Outcome.ELSEWHERE)


class ServiceNames:
    """The names of the Services in a store. `ranges` are networks whose addresses are nobody else's to name.

    Set `stale` after the store has changed: what has to be looked for in all Services is looked for again.
    """

    def __init__(self, store: Store, domain: str, ranges: Iterable[IPNetwork] = ()) -> None:
        self._store = store
        self._domain: Name = tuple(domain.lower().split("."))
        self._ranges = tuple(ranges)
        self.stale = True
        self._namespaces: set[str] = set()
        self._by_address: dict[str, Name] = {}

    def search(self, namespace: str) -> list[str]:
        """The search list of a pod of that namespace."""
        domain = ".".join(self._domain)
        return [f"{namespace}.{SVC}.{domain}", f"{SVC}.{domain}", domain]

    def answer(self, name: Name, kind: str) -> Answer:
        """`kind` is the type of record that is asked for; ANY for all there are."""
        if name[-2:] in _REVERSE:
            return self._reverse(name, kind)
        for zone, suffix in ((self._domain, self._domain), ((SVC,), ())):
            if name[len(name) - len(zone) :] == zone:
                return self._within(name[: len(name) - len(suffix)], name, kind, zone, suffix)
        return ELSEWHERE

    def _within(self, rest: Name, name: Name, kind: str, zone: Name, suffix: Name) -> Answer:
        """`rest`: the name without `suffix`, which what is answered gets back."""
        records: Iterable[Record] | None
        additional: tuple[Record, ...] = ()
        if rest == ("dns-version",):
            records = [Record(name, "TXT", VERSION)]
        elif not rest:
            records = []
        elif rest[-1] != SVC:
            records = None
        else:
            records, additional = self._service(rest[:-1], name, (SVC, *suffix))
        if records is None:
            return Answer(Outcome.MISSING, zone)
        wanted = tuple(record for record in records if kind in (record.type, "ANY") or record.type == "CNAME")
        return Answer(Outcome.FOUND, zone, wanted, additional if wanted and wanted[0].type == "SRV" else ())

    def _service(self, rest: Name, name: Name, suffix: Name) -> tuple[list[Record] | None, tuple[Record, ...]]:
        """(records or None where the name does not exist, addresses of what they name)."""
        if len(rest) < 2:
            self._refresh()
            return ([] if not rest or rest[0] in self._namespaces else None), ()
        key = ObjectKey(rest[-1], rest[-2])
        service = self._store.services.get(key)
        if service is None or len(rest) > 4:
            return None, ()
        if len(rest) == 2:
            return self._addresses(service, name), ()
        base = (key.name, key.namespace, *suffix)
        if len(rest) == 4:
            return self._ports(service, rest[0], rest[1], name, base)
        if rest[0].startswith("_"):
            known = any(port.name and f"_{port.protocol.lower()}" == rest[0] for port in service.spec.ports)
            return ([] if known else None), ()
        of_one = [record for record in self._headless(service, name) if _dashed(str(record.data)) == rest[0]]
        return (of_one or None), ()

    def _addresses(self, service: Service, name: Name) -> list[Record]:
        if service.spec.type == "ExternalName":
            return [Record(name, "CNAME", tuple(service.spec.external_name.rstrip(".").lower().split(".")))]
        if service.spec.cluster_ip == "None":
            return self._headless(service, name)
        return [Record(name, _TYPES[family_of(address)], address) for address in cluster_ips(service)]

    def _headless(self, service: Service, name: Name) -> list[Record]:
        if service.spec.cluster_ip != "None":
            return []
        ports = service.spec.ports or [_ANY_PORT]
        found = {e.address: family for port in ports for e, family in self._ready(service, port)}
        return [Record(name, _TYPES[family], address) for address, family in found.items()]

    def _ready(self, service: Service, port: ServicePort) -> list[tuple[Endpoint, Family]]:
        found = [
            (endpoint, family)
            for family in (Family.IPV4, Family.IPV6)
            for endpoint in service_endpoints(self._store, service, port, family)
        ]
        return [(endpoint, family) for endpoint, family in found if endpoint.ready]

    def _ports(
        self, service: Service, label: str, protocol: str, name: Name, base: Name
    ) -> tuple[list[Record] | None, tuple[Record, ...]]:
        wanted = [
            port
            for port in service.spec.ports
            if port.name and f"_{port.name}" == label and f"_{port.protocol.lower()}" == protocol
        ]
        if not wanted:
            return None, ()
        port = wanted[0]
        if service.spec.cluster_ip != "None":
            return [Record(name, "SRV", base, port.port, _WEIGHT)], tuple(self._addresses(service, base))
        records, additional = [], []
        for endpoint, family in self._ready(service, port):
            target = (_dashed(endpoint.address), *base)
            records.append(Record(name, "SRV", target, endpoint.port, _WEIGHT))
            additional.append(Record(target, _TYPES[family], endpoint.address))
        return records, tuple(additional)

    # -- addresses to names

    def _reverse(self, name: Name, kind: str) -> Answer:
        address = _address_of(name)
        if address is None:
            return ELSEWHERE
        self._refresh()
        target = self._by_address.get(str(address))
        network = next((n for n in self._ranges if n.version == address.version and address in n), None)
        zone = _reverse_zone(network, name) if network is not None else name
        if target is not None:
            records = (Record(name, "PTR", target),) if kind in ("PTR", "ANY") else ()
            return Answer(Outcome.FOUND, zone, records)
        return Answer(Outcome.MISSING, zone) if network is not None else ELSEWHERE

    def _refresh(self) -> None:
        if not self.stale:
            return
        self.stale = False
        self._namespaces = {key.namespace for key in self._store.services}
        self._by_address = {}
        for key, service in self._store.services.items():
            base = (key.name, key.namespace, SVC, *self._domain)
            for address in cluster_ips(service):
                self._by_address[address] = base
            for record in self._headless(service, base):
                self._by_address.setdefault(str(record.data), (_dashed(str(record.data)), *base))


_TYPES = {Family.IPV4: "A", Family.IPV6: "AAAA"}


def _dashed(address: str) -> str:
    """The label of an endpoint: 10-0-0-1, fd00--1. A label neither begins nor ends with a dash."""
    text = address.replace(".", "-").replace(":", "-")
    return f"{'0' if text.startswith('-') else ''}{text}{'0' if text.endswith('-') else ''}"


def _address_of(name: Name) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a name below in-addr.arpa or ip6.arpa is about; None where it is about none."""
    digits: Sequence[str] = name[-3::-1]
    try:
        if _REVERSE[name[-2:]] == 4:
            return ipaddress.IPv4Address(".".join(digits))
        if len(digits) != 32 or any(len(digit) != 1 for digit in digits):
            return None
        return ipaddress.IPv6Address(int("".join(digits), 16))
    except ValueError:
        return None


def _reverse_zone(network: IPNetwork, name: Name) -> Name:
    """The smallest domain that holds all of a network: its labels are bytes, or hexadecimal digits."""
    labels = network.prefixlen // (8 if network.version == 4 else 4)
    return name[len(name) - 2 - labels :]
