"""A machine whose maps the agent's own code writes: objects go in, the real plan and reconcile code does the rest.

What `waggle.testing.machine` fills by hand is filled here as an agent fills it (`Agent._apply`, `Agent._flush`,
`Agent._set_service_ranges`), without the agent: store → plan_service and plan_vips → SourceRanges, ServiceTables and
Vips → maps, and Datapath → endpoint table.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from waggle.abi._generated import BACKEND_SIZE
from waggle.config import AgentConfig
from waggle.model.choice import NodeFacts
from waggle.model.interface import PodInterface
from waggle.model.objects import ZONE_LABEL, ObjectKey
from waggle.model.packets import LocalNode
from waggle.model.vip import service_ranges, taken_networks
from waggle.plan.services import PlanContext, plan_service
from waggle.plan.vips import plan_ranges, plan_vips
from waggle.reconcile.datapath import Datapath, NodeAddresses
from waggle.reconcile.maglev import MaglevTables
from waggle.reconcile.ranges import SourceRanges
from waggle.reconcile.services import ServiceTables
from waggle.reconcile.vips import Vips
from waggle.store import Store
from waggle.testing.machine import HOST_MAC, POD_MAC, Machine

FIRST_IFINDEX = 101


class ProgrammedNode:
    """A node of its own on a machine, as `local` says it is: the machine's maps are emptied first.

    Call everything from inside the machine (`Machine.inside`). The machine's addresses must be among the node's.
    """

    def __init__(self, machine: Machine, local: LocalNode) -> None:
        self.machine = machine
        self.local = local
        self.store = Store()
        maps = machine.maps
        empty(machine)
        config = AgentConfig(
            node_name=local.facts.name,
            nodeport_addresses=local.node_port_addresses,
            cgroup_root=Path("/nonexistent"),  # nothing is attached
        )
        self._has_ranges = False
        self._datapath = Datapath(config)
        self._datapath.maps = maps
        by_family = {ip_address(address).version: address for address in local.primary}
        self._datapath.set_node_addresses(
            NodeAddresses(by_family.get(4, ""), by_family.get(6, ""), frozenset(local.addresses))
        )
        for index, address in enumerate(sorted(local.pods)):
            machine.make_interface(FIRST_IFINDEX + index)
            self._datapath.set_pod(_interface(address, FIRST_IFINDEX + index), None)
        self.tables = ServiceTables(maps["wag_services"], maps["wag_backends"])
        self.tables.adopt()
        self.tables.complete()
        self.ranges = SourceRanges(maps["wag_source_ranges"])
        self.ranges.adopt()
        self.ranges.complete()
        self.vips = Vips(maps["wag_vips"], maps["wag_svc_ranges"])
        self.vips.adopt()
        self.vips.complete()
        self.maglev = MaglevTables(maps["wag_maglev"], maps["wag_maglev_work"], machine.programs["wag_maglev_fill"])

    def sync(self) -> None:
        """Makes the maps hold what the store does."""
        changes = self.store.take_changes()
        name = self.local.facts.name
        assert self.store.zones.get(name, "") in ("", self.local.facts.zone), f"{ZONE_LABEL} of {name}"
        facts = NodeFacts(name, self.local.facts.zone)
        context = PlanContext(facts, self.local.addresses, forwarding=self.local.forwarding)
        pending: list[ObjectKey] = sorted(changes.services | (set(self.store.services) if changes.nodes else set()))
        for key in pending:  # grows
            rows = plan_service(self.store, key, context)
            self.ranges.claim(key, (one for row in rows for one in row.ranges))
            self.maglev.claim(key, (one for row in rows for one in row.tables))
            self.vips.claim(key, plan_vips(self.store.services.get(key)))
            pending += sorted(other for other in self.tables.apply(key, rows) if isinstance(other, ObjectKey))
        self.ranges.write()
        self.maglev.write()
        done = self.tables.flush()
        self.ranges.clean()
        self.vips.write()
        self.maglev.clean()
        self.tables.settle(done.ticket)
        if changes.nodes or changes.service_cidrs or not self._has_ranges:
            self._set_service_ranges()

    def _set_service_ranges(self) -> None:
        taken = taken_networks(self.local.addresses, self.store.nodes.values())
        configured = self.local.service_cidr
        found = service_ranges(self.store.service_cidrs.values(), configured, taken, self.vips.most_ranges)
        self.vips.set_ranges(plan_ranges(found.networks))
        self.vips.write()
        self._has_ranges = True

    def age(self, seconds: int) -> None:
        """Makes every flow and every affinity older."""
        self.machine.age_affinity(seconds)
        self.machine.age_nat(seconds)


def _interface(address: str, ifindex: int) -> PodInterface:
    name = f"wag{ifindex}"
    return PodInterface(name, "eth0", name, ifindex, HOST_MAC, POD_MAC, (ip_address(address),), Path("/nonexistent"))


def empty(machine: Machine) -> None:
    """Quicker than `Machine.reset`: only what packets and the plan fill."""
    machine.forget_services()
    for name in (
        "wag_services",
        "wag_source_ranges",
        "wag_endpoints",
        "wag_netns",
        "wag_nat",
        "wag_affinity",
        "wag_fragments",
        "wag_flows",
        "wag_maglev",
        "wag_vips",
    ):
        table = machine.maps[name]
        table.delete_many(list(table.keys()))
    # flows of before would have those of now displaced
    for name in ("wag_nat_young", "wag_nat_counts", "wag_svc_ranges"):
        table = machine.maps[name]
        size = table.info.max_entries
        table.update_packed(
            b"".join(index.to_bytes(4, "little") for index in range(size)), bytes(size * table.value_size), size
        )
    backends = machine.maps["wag_backends"]
    size = backends.info.max_entries
    used = backends.read_array(0, size).rstrip(b"\0")  # else what was not written might be right by chance
    count = -(-len(used) // BACKEND_SIZE)
    if count:
        keys = b"".join(index.to_bytes(4, "little") for index in range(count))
        backends.update_packed(keys, bytes(count * BACKEND_SIZE), count)
