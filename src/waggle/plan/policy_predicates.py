"""What can be true of an address: the terms that peers of policies are made of.

A predicate is known by its canonical text, and there is one object for each text, so that sets of predicates compare
and hash by identity: selectors that ask for the same in other words are one predicate. A class is a set of
predicates, and its id a hash of their texts.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, TypeVar, cast
from weakref import WeakValueDictionary

from waggle.model.policy_objects import LabelSelector
from waggle.model.selectors import requirements, selects
from waggle.model.service import IPNetwork


class Predicate:
    """Holds for an address or does not. Equal only to itself: `Predicates` makes one for each text.

    `broad`: it holds for all pods, or all addresses of a family.
    """

    __slots__ = ("__weakref__", "text")

    @property
    def broad(self) -> bool:
        return False

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class PodTerm(Predicate):
    """Pods of a namespace, or of the namespaces that a selector selects, whose labels a selector selects."""

    __slots__ = ("namespace", "namespaces", "pods")

    def __init__(self, text: str, namespace: str | None, namespaces: LabelSelector, pods: LabelSelector) -> None:
        super().__init__(text)
        self.namespace = namespace
        self.namespaces = namespaces
        self.pods = pods

    @property
    def broad(self) -> bool:
        return self.namespace is None and not requirements(self.namespaces) and not requirements(self.pods)

    def holds(self, namespace: str, namespace_labels: Mapping[str, str], labels: Mapping[str, str]) -> bool:
        """Whether it means the pods that have `labels` in a namespace."""
        if self.namespace is not None:
            return namespace == self.namespace and selects(self.pods, labels)
        return selects(self.namespaces, namespace_labels) and selects(self.pods, labels)


class NodeTerm(Predicate):
    """Addresses of nodes whose labels a selector selects."""

    __slots__ = ("nodes",)

    def __init__(self, text: str, nodes: LabelSelector) -> None:
        super().__init__(text)
        self.nodes = nodes

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether it means a node that has `labels`."""
        return selects(self.nodes, labels)


class Block(Predicate):
    """Addresses in a prefix, and in none of those that it excepts."""

    __slots__ = ("excepts", "network")

    def __init__(self, text: str, network: IPNetwork, excepts: tuple[IPNetwork, ...]) -> None:
        super().__init__(text)
        self.network = network
        self.excepts = excepts

    @property
    def broad(self) -> bool:
        return self.network.prefixlen == 0 and not self.excepts


class PortName(NamedTuple):
    """A named port of one protocol, as in the pods' containers; the number differs from pod to pod."""

    name: str
    protocol: int  # PROTOCOL_INDEX


class PortTerm(Predicate):
    """Pods whose port of that name has this number."""

    __slots__ = ("number", "port")

    def __init__(self, text: str, port: PortName, number: int) -> None:
        super().__init__(text)
        self.port = port
        self.number = number


class NameTerm(Predicate):
    """Addresses that DNS answers gave for names of a pattern. Learned on the way: in no class of an address."""

    __slots__ = ("pattern",)

    def __init__(self, text: str, pattern: str) -> None:
        super().__init__(text)
        self.pattern = pattern


Term = TypeVar("Term", bound=Predicate)


class Predicates:
    """Makes predicates, one for each text, and forgets those that nobody has any more."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[str, Predicate] = WeakValueDictionary()

    def pods(self, namespace: str | None, namespaces: LabelSelector | None, pods: LabelSelector | None) -> PodTerm:
        """`namespace`: the one namespace that is meant; None: those of the selector."""
        where, which = namespaces or LabelSelector(), pods or LabelSelector()
        place = ["namespace", namespace] if namespace is not None else ["namespaces", _canonical(where)]
        return self._make(PodTerm, _text("pods", *place, _canonical(which)), namespace, where, which)

    def nodes(self, nodes: LabelSelector) -> NodeTerm:
        return self._make(NodeTerm, _text("nodes", _canonical(nodes)), nodes)

    def block(self, cidr: str, excepts: Iterable[str] = ()) -> Block | None:
        """None for a block that holds no address."""
        network = parse_network(cidr)
        if network is None:
            return None
        parts = {part for text in excepts if (part := parse_network(text)) and part.version == network.version}
        if any(_within(network, part) for part in parts):
            return None
        inside = tuple(
            sorted((p for p in parts if _within(p, network)), key=lambda p: (p.network_address, p.prefixlen))
        )
        text = _text("block", str(network), [str(part) for part in inside])
        return self._make(Block, text, network, inside)

    def port(self, port: PortName, number: int) -> PortTerm:
        return self._make(PortTerm, _text("port", port.name, port.protocol, number), port, number)

    def name(self, pattern: str) -> NameTerm:
        canonical = pattern.lower().rstrip(".")
        return self._make(NameTerm, "name:" + canonical, canonical)

    def _make(self, kind: Callable[..., Term], text: str, *parts: object) -> Term:
        found = self._known.get(text)
        if found is None:
            made = kind(text, *parts)
            self._known[text] = made
            return made
        return cast(Term, found)  # a text begins with its kind


def class_text(predicates: Iterable[Predicate]) -> str:
    """What the id of a class is a hash of."""
    return "\n".join(sorted(predicate.text for predicate in predicates))


def hash64(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=65536)
def parse_network(text: str) -> IPNetwork | None:
    """A prefix, whatever bits its host part has; None for what is none, and for IPv4 in IPv6, which nobody sends."""
    try:
        network = ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        return None
    return None if network.version == 6 and _within(network, _MAPPED) else network


_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def _within(inner: IPNetwork, outer: IPNetwork) -> bool:
    if inner.version != outer.version or inner.prefixlen < outer.prefixlen:
        return False
    shift = outer.max_prefixlen - outer.prefixlen
    return int(inner.network_address) >> shift == int(outer.network_address) >> shift


def _canonical(selector: LabelSelector) -> list[object]:
    """The requirements in one order, each once, whichever way they were written."""
    every = {(r.key, r.operator, tuple(sorted(set(r.values)))) for r in requirements(selector)}
    return [list(requirement) for requirement in sorted(every)]


def _text(*parts: object) -> str:
    return json.dumps(parts, separators=(",", ":"))
