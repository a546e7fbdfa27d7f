"""Gives Services of manifests the cluster addresses they come without, from the setting service-cidr, for good.

Who has which address is kept in a file, so that of two Services whose names lead to one address the same has it after a
restart. Invariant: no address is given out that a known Service has.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from waggle.model.cluster_addresses import choose_address, needs_address, wanted_families
from waggle.model.objects import ObjectKey, Service
from waggle.model.service import IPNetwork, cluster_ips, family_of
from waggle.model.vip import NO_RANGES
from waggle.sources.problem import Problem, ProblemSet

log = logging.getLogger(__name__)


class ClusterAddresses:
    """`ranges` are texts as the setting has them. Every Service of the manifests comes by `complete` and `release`."""

    def __init__(self, ranges: Iterable[str], file: Path) -> None:
        self._ranges: Sequence[IPNetwork] = [ipaddress.ip_network(text) for text in ranges if text != NO_RANGES]
        self._file = file
        self._problems = ProblemSet(log)
        self._given = self._load() if self._ranges else {}
        self._saved = dict(self._given)
        self._chosen: dict[ObjectKey, list[str]] = {}  # by those who wrote the Services
        self._present: set[ObjectKey] = set()
        self._taken = Counter(address for addresses in self._given.values() for address in addresses)

    def problems(self) -> list[Problem]:
        """Services that get no address, and why addresses may not be the same after a restart."""
        return self._problems.all()

    def complete(self, services: Sequence[Service]) -> dict[ObjectKey, Service]:
        """Those of the Services that come without an address, with one."""
        if not self._ranges:
            return {}
        self._present.update(service.key for service in services)
        for service in services:
            if not needs_address(service):
                self._forget(service.key)
                self._chosen[service.key] = cluster_ips(service)
                self._taken.update(self._chosen[service.key])
        found = {service.key: self._complete(service) for service in services if needs_address(service)}
        self._save()
        return found

    def release(self, key: ObjectKey) -> None:
        """The Service is gone. Another may have its address, from the next one on that comes."""
        self._forget(key)
        self._present.discard(key)
        self._problems.clear(str(key))

    def _forget(self, key: ObjectKey) -> tuple[str, ...]:
        """Nothing is given to this Service. What was."""
        before = self._given.pop(key, ())
        for address in (*before, *self._chosen.pop(key, ())):
            self._taken[address] -= 1
            if not self._taken[address]:
                del self._taken[address]
        return before

    def _complete(self, service: Service) -> Service:
        key = service.key
        before = self._forget(key)
        addresses: list[str] = []
        missing: list[str] = []
        for family in wanted_families(service, self._ranges):
            networks = [network for network in self._ranges if family_of(str(network)) is family]
            address = self._keep(before, networks) or self._choose(key, networks)
            if address is not None:
                addresses.append(address)
            else:
                full = f"no {family} address is left in service-cidr"
                missing.append(full if networks else f"service-cidr has no {family} range")
        self._problems.report(
            str(key), [Problem(f"Service {key}", f"gets no cluster address: {reason}") for reason in missing]
        )
        if not addresses:
            return service
        self._given[key] = tuple(addresses)
        self._taken.update(addresses)
        families = [family_of(address).value for address in addresses]
        spec = replace(service.spec, cluster_ip=addresses[0], cluster_ips=addresses, ip_families=families)
        return replace(service, spec=spec)

    def _keep(self, before: Sequence[str], networks: Sequence[IPNetwork]) -> str | None:
        for address in before:
            if address not in self._taken and any(ipaddress.ip_address(address) in network for network in networks):
                return address
        return None

    def _choose(self, key: ObjectKey, networks: Sequence[IPNetwork]) -> str | None:
        for _ in range(2):
            for network in networks:
                address = choose_address(network, key, self._taken)
                if address is not None:
                    return address
            for other in self._given.keys() - self._present:  # Services that went while no agent was there
                self._forget(other)
        return None

    # -- the file

    def _load(self) -> dict[ObjectKey, tuple[str, ...]]:
        try:
            kept = msgspec.json.decode(self._file.read_bytes(), type=dict[str, tuple[str, ...]])
            found = {}
            for name, addresses in kept.items():
                namespace, _, service = name.partition("/")
                found[ObjectKey(namespace, service)] = tuple(str(ipaddress.ip_address(one)) for one in addresses)
            return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            log.warning(
                "%s cannot be read; Services get the addresses that follow from their names: %s", self._file, error
            )
            return {}

    def _save(self) -> None:
        if self._given == self._saved:
            return
        scratch = self._file.with_suffix(".tmp")
        text = msgspec.json.encode({str(key): list(addresses) for key, addresses in sorted(self._given.items())})
        try:
            scratch.write_bytes(msgspec.json.format(text) + b"\n")
            scratch.replace(self._file)
        except OSError as error:
            reason = f"cannot write {self._file}: {error.strerror}: addresses may change with a restart"
            self._problems.report("file", [Problem("cluster addresses", reason)])
            return
        self._saved = dict(self._given)
        self._problems.clear("file")
