"""Cases of the planner of policy that have a name; what holds in general is in test_policy_planner."""

from __future__ import annotations

import msgspec
import pytest
import yaml
from policy_brute import look_up

from waggle.model.meta import ObjectKey
from waggle.model.objects import Node, Pod
from waggle.model.policy_objects import AUDIT_ANNOTATION, ClusterNetworkPolicy, Namespace, NetworkPolicy
from waggle.model.policy_rules import NO_RULE, Direction
from waggle.plan.policy import PolicyPlanner
from waggle.plan.policy_ids import PolicyIds
from waggle.plan.policy_memory import entry_bytes, identity_tables
from waggle.plan.policy_predicates import Predicates, hash64
from waggle.plan.policy_ranges import BlockRanges
from waggle.plan.policy_tables import ALLOW, ANY, AUDIT, DENY, END, NOBODY, OPEN, SELF, step_key

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
KINDS = {"Pod": Pod, "Namespace": Namespace, "Node": Node}
WEB, DB, OTHER = ObjectKey("a", "web"), ObjectKey("a", "db"), ObjectKey("b", "web")
ADDRESSES = {WEB: "10.0.0.1", DB: "10.0.0.2", OTHER: "10.0.1.1"}


def pod(key: ObjectKey, *addresses: str, **labels: str) -> Pod:
    made = {
        "metadata": {"name": key.name, "namespace": key.namespace, "labels": labels or {"app": key.name}},
        "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"podIPs": [{"ip": address} for address in addresses or [ADDRESSES[key]]]},
    }
    return msgspec.convert(made, Pod)


def policy(text: str, name: str = "p", namespace: str = "a") -> NetworkPolicy:
    made = {"metadata": {"name": name, "namespace": namespace}, "spec": yaml.safe_load(text)}
    return msgspec.convert(made, NetworkPolicy)


def cluster_policy(text: str, name: str = "c") -> ClusterNetworkPolicy:
    return msgspec.convert({"metadata": {"name": name}, "spec": yaml.safe_load(text)}, ClusterNetworkPolicy)


def planner(*objects: NetworkPolicy | ClusterNetworkPolicy, hashed=hash64) -> PolicyPlanner:
    """Knows the pods a/web, which is here, a/db and b/web, and the node 192.168.0.1."""
    made = PolicyPlanner(hashed)
    made.set_own_addresses(["192.168.0.1"])
    for key in ADDRESSES:
        made.set_pod(key, pod(key))
    made.attach(ADDRESSES[WEB], WEB)
    for obj in objects:
        add(made, obj)
    made.plan()
    return made


def add(made: PolicyPlanner, obj: NetworkPolicy | ClusterNetworkPolicy) -> None:
    if isinstance(obj, NetworkPolicy):
        made.set_policy(obj.key, obj)
    else:
        made.set_cluster_policy(obj.key, obj)


def may(made: PolicyPlanner, direction: Direction, peer: str, protocol: str = "TCP", port: int | None = 80) -> bool:
    return bool(look_up(made.tables, direction, "10.0.0.1", peer, protocol, port)[0] & ALLOW)


ONLY_DB = "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: db}}}]}]}"


def test_without_policies_nothing_is_written_for_pods():
    tables = planner().tables
    assert (tables.pods, tables.sets) == ({"10.0.0.1": (OPEN, OPEN)}, {})
    assert tables.classes == {"192.168.0.1": SELF}


def test_a_pod_nobody_knows_has_no_sets():
    made = planner()
    made.attach("10.0.0.9", ObjectKey("a", "late"))
    made.plan()
    assert "10.0.0.9" not in made.tables.pods
    made.set_pod(ObjectKey("a", "late"), pod(ObjectKey("a", "late"), "10.0.0.9"))
    (delta,) = made.plan()
    assert delta.pods == {"10.0.0.9": (OPEN, OPEN)}


def test_what_is_no_address_or_no_port_of_a_pod_is_passed_over():
    made = planner(policy("{podSelector: {}, ingress: [{ports: [{port: http}]}]}"))
    odd = msgspec.convert(
        {
            "metadata": {"name": "odd", "namespace": "a"},
            "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 70000}]}]},
            "status": {"podIPs": [{"ip": "pending"}, {"ip": "10.0.0.9"}]},
        },
        Pod,
    )
    made.attach("10.0.0.9", odd.key)
    made.set_pod(odd.key, odd)
    made.plan()
    assert look_up(made.tables, INGRESS, "10.0.0.9", "10.0.0.2", "TCP", 70000 & 0xFFFF)[0] == DENY


