"""The store: who owns a row, what counts as a change, and indices that never drift from the rows."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_NAME_LABEL,
    ClusterNetworkPolicy,
    Endpoint,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    NodeSpec,
    Object,
    ObjectKey,
    ObjectMeta,
    Pod,
    PodSpec,
    PodStatus,
    Service,
    ServiceCIDR,
    ServiceCIDRSpec,
    ServiceSpec,
    kind_of,
)
from waggle.model.policy_objects import ClusterNetworkPolicySpec, ClusterSubject, LabelSelector, NetworkPolicySpec
from waggle.store import Store
from waggle.store.store import API

POLICY_KINDS = ("NetworkPolicy", "ClusterNetworkPolicy")
KINDS = ("Service", "EndpointSlice", "Pod", "Node", "ServiceCIDR", "Namespace", *POLICY_KINDS)
CLUSTER_SCOPED = ("Node", "ServiceCIDR", "Namespace", "ClusterNetworkPolicy")


def key(name: str, namespace: str = "default") -> ObjectKey:
    return ObjectKey(namespace, name)


def meta(name: str, namespace: str = "default", version: str = "", **labels: str) -> ObjectMeta:
    return ObjectMeta(name, namespace, resource_version=version, labels=labels or None)


def service(name: str, namespace: str = "default", address: str = "10.96.0.1", version: str = "", **selector: str):
    return Service(meta(name, namespace, version), ServiceSpec(cluster_ip=address, selector=selector or None))


def piece(name: str, of: str | None, *addresses: str, namespace: str = "default", version: str = "", **labels: str):
    if of is not None:
        labels[SERVICE_NAME_LABEL] = of
    return EndpointSlice(meta(name, namespace, version, **labels), endpoints=[Endpoint([a]) for a in addresses])


def pod(name: str, namespace: str = "default", address: str = "10.0.0.1", version: str = "", **labels: str):
    return Pod(meta(name, namespace, version, **labels), status=PodStatus("Running", address))


def node(name: str, cidr: str = "10.244.0.0/24", version: str = ""):
    return Node(ObjectMeta(name, resource_version=version), NodeSpec(cidr))


def service_cidr(name: str, cidr: str = "10.96.0.0/16", version: str = ""):
    return ServiceCIDR(ObjectMeta(name, resource_version=version), ServiceCIDRSpec([cidr]))


def namespace_of(name: str, version: str = "", **labels: str):
    return Namespace(meta(name, "", version, **labels))


def policy(name: str, namespace: str = "default", version: str = "", **selector: str):
    return NetworkPolicy(meta(name, namespace, version), NetworkPolicySpec(LabelSelector(selector)))


def cluster_policy(name: str, priority: int = 10, version: str = ""):
    subject = ClusterSubject(namespaces=LabelSelector())
    return ClusterNetworkPolicy(meta(name, "", version), ClusterNetworkPolicySpec("Admin", priority, subject))


def store_of(*objects: Object, origin: str = "api") -> Store:
    """A store that holds `objects` and has no changes waiting."""
    store = Store()
    for obj in objects:
        store.upsert(obj, origin)
    store.take_changes()
    return store


def changed(store: Store) -> set[str]:
    """What changed, as "service default/web"."""
    changes = store.take_changes()
    return (
        {f"service {k}" for k in changes.services}
        | {f"node {k}" for k in changes.nodes}
        | {f"pod {k}" for k in changes.pods}
        | {f"range {k}" for k in changes.service_cidrs}
        | {f"namespace {k}" for k in changes.namespaces}
        | {f"policy {k}" for k in changes.policies}
        | {f"cluster policy {k}" for k in changes.cluster_policies}
    )


ONE_OF_EACH = [
    service("web"),
    piece("web-1", "web", "10.0.0.1"),
    pod("web-1"),
    node("node1"),
    service_cidr("kubernetes"),
    namespace_of("team"),
    policy("deny"),
    cluster_policy("admin"),
]
OTHER_OF_EACH = [
    service("web", address="10.96.0.2"),
    piece("web-1", "web"),
    pod("web-1", address="10.0.0.2"),
    node("node1", "10.244.1.0/24"),
    service_cidr("kubernetes", "10.97.0.0/16"),
    namespace_of("team", tier="front"),
    policy("deny", app="web"),
    cluster_policy("admin", 20),
]
MARKS = [
    "service default/web",
    "service default/web",
    "pod default/web-1",
    "node node1",
    "range kubernetes",
    "namespace team",
    "policy default/deny",
    "cluster policy admin",
]


# -- what counts as a change ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("obj", "mark"), [*zip(ONE_OF_EACH, MARKS, strict=True)], ids=KINDS)
def test_an_object_that_comes_or_goes_is_a_change(obj: Object, mark: str):
    store = Store()
    store.upsert(obj, "api")
    assert changed(store) == {mark}
    store.delete(kind_of(obj), obj.key, "api")
    assert changed(store) == {mark}


@pytest.mark.parametrize(("old", "new", "mark"), [*zip(ONE_OF_EACH, OTHER_OF_EACH, MARKS, strict=True)], ids=KINDS)
def test_an_object_that_becomes_another_is_a_change(old: Object, new: Object, mark: str):
    store = store_of(old)
    store.upsert(new, "api")
    assert changed(store) == {mark}


@pytest.mark.parametrize("obj", ONE_OF_EACH, ids=KINDS)
def test_an_equal_object_is_no_change_and_wakes_nobody(obj: Object):
    store = store_of(obj)
    woken: list[int] = []
    store.on_change = lambda: woken.append(1)
    store.upsert(obj, "api")
    store.upsert(replace(obj, metadata=replace(obj.metadata, resource_version="2")), "api")
    store.upsert(replace(obj, metadata=replace(obj.metadata, resource_version="3")), "api")
    assert not store.take_changes()
    assert woken == []


@pytest.mark.parametrize(("obj", "mark"), [*zip(ONE_OF_EACH, MARKS, strict=True)], ids=KINDS)
def test_a_change_that_comes_with_a_new_resource_version_is_seen(obj: Object, mark: str):
    store = store_of(obj)
    store.upsert(replace(obj, metadata=replace(obj.metadata, resource_version="2", annotations={"a": "b"})), "api")
    assert changed(store) == {mark}


def test_changes_are_taken_once():
    store = Store()
    store.upsert(service("web"), "api")
    first = store.take_changes()
    assert first and not store.take_changes()
    store.upsert(service("api"), "api")
    assert first.services == {key("web")}, "what was taken does not grow"
    assert changed(store) == {"service default/api"}


def test_no_changes_are_false_and_any_kind_is_true():
    assert not Store().take_changes()
    for obj in ONE_OF_EACH:
        store = Store()
        store.upsert(obj, "api")
        assert store.take_changes()


@pytest.mark.parametrize("obj", ONE_OF_EACH, ids=KINDS)
def test_who_listens_is_woken_by_each_change(obj: Object):
    woken: list[str] = []
    store = Store()
    store.on_change = lambda: woken.append("!")
    store.upsert(obj, "api")
    store.delete(kind_of(obj), obj.key, "api")
    assert woken == ["!", "!"]


def test_marking_all_services_marks_those_that_are_there():
    store = store_of(service("web"), service("api"), pod("a"))
    woken: list[str] = []
    store.on_change = lambda: woken.append("!")
    store.mark_all_services()
    assert changed(store) == {"service default/web", "service default/api"}
    assert woken == ["!"]


# -- slices -----------------------------------------------------------------------------------------------------------


def test_a_slice_that_moves_to_another_service_changes_both():
    store = store_of(piece("s", "old", "10.0.0.1"))
    store.upsert(piece("s", "new", "10.0.0.1"), "api")
    assert changed(store) == {"service default/old", "service default/new"}
    assert {k: list(v) for k, v in store.slices_of.items()} == {key("new"): [key("s")]}


def test_a_slice_that_loses_its_service_changes_the_one_it_had():
    store = store_of(piece("s", "old", "10.0.0.1"))
    store.upsert(piece("s", None, "10.0.0.1"), "api")
    assert changed(store) == {"service default/old"}
    assert store.slices_of == {}
    assert key("s") in store.slices


@pytest.mark.parametrize("name", [None, ""])
def test_a_slice_of_no_service_is_nobodys_change(name: str | None):
    store = store_of(piece("s", name))
    store.upsert(piece("s", name, "10.0.0.1"), "api")
    assert not store.take_changes()


def test_a_slice_that_gets_the_headless_label_changes_its_service():
    store = store_of(piece("s", "web", "10.0.0.1"))
    store.upsert(piece("s", "web", "10.0.0.1", **{HEADLESS_LABEL: ""}), "api")
    assert changed(store) == {"service default/web"}


def test_slices_of_one_service_are_kept_apart_and_the_service_need_not_exist():
    store = store_of(piece("a", "web", "10.0.0.1"), piece("b", "web", "10.0.0.2"), piece("c", "web", namespace="other"))
    assert set(store.slices_of[key("web")]) == {key("a"), key("b")}
    store.delete("EndpointSlice", key("a"), "api")
    assert changed(store) == {"service default/web"}
    assert set(store.slices_of[key("web")]) == {key("b")}
    store.delete("EndpointSlice", key("b"), "api")
    assert key("web") not in store.slices_of


# -- pods and selectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"app": "web"}, {"app": "db"}, {"web", "db"}),
        ({"app": "web"}, {}, {"web"}),
        ({}, {"app": "web"}, {"web"}),
        ({"app": "web"}, {"app": "web", "tier": "front"}, {"web", "front"}),
        ({"app": "other"}, {"app": "another"}, set()),
    ],
)
def test_a_pod_that_changes_labels_changes_the_services_it_leaves_and_joins(old: dict, new: dict, expected: set[str]):
    store = store_of(
        service("web", app="web"),
        service("db", app="db"),
        service("front", app="web", tier="front"),
        service("fixed"),
        service("web", namespace="other", app="web"),
        pod("a", **old),
    )
    store.upsert(pod("a", **new), "api")
    assert changed(store) == {"pod default/a"} | {f"service default/{name}" for name in expected}


def test_a_selected_pod_that_comes_changes_and_goes_changes_its_service_each_time():
    store = store_of(service("web", app="web"))
    for act in (
        lambda: store.upsert(pod("a", app="web"), "api"),
        lambda: store.upsert(pod("a", address="10.0.0.2", app="web"), "api"),
        lambda: store.delete("Pod", key("a"), "api"),
    ):
        act()
        assert changed(store) == {"pod default/a", "service default/web"}


def test_a_service_that_loses_its_selector_is_no_longer_changed_by_pods():
    store = store_of(service("web", app="web"))
    store.upsert(service("web"), "api")
    assert changed(store) == {"service default/web"}
    store.upsert(pod("a", app="web"), "api")
    assert changed(store) == {"pod default/a"}


def test_a_service_that_is_gone_is_no_longer_changed_by_pods():
    store = store_of(service("web", app="web"))
    store.delete("Service", key("web"), "api")
    store.take_changes()
    store.upsert(pod("a", app="web"), "api")
    assert changed(store) == {"pod default/a"}


def test_a_selector_that_comes_later_selects_pods_that_are_there():
    store = store_of(service("web"), pod("a", app="web"))
    store.upsert(service("web", app="web"), "api")
    store.take_changes()
    store.delete("Pod", key("a"), "api")
    assert changed(store) == {"pod default/a", "service default/web"}


def test_pods_in_a_namespace():
    store = store_of(pod("a"), pod("b"), pod("c", namespace="other"))
    store.delete("Pod", key("a"), "api")
    assert [p.metadata.name for p in store.pods_in("default")] == ["b"]
    assert [p.metadata.name for p in store.pods_in("other")] == ["c"]
    assert list(store.pods_in("nowhere")) == []


# -- policies and who they are about ----------------------------------------------------------------------------------


def on_node(obj: Pod, name: str) -> Pod:
    return replace(obj, spec=PodSpec(node_name=name))


def test_pods_of_a_node_and_the_nodes_of_changed_pods():
    store = store_of(on_node(pod("a"), "node1"), on_node(pod("b"), "node2"), pod("c"))
    assert [p.metadata.name for p in store.pods_on("node1")] == ["a"]
    store.upsert(on_node(pod("b", app="web"), "node2"), "api")
    assert store.take_changes().pod_nodes == {"node2"}
    store.upsert(on_node(pod("c"), "node1"), "api")
    assert store.take_changes().pod_nodes == {"", "node1"}
    assert {p.metadata.name for p in store.pods_on("node1")} == {"a", "c"}
    store.delete("Pod", key("a"), "api")
    assert store.take_changes().pod_nodes == {"node1"}
    assert [p.metadata.name for p in store.pods_on("node1")] == ["c"]


def test_policies_of_a_namespace():
    store = store_of(policy("a"), policy("b"), policy("a", "other"), cluster_policy("c"))
    store.delete("NetworkPolicy", key("a"), "api")
    assert [p.metadata.name for p in store.policies_in("default")] == ["b"]
    assert [p.key for p in store.policies_in("other")] == [key("a", "other")]
    assert list(store.policies_in("nowhere")) == []


@pytest.mark.parametrize("obj", [policy("a"), cluster_policy("a")], ids=POLICY_KINDS)
def test_the_first_policy_and_the_end_of_the_last_are_told_before_anybody_plans(obj: Object):
    store = store_of(pod("a"))
    told: list[str] = []
    store.on_demand = lambda: told.append(f"demand {store.has_policies}")
    store.on_change = lambda: told.append("change")
    store.upsert(obj, "api")
    assert told == ["demand True", "change"]
    store.upsert(policy("second"), "file")
    store.delete(kind_of(obj), obj.key, "api")
    assert told == ["demand True", "change", "change", "change"]
    store.delete("NetworkPolicy", key("second"), "file")
    assert told[4:] == ["demand False", "change"]


def test_changes_that_policies_may_see_differently():
    for obj, mark in zip(ONE_OF_EACH, MARKS, strict=True):
        store = Store()
        store.upsert(obj, "api")
        expected = mark.startswith(("pod", "node", "namespace", "policy", "cluster policy"))
        assert store.take_changes().for_policy is expected, mark


def test_pods_that_the_api_names_serve_no_service():
    store = store_of(service("web", app="web"))
    store.upsert(pod("a", app="web"), API)
    assert changed(store) == {"pod default/a"}
    assert [p.metadata.name for p in store.pods_in("default")] == ["a"]
    assert list(store.serving_pods_in("default")) == []
    store.delete("Pod", key("a"), API)
    assert changed(store) == {"pod default/a"}


def test_a_pod_that_the_api_takes_over_serves_no_longer_and_serves_again_when_a_file_has_it():
    store = store_of(service("web", app="web"))
    store.upsert(pod("a", app="web"), "file")
    store.upsert(pod("a", app="web"), API)
    store.take_changes()
    store.delete("Pod", key("a"), "file")
    assert changed(store) == {"service default/web"}
    assert list(store.serving_pods_in("default")) == []
    store.upsert(pod("a", app="web"), "file")
    assert not store.take_changes()
    store.delete("Pod", key("a"), API)
    assert changed(store) == {"service default/web"}
    assert [p.metadata.name for p in store.serving_pods_in("default")] == ["a"]


# -- origins and heirs ------------------------------------------------------------------------------------------------

A, B, C = (service("web", address=f"10.96.0.{n}") for n in (1, 2, 3))


def test_the_first_origin_owns_and_the_others_change_nothing():
    store = store_of(A, origin="file")
    store.upsert(B, "api")
    assert not store.take_changes()
    assert (store.services[key("web")], store.owner("Service", key("web"))) == (A, "file")


def test_an_heir_takes_over_with_what_it_said_last():
    store = store_of(A, origin="file")
    store.upsert(B, "api")
    store.upsert(C, "api")
    store.delete("Service", key("web"), "file")
    assert changed(store) == {"service default/web"}
    assert (store.services[key("web")], store.owner("Service", key("web"))) == (C, "api")
    store.delete("Service", key("web"), "api")
    assert changed(store) == {"service default/web"}
    assert (store.services, store.owner("Service", key("web"))) == ({}, None)


def test_an_heir_that_says_the_same_is_no_change():
    store = store_of(A, origin="file")
    store.upsert(replace(A, metadata=replace(A.metadata, resource_version="7")), "api")
    store.delete("Service", key("web"), "file")
    assert not store.take_changes()
    assert store.owner("Service", key("web")) == "api"


def test_heirs_take_over_in_the_order_they_came():
    store = store_of(A, origin="one")
    store.upsert(B, "two")
    store.upsert(C, "three")
    owners = []
    for origin in ("one", "two", "three"):
        owners.append(store.owner("Service", key("web")))
        store.delete("Service", key("web"), origin)
    assert owners == ["one", "two", "three"]
    assert store.services == {}


def test_an_heir_that_let_go_before_does_not_take_over():
    store = store_of(A, origin="file")
    store.upsert(B, "api")
    store.delete("Service", key("web"), "api")
    assert not store.take_changes()
    store.delete("Service", key("web"), "file")
    assert store.services == {}


@pytest.mark.parametrize("kind", KINDS)
def test_deleting_what_is_not_known_is_no_error_and_no_change(kind: str):
    store = store_of(*ONE_OF_EACH)
    store.delete(kind, key("nobody"), "api")
    store.delete(kind, key("web"), "another")
    assert not store.take_changes()


def test_a_slice_that_an_heir_gives_to_another_service_changes_both():
    store = store_of(piece("s", "old"), origin="file")
    store.upsert(piece("s", "new"), "api")
    store.delete("EndpointSlice", key("s"), "file")
    assert changed(store) == {"service default/old", "service default/new"}


def test_keys_from_lists_what_an_origin_owns():
    store = store_of(service("web"), pod("a"), origin="file")
    store.upsert(pod("a"), "api")
    store.upsert(pod("b"), "api")
    assert set(store.keys_from("file")) == {("Service", key("web")), ("Pod", key("a"))}
    assert store.keys_from("api") == [("Pod", key("b"))]
    assert store.keys_from("nobody") == []


# -- replace ----------------------------------------------------------------------------------------------------------


def test_replace_brings_changes_and_removes():
    store = store_of(service("gone"), service("same"), service("new-address"))
    store.replace("Service", [service("same"), service("new-address", address="10.96.0.9"), service("fresh")], "api")
    assert changed(store) == {f"service default/{name}" for name in ("gone", "new-address", "fresh")}
    assert {k.name for k in store.services} == {"same", "new-address", "fresh"}


def test_replace_leaves_other_origins_and_other_kinds_alone():
    store = store_of(service("mine"), pod("a"))
    store.upsert(service("theirs"), "file")
    store.take_changes()
    store.replace("Service", [], "api")
    assert changed(store) == {"service default/mine"}
    assert (set(store.services), set(store.pods)) == ({key("theirs")}, {key("a")})


def test_replace_also_forgets_what_an_origin_would_have_inherited():
    store = store_of(A, origin="file")
    store.upsert(B, "api")
    store.replace("Service", [], "api")
    store.delete("Service", key("web"), "file")
    assert store.services == {}


def test_replace_hands_what_is_gone_to_the_heir():
    store = store_of(A, origin="file")
    store.upsert(B, "api")
    store.replace("Service", iter(()), "file")
    assert (store.services[key("web")], store.owner("Service", key("web"))) == (B, "api")


def test_replace_with_one_object_twice_keeps_the_last():
    store = Store()
    store.replace("Service", [A, B], "api")
    assert store.services == {key("web"): B}


# -- the property -----------------------------------------------------------------------------------------------------

NAMES, NAMESPACES, ORIGINS = ["a", "b", "c"], ["x", "y"], [API, "file", "cni"]
LABELS = st.dictionaries(st.sampled_from(["app", "tier"]), st.sampled_from(["1", "2"]), max_size=2)
NAME, NAMESPACE, ORIGIN = st.sampled_from(NAMES), st.sampled_from(NAMESPACES), st.sampled_from(ORIGINS)
VERSION = st.sampled_from(["", "1", "2"])


@st.composite
def objects(draw, kind: str | None = None) -> Object:
    kind = kind or draw(st.sampled_from(KINDS))
    name, namespace, version = draw(NAME), draw(NAMESPACE), draw(VERSION)
    if kind == "Node":
        return node(name, draw(st.sampled_from(["10.244.0.0/24", "10.244.1.0/24"])), version)
    if kind == "ServiceCIDR":
        return service_cidr(name, draw(st.sampled_from(["10.96.0.0/16", "10.97.0.0/16"])), version)
    if kind == "Namespace":
        return namespace_of(name, version, **draw(LABELS))
    if kind == "ClusterNetworkPolicy":
        return cluster_policy(name, draw(st.sampled_from([1, 2])), version)
    if kind == "NetworkPolicy":
        return policy(name, namespace, version, **draw(LABELS))
    if kind == "EndpointSlice":
        of = draw(st.sampled_from([None, *NAMES]))
        return piece(name, of, draw(st.sampled_from(["10.0.0.1", "10.0.0.2"])), namespace=namespace, version=version)
    labels = draw(LABELS)
    if kind == "Service":
        return service(name, namespace, draw(st.sampled_from(["10.96.0.1", "10.96.0.2"])), version, **labels)
    return pod(name, namespace, draw(st.sampled_from(["10.0.0.1", "10.0.0.2"])), version, **labels)


def without_version(obj: Object) -> Object:
    return replace(obj, metadata=replace(obj.metadata, resource_version=""))


class Rows(RuleBasedStateMachine):
    """The model keeps, for each object, a list of (origin, object) in the order they came: the first one is the row.

    What the plan reads of a Service (itself, its slices, the pods it selects) is computed from scratch after each
    step; a Service where that differs from before must be among the changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.said: dict[tuple[str, ObjectKey], dict[str, Object]] = {}
        self.before: dict[ObjectKey, object] = {}
        self.rows_before: dict[tuple[str, ObjectKey], Object] = {}

    def say(self, obj: Object, origin: str) -> None:
        self.said.setdefault((kind_of(obj), obj.key), {})[origin] = obj

    def unsay(self, kind: str, at: ObjectKey, origin: str) -> None:
        known = self.said.get((kind, at), {})
        known.pop(origin, None)
        if not known:
            self.said.pop((kind, at), None)

    @rule(obj=objects(), origin=ORIGIN)
    def upsert(self, obj: Object, origin: str) -> None:
        self.store.upsert(obj, origin)
        self.say(obj, origin)

    @rule(kind=st.sampled_from(KINDS), name=NAME, namespace=NAMESPACE, origin=ORIGIN)
    def delete(self, kind: str, name: str, namespace: str, origin: str) -> None:
        at = ObjectKey("" if kind in CLUSTER_SCOPED else namespace, name)
        self.store.delete(kind, at, origin)
        self.unsay(kind, at, origin)

    @rule(data=st.data(), kind=st.sampled_from(KINDS), origin=ORIGIN)
    def replace(self, data: st.DataObject, kind: str, origin: str) -> None:
        fresh = data.draw(st.lists(objects(kind), max_size=4, unique_by=lambda obj: obj.key))
        self.store.replace(kind, fresh, origin)
        for obj in fresh:
            self.say(obj, origin)
        for other, at in list(self.said):
            if other == kind and at not in {obj.key for obj in fresh}:
                self.unsay(kind, at, origin)

    # what must hold

    def rows(self, kind: str) -> dict[ObjectKey, Object]:
        return {at: next(iter(known.values())) for (k, at), known in self.said.items() if k == kind}

    def seen_by_plan(self) -> dict[ObjectKey, object]:
        """Service → everything that its plan may read, without resource versions."""
        slices, pods = self.rows("EndpointSlice"), self.rows("Pod")
        serving = {at for at in pods if next(iter(self.said["Pod", at])) != API}
        found: dict[ObjectKey, object] = {}
        for at, one in self.rows("Service").items():
            selector = one.spec.selector or {}
            found[at] = (
                without_version(one),
                {k: without_version(s) for k, s in slices.items() if s.service_key == at},
                {
                    k: without_version(p)
                    for k, p in pods.items()
                    if selector
                    and k in serving
                    and k.namespace == at.namespace
                    and selector.items() <= (p.metadata.labels or {}).items()
                },
            )
        return found

    @invariant()
    def changes_are_all_there_are_and_no_more(self) -> None:
        changes = self.store.take_changes()
        now = self.seen_by_plan()
        different = {at for at in now.keys() | self.before.keys() if now.get(at) != self.before.get(at)}
        rows = {(kind, at): without_version(o) for kind in KINDS for at, o in self.rows(kind).items()}
        moved = {at for at in rows.keys() | self.rows_before.keys() if rows.get(at) != self.rows_before.get(at)}
        assert changes.services >= different, f"not marked: {different - changes.services}"
        assert changes.pods == {at for kind, at in moved if kind == "Pod"}
        assert changes.nodes == {at for kind, at in moved if kind == "Node"}
        assert changes.service_cidrs == {at for kind, at in moved if kind == "ServiceCIDR"}
        assert changes.namespaces == {at for kind, at in moved if kind == "Namespace"}
        assert changes.policies == {at for kind, at in moved if kind == "NetworkPolicy"}
        assert changes.cluster_policies == {at for kind, at in moved if kind == "ClusterNetworkPolicy"}
        # a slice may come before its Service: then the name is marked, although there is nothing to plan yet
        unknown = changes.services - different
        named = {
            piece_.service_key
            for (kind, at) in moved
            if kind == "EndpointSlice"
            for piece_ in (rows.get((kind, at)), self.rows_before.get((kind, at)))
            if isinstance(piece_, EndpointSlice)
        }
        assert unknown <= named, f"marked without a reason: {unknown - named}"
        self.before, self.rows_before = now, rows

    @invariant()
    def rows_and_indices_are_as_computed_from_scratch(self) -> None:
        store = self.store
        for kind in KINDS:
            kept = store.rows(kind)
            wanted = self.rows(kind)
            assert {k: without_version(o) for k, o in kept.items()} == {
                k: without_version(o) for k, o in wanted.items()
            }
            assert {k: store.owner(kind, k) for k in kept} == {
                at: next(iter(known)) for (k, at), known in self.said.items() if k == kind
            }
        slices_of: dict[ObjectKey, dict[ObjectKey, EndpointSlice]] = {}
        for at, one in store.slices.items():
            if one.service_key is not None:
                slices_of.setdefault(one.service_key, {})[at] = one
        assert store.slices_of == slices_of
        for namespace in NAMESPACES:
            here = {p.key: p for p in store.pods_in(namespace)}
            assert here == {at: p for at, p in store.pods.items() if at.namespace == namespace}
            serving = {p.key: p for p in store.serving_pods_in(namespace)}
            assert serving == {at: p for at, p in here.items() if store.owner("Pod", at) != API}
            policies = {p.key: p for p in store.policies_in(namespace)}
            assert policies == {at: p for at, p in store.policies.items() if at.namespace == namespace}


Rows.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, report_multiple_bugs=False)
TestRows = Rows.TestCase
