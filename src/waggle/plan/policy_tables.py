"""What the programs look policy up in, as values: the contract between the planner and the reconciler.

A look-up, of an address as the peer of a pod whose set in that direction is `set`:

1. its class: the exact entry of the address, else the longest prefix that holds it, else NOBODY;
2. the steps of (set, class), else of (set, ANY), else a deny;
3. the last step that starts at or below the key of protocol and port;
4. for an egress set with domain names (its id is odd), where that step does not simply allow: of each pattern that the
   address has a name of, the step of (set, the pattern's class). Where that allows, and stands before what was decided
   in either tier (`Step.admin`, `Step.baseline`), the name decides. Where the step allows with AUDIT, it is the class
   with STRICT that is asked.

Entries are added and removed, never changed into something else, as ids are hashes of what they stand for. Every
state on the way from one set of tables to the next answers as the old or as the new one, if a `PolicyDelta` is
applied in the order of its fields.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from waggle.model.meta import ObjectKey
from waggle.model.policy_rules import Direction, RuleRef

Value = TypeVar("Value")

#: Class of an address that no selector or block in use means.
NOBODY = 0
#: Class of this node's own addresses.
SELF = 1
#: Class of every class that a set has no entry for.
ANY = (1 << 64) - 1
#: Set of a direction in which nothing is asked: everything passes.
OPEN = 0
#: Set of a pod whose policies are not in force yet.
PENDING = (1 << 64) - 1

#: Class of a pattern of domain names: this, with the id of the pattern (32 bits).
NAMED = 0x6E616D65 << 32
#: Besides: the audited policies included.
STRICT = 1 << 63

DENY = 0
ALLOW = 1
#: With ALLOW: it would be denied were the audited policies enforced.
AUDIT = 2

PORT_BITS = 16
#: Keys below 1 << PORT_BITS are of all protocols that have no ports.
PROTOCOL_INDEX = {"TCP": 1, "UDP": 2, "SCTP": 3}
#: One past the last key.
END = 4 << PORT_BITS


class Step(NamedTuple):
    """From the key `start` on: what happens, and the rule that says so (policy_rules.rule_id). Of a verdict with
    AUDIT, the rule is the one that would deny; 0 where no rule but isolation or a default decides.

    `admin` and `baseline`, in sets with domain names alone, say which of two answers comes first: the places in the
    set's list at which its Admin and its Baseline tier ended. Of a class: the place of the rule that ended the tier,
    LAST where no rule did; a tier that was not asked has FIRST, so that no name comes before it. Of a pattern: the
    places of the Accept rules that name it, LAST for none.
    """

    start: int
    verdict: int
    rule: int
    admin: int = 0
    baseline: int = 0


Steps = tuple[Step, ...]


def step_key(protocol: str, port: int | None) -> int:
    """Where a packet stands in a step function. Port 0 of a protocol with ports is that of a fragment without them."""
    index = PROTOCOL_INDEX.get(protocol, 0)
    return index << PORT_BITS | (port or 0 if index else 0)


class SetRef(NamedTuple):
    """What a set is made of: (kind, key) of the policies that say something, in the order in which they are asked."""

    direction: Direction
    policies: tuple[tuple[str, ObjectKey], ...]


#: Places in the order of a set's rules.
FIRST, LAST = 0, 0xFFFF


class NodeSets(NamedTuple):
    """The sets of the node's own traffic; those on trial are in force instead until `until_ns` of CLOCK_BOOTTIME."""

    ingress: int = OPEN
    egress: int = OPEN
    trial_ingress: int = OPEN
    trial_egress: int = OPEN
    until_ns: int = 0


@dataclass(slots=True)
class PolicyTables:
    """Everything that must be in the maps of a node."""

    classes: dict[str, int] = field(default_factory=dict)  # address → class, where that is not what its range says
    ranges: dict[str, int] = field(default_factory=dict)  # prefix → class
    sets: dict[int, dict[int, Steps]] = field(default_factory=dict)  # set → class → steps
    pods: dict[str, tuple[int, int]] = field(default_factory=dict)  # address of a pod here → sets: ingress, egress
    node: NodeSets = NodeSets()
    rules: dict[int, RuleRef] = field(default_factory=dict)
    set_names: dict[int, SetRef] = field(default_factory=dict)
    patterns: dict[str, int] = field(default_factory=dict)  # of domain names, of all sets → id

    def apply(self, delta: PolicyDelta) -> None:
        """Makes of the tables before an update those after it."""
        for set_id, entries in delta.entries.items():
            self.sets.setdefault(set_id, {}).update(entries)
        self.rules.update(delta.rules)
        self.set_names.update(delta.set_names)
        self.patterns.update(delta.patterns)
        self.classes.update(delta.classes)
        _change(self.ranges, delta.ranges)
        for address in delta.classes_gone:
            del self.classes[address]
        _change(self.pods, delta.pods)
        if delta.node is not None:
            self.node = delta.node
        for set_id, class_id in delta.entries_gone:
            del self.sets[set_id][class_id]
        for set_id in delta.sets_gone:
            del self.sets[set_id], self.set_names[set_id]
        for pattern in delta.patterns_gone:
            del self.patterns[pattern]
        for rule in delta.rules_gone:
            del self.rules[rule]


@dataclass(slots=True)
class PolicyDelta:
    """What to write, in the order of the fields; each of them in its own order.

    After `node` the revision is raised; what has `gone` in its name is only removed after that.
    """

    rules: dict[int, RuleRef] = field(default_factory=dict)
    set_names: dict[int, SetRef] = field(default_factory=dict)
    #: New entries: of new sets, and of new classes in sets that are there.
    entries: dict[int, dict[int, Steps]] = field(default_factory=dict)
    patterns: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    #: What is set comes first, with longer prefixes before the shorter ones that hold them; then what goes (None),
    #: the other way round: no address is ever left to a prefix that means others.
    ranges: dict[str, int | None] = field(default_factory=dict)
    #: Exact entries that say what the range says now.
    classes_gone: list[str] = field(default_factory=list)
    pods: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    node: NodeSets | None = None  # what they are now, where they change
    entries_gone: list[tuple[int, int]] = field(default_factory=list)
    sets_gone: list[int] = field(default_factory=list)  # their entries are in entries_gone
    patterns_gone: list[str] = field(default_factory=list)
    rules_gone: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


def _change(mapping: dict[str, Value], changes: Mapping[str, Value | None]) -> None:
    for key, value in changes.items():
        if value is None:
            del mapping[key]
        else:
            mapping[key] = value


def mapped_length(cidr: str) -> int:
    """The length of a prefix in 16 bytes, where IPv4 is ::ffff:a.b.c.d."""
    network = ipaddress.ip_network(cidr)
    return network.prefixlen + (96 if network.version == 4 else 0)


def in_writing_order(changes: Mapping[str, int | None]) -> dict[str, int | None]:
    """Changes of ranges in the order that `PolicyDelta.ranges` promises."""

    def order(item: tuple[str, int | None]) -> tuple[int, int, str]:
        length = mapped_length(item[0])
        return (1, length, item[0]) if item[1] is None else (0, -length, item[0])

    return dict(sorted(changes.items(), key=order))