def test_policies_of_other_pods_make_nothing():
    elsewhere = policy("{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {}}]}]}")
    assert planner(elsewhere).tables.sets == {}


def test_a_new_pod_is_one_write_and_one_that_nobody_means_is_none():
    made = planner(policy(ONLY_DB))
    meant, other = ObjectKey("a", "db-2"), ObjectKey("b", "db-2")
    made.set_pod(meant, pod(meant, "10.0.0.7", app="db"))
    (delta,) = made.plan()
    assert list(delta.classes) == ["10.0.0.7"]
    assert (delta.entries, delta.pods, delta.ranges) == ({}, {}, {})
    made.set_pod(other, pod(other, "10.0.0.8", app="db"))
    assert made.plan() == []


def test_a_label_change_moves_an_address_and_back():
    made = planner(policy(ONLY_DB))
    before = made.tables.classes.copy()
    made.set_pod(DB, pod(DB, app="cache"))
    (delta,) = made.plan()
    assert delta.classes_gone == ["10.0.0.2"]
    assert not may(made, INGRESS, "10.0.0.2")
    made.set_pod(DB, pod(DB))
    made.plan()
    assert made.tables.classes == before


def test_an_update_that_says_the_same_writes_nothing():
    made = planner(policy(ONLY_DB))
    same = "{podSelector: {matchExpressions: [{key: app, operator: In, values: [web, web]}]}, policyTypes: [Ingress],"
    again = policy(
        same + "ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [db]}]}}]}]}"
    )
    add(made, again)
    assert made.plan() == []


def test_a_changed_policy_is_a_new_set_beside_the_old_one():
    made = planner(policy(ONLY_DB))
    (old,) = made.tables.sets
    add(made, policy(ONLY_DB.replace("app: db", "app: cache")))
    first, second = made.plan()
    (new,) = first.entries
    assert new != old
    assert first.sets_gone == []
    assert first.pods == {"10.0.0.1": (new, OPEN)}
    assert second.sets_gone == [old]
    assert list(made.tables.sets) == [new]


def test_the_default_of_a_set_stands_for_every_class_without_an_entry():
    made = planner(policy("{podSelector: {}, ingress: [{ports: [{port: 80}]}, {from: [{podSelector: {}}]}]}"))
    (entries,) = made.tables.sets.values()
    assert {step.verdict for step in entries[ANY]} == {DENY, ALLOW}
    assert may(made, INGRESS, "203.0.113.1")
    assert not may(made, INGRESS, "203.0.113.1", "TCP", 81)
    assert may(made, INGRESS, "10.0.0.2", "TCP", 81)
    assert len(entries) == 3  # the default, pods of the namespace, this node


def test_a_block_of_a_whole_family_needs_no_entry_for_each_class():
    text = "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}]}]}"
    made = planner(policy(text), policy(ONLY_DB, "q"))
    egress = made.tables.sets[made.tables.pods["10.0.0.1"][1]]
    assert set(egress) == {ANY, NOBODY, SELF}  # what is no IPv4 address is in no class, and is denied
    assert may(made, EGRESS, "203.0.113.1")
    assert may(made, EGRESS, "10.0.0.2")
    assert not may(made, EGRESS, "2001:db8::1")


def test_a_rule_for_all_pods_needs_no_entry_for_each_class():
    everybody = policy("{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}", "q")
    made = planner(policy(ONLY_DB.replace("ingress", "policyTypes: [Egress], egress").replace("from", "to")), everybody)
    ingress, egress = made.tables.pods["10.0.0.1"]
    assert made.tables.classes["10.0.0.2"] != made.tables.classes["10.0.1.1"]
    assert set(made.tables.sets[ingress]) == {ANY, NOBODY, SELF}
    assert len(made.tables.sets[egress]) == 3
    assert may(made, INGRESS, "10.0.0.2")
    assert may(made, INGRESS, "10.0.1.1")
    assert not may(made, INGRESS, "203.0.113.1")


def test_ipv6_of_any_address_means_no_ipv4_address():
    text = "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: '::/0'}}]}]}"
    made = planner(policy(text))
    assert made.tables.ranges["0.0.0.0/0"] == NOBODY
    assert may(made, EGRESS, "2001:db8::1")
    assert not may(made, EGRESS, "203.0.113.1")


def test_longer_ranges_are_written_before_and_removed_after_shorter_ones():
    text = "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.1.2.0/24]}}]}]}"
    made = planner()
    add(made, policy(text))
    (delta,) = made.plan()
    assert list(delta.ranges) == ["10.1.2.0/24", "10.1.0.0/16", "10.0.0.0/8"]
    made.set_policy(ObjectKey("a", "p"), None)
    deltas = made.plan()
    assert list(deltas[-1].ranges.items()) == [("10.0.0.0/8", None), ("10.1.0.0/16", None), ("10.1.2.0/24", None)]


def test_named_ports_are_those_of_the_pod_a_packet_is_for():
    text = "{podSelector: {}, ingress: [{ports: [{port: http}]}], egress: [{ports: [{port: http}]}]}"
    made = planner(policy(text))
    for direction in Direction:
        assert may(made, direction, "10.0.1.1", "TCP", 8080)
        assert not may(made, direction, "10.0.1.1", "UDP", 8080)
        assert not may(made, direction, "10.0.1.1", "TCP", 80)
    assert may(made, INGRESS, "203.0.113.1", "TCP", 8080)
    assert not may(made, EGRESS, "203.0.113.1", "TCP", 8080)  # no pod, no names


def test_the_node_is_let_through_unless_tier_admin_denies_it():
    deny = cluster_policy(
        "{tier: Admin, priority: 1, subject: {namespaces: {}},"
        " egress: [{action: Deny, to: [{networks: [192.168.0.0/16]}]}]}"
    )
    isolated = policy("{podSelector: {}, policyTypes: [Ingress, Egress]}")
    assert may(planner(isolated), EGRESS, "192.168.0.1")
    assert may(planner(isolated), INGRESS, "192.168.0.1")
    made = planner(isolated, deny)
    assert not may(made, EGRESS, "192.168.0.1")
    assert may(made, INGRESS, "192.168.0.1")
    assert made.tables.classes["192.168.0.1"] != SELF  # other addresses of the node may be let through


def test_fragments_match_rules_for_all_ports_alone():
    made = planner(policy("{podSelector: {}, ingress: [{ports: [{port: 1, endPort: 65535}, {protocol: UDP}]}]}"))
    assert may(made, INGRESS, "203.0.113.1", "TCP", 1)
    assert not may(made, INGRESS, "203.0.113.1", "TCP", None)
    assert may(made, INGRESS, "203.0.113.1", "UDP", None)
    assert not may(made, INGRESS, "203.0.113.1", "ICMP", None)


def test_names_are_asked_at_the_place_of_their_rule():
    text = """{tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [
        {action: Accept, to: [{domainNames: [a.org]}]},
        {action: Deny, to: [{networks: [0.0.0.0/0]}]},
        {action: Accept, to: [{domainNames: [b.org]}]}]}"""
    made = planner(cluster_policy(text))
    asked = made.tables, EGRESS, "10.0.0.1", "203.0.113.1", "TCP", 80
    assert look_up(*asked)[0] == DENY
    assert look_up(*asked, frozenset(("a.org",)))[0] == ALLOW
    assert look_up(*asked, frozenset(("b.org",)))[0] == DENY
    assert made.tables.patterns == {name: hash64(f"name:{name}") & 0xFFFFFFFF for name in ("a.org", "b.org")}
    made.set_cluster_policy(ObjectKey("", "c"), None)
    made.plan()
    assert made.tables.patterns == {}


def test_only_sets_with_names_have_odd_ids():
    named = (
        "{tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [{action: Accept, to: [{domainNames: [a.b]}]}]}"
    )
    made = planner(policy(ONLY_DB), cluster_policy(named))
    ((ingress, egress),) = made.tables.pods.values()
    assert (ingress & 1, egress & 1) == (0, 1)


def test_an_audited_policy_that_accepts_names_is_tried_as_it_would_be():
    text = """{tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [
        {action: Accept, to: [{domainNames: [a.org]}]},
        {action: Deny, to: [{networks: [0.0.0.0/0]}]}]}"""
    audited = cluster_policy(text)
    audited = msgspec.structs.replace(
        audited, metadata=msgspec.structs.replace(audited.metadata, annotations={AUDIT_ANNOTATION: "true"})
    )
    asked = planner(audited).tables, EGRESS, "10.0.0.1", "203.0.113.1", "TCP", 80
    assert look_up(*asked)[0] == ALLOW | AUDIT
    assert look_up(*asked, frozenset(("a.org",)))[0] == ALLOW


def test_rules_are_known_while_a_set_has_them():
    made = planner(policy(ONLY_DB))
    (number,) = made.tables.rules
    assert look_up(made.tables, INGRESS, "10.0.0.1", "10.0.0.2", "TCP", 80) == (ALLOW, number)
    assert look_up(made.tables, INGRESS, "10.0.0.1", "10.0.1.1", "TCP", 80) == (DENY, NO_RULE)
    assert str(made.tables.rules[number]) == "NetworkPolicy a/p ingress[0]"
    made.set_policy(ObjectKey("a", "p"), None)
    made.plan()
    assert (made.tables.rules, made.tables.set_names) == ({}, {})


def test_texts_with_one_hash_get_two_ids():
    ids = PolicyIds(lambda text: len(text) // 10 + 5)
    first, second = ids.take("one"), ids.take("two")
    assert first != second
    ids.drop(first)
    assert ids.take("one") == first


@pytest.mark.parametrize("reserved", [0, 1, ANY])
def test_ids_that_mean_something_else_are_not_given(reserved):
    assert PolicyIds(lambda text: 77 if text.endswith("#") else reserved).take("x") == 77


def test_tables_are_right_where_all_hashes_collide():
    made = planner(
        policy(ONLY_DB), policy("{podSelector: {}, ingress: []}", "q"), hashed=lambda text: len(text) % 3 + 2
    )
    assert may(made, INGRESS, "10.0.0.2")
    assert not may(made, INGRESS, "10.0.1.1")


def test_selectors_that_ask_for_the_same_are_one_predicate():
    predicates = Predicates()
    one = policy("{podSelector: {matchLabels: {a: b, c: d}}}").spec.pod_selector
    other = policy(
        "{podSelector: {matchExpressions: [{key: c, operator: In, values: [d]}, {key: a, operator: In, values: [b]}]}}"
    ).spec.pod_selector
    assert predicates.pods("a", None, one) is predicates.pods("a", None, other)
    assert predicates.pods("a", None, one) is not predicates.pods("b", None, one)


def test_ranges_forget_what_was_there():
    predicates, ranges = Predicates(), BlockRanges()
    blocks = [
        predicates.block("10.0.0.0/8", ["10.1.0.0/16"]),
        predicates.block("10.1.0.0/16"),
        predicates.block("::/0"),
    ]
    for block in blocks:
        ranges.add(block)
    assert [prefix.cidr for prefix in ranges.entries] == ["10.0.0.0/8", "10.1.0.0/16", "::/0", "0.0.0.0/0"]
    assert ranges.at(4, 0x0A010203) == {blocks[1]}
    for block in blocks:
        ranges.remove(block)
    assert ranges.entries == {}


def test_keys_of_steps():
    assert step_key("ICMP", None) == 0
    assert step_key("TCP", 80) == 0x10050
    assert step_key("SCTP", 65535) == END - 1


def test_memory_beside_an_identity_for_each_set_of_labels():
    ports = "[{port: 80}, {port: 90, endPort: 95}]"
    made = planner(policy(f"{{podSelector: {{}}, ingress: [{{from: [{{namespaceSelector: {{}}}}], ports: {ports}}}]}}"))
    usual = identity_tables(made.tables, [pod(key) for key in ADDRESSES])
    assert (usual.identities, usual.addresses) == (3, 3)
    assert usual.entries == 3 * 3  # three runs of ports: 80, 90 to 91, 92 to 95
    assert entry_bytes(made.tables) < 1000
