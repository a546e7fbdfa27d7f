"""Policies and namespaces in manifests: taken and refused as an apiserver does, each mistake with its line."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from policy_cases import (
    BAD_CLUSTER_NETWORK_POLICIES,
    BAD_NETWORK_POLICIES,
    CLUSTER_NETWORK_POLICIES,
    NETWORK_POLICIES,
    Refused,
    Spec,
    cluster,
    egress,
    ingress,
)

from waggle.model.meta import ObjectKey
from waggle.model.objects import KINDS
from waggle.model.policy_objects import ClusterNetworkPolicy, ClusterNetworkPolicySpec, NetworkPolicy
from waggle.model.policy_schema import custom_resource_definition
from waggle.sources.yaml_objects import Identity, Manifest, parse_manifest

NETWORK_POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: web
  namespace: shop
spec:
  podSelector:
    matchLabels: {app: web}
  ingress:
  - from:
    - ipBlock:
        cidr: 10.0.0.0/8
        except: [10.1.0.0/16]
    ports:
    - port: 80
"""


def parse(text: str) -> Manifest:
    return parse_manifest(text.encode(), "f.yaml")


def of(kind: str, spec: Spec) -> Manifest:
    document = {"apiVersion": KINDS[kind][0], "kind": kind, "metadata": {"name": "x"}, "spec": spec}
    return parse(json.dumps(document))


def only(manifest: Manifest) -> Any:
    [placed] = manifest.objects.values()
    return placed.obj


GOOD = [("NetworkPolicy", name) for name in NETWORK_POLICIES] + [
    ("ClusterNetworkPolicy", name) for name in CLUSTER_NETWORK_POLICIES
]
BAD = [("NetworkPolicy", name) for name in BAD_NETWORK_POLICIES] + [
    ("ClusterNetworkPolicy", name) for name in BAD_CLUSTER_NETWORK_POLICIES
]


@pytest.mark.parametrize(("kind", "name"), GOOD)
def test_what_an_apiserver_takes_is_taken_and_said_again_it_is_the_same(kind: str, name: str) -> None:
    specs = NETWORK_POLICIES if kind == "NetworkPolicy" else CLUSTER_NETWORK_POLICIES
    manifest = of(kind, specs[name])
    assert [str(error) for error in manifest.errors] == [] and manifest.notes == []
    obj = only(manifest)
    assert only(of(kind, msgspec.to_builtins(obj)["spec"])) == obj


@pytest.mark.parametrize(("kind", "name"), BAD)
def test_what_an_apiserver_refuses_is_refused_with_the_value_at_fault(kind: str, name: str) -> None:
    cases: dict[str, Refused] = BAD_NETWORK_POLICIES if kind == "NetworkPolicy" else BAD_CLUSTER_NETWORK_POLICIES
    case = cases[name]
    manifest = of(kind, case.spec)
    assert manifest.objects == {}
    assert manifest.errors, "nothing was refused"
    error = manifest.errors[0]
    path, _, reason = error.reason.partition(": ")
    assert path.endswith(case.path) and case.reason in reason, str(error)
    assert error.subject == (f"{kind} default/x" if KINDS[kind][2] else f"{kind} x")


def test_a_mistake_has_its_line_and_the_last_good_version_can_be_kept() -> None:
    text = NETWORK_POLICY.replace("10.1.0.0/16", "11.1.0.0/16").replace("port: 80", "port: 80\n      endPort: 70")
    [refusal] = parse(text).refusals
    assert [(e.file, e.line) for e in refusal.errors] == [("f.yaml", 16), ("f.yaml", 13)]
    assert refusal.identity == Identity("NetworkPolicy", ObjectKey("shop", "web"))


@pytest.mark.parametrize(
    ("right", "wrong", "line", "hint"),
    [
        (
            "podSelector",
            "podSelectr",
            7,
            "spec.podSelectr: there is no such field; there is podSelector, policyTypes, ",
        ),
        ("ports", "port", 14, "spec.ingress[0].port: there is no such field; there is from, ports"),
        (
            "except",
            "exempt",
            13,
            "spec.ingress[0].from[0].ipBlock.exempt: there is no such field; there is cidr, except",
        ),
        ("spec", "specification", 6, "specification: there is no such field; there is spec"),
        ("from", "peers", 10, "spec.ingress[0].peers: there is no such field; there is from, ports"),
    ],
)
def test_a_misspelt_field_of_a_policy_is_refused(right: str, wrong: str, line: int, hint: str) -> None:
    [error] = parse(NETWORK_POLICY.replace(f"{right}:", f"{wrong}:")).errors
    assert error.line == line and hint in error.reason


def test_fields_that_an_apiserver_fills_in_and_labels_of_any_name_are_no_mistake() -> None:
    text = (
        NETWORK_POLICY.replace("  name: web\n", "  name: web\n  generation: 1\n  managedFields: []\n") + "status: {}\n"
    )
    assert parse(text.replace("app: web", "any.example/name: web")).errors == []
    assert (
        parse("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nspec: {finalizers: [kubernetes]}\n").errors == []
    )


@pytest.mark.parametrize(
    ("spec", "types"),
    [
        ({"podSelector": {}}, ["Ingress"]),
        ({"podSelector": {}, "egress": [{}]}, ["Ingress", "Egress"]),
        ({"podSelector": {}, "egress": []}, ["Ingress"]),  # so do apiservers: absent and empty are the same to them
        ({"podSelector": {}, "policyTypes": []}, ["Ingress"]),
        ({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]}, ["Egress"]),
    ],
)
def test_directions_that_are_not_listed_are_those_of_an_apiserver(spec: Spec, types: list[str]) -> None:
    assert only(of("NetworkPolicy", spec)).spec.policy_types == types


def test_nothing_and_everything_stay_apart() -> None:
    rule = only(of("NetworkPolicy", ingress())).spec.ingress[0]
    assert (rule.from_, rule.ports) == (None, None)
    assert only(of("NetworkPolicy", {"podSelector": {}})).spec.ingress is None
    assert only(of("NetworkPolicy", {"podSelector": {}, "ingress": []})).spec.ingress == []
    assert only(of("NetworkPolicy", {"podSelector": {}, "ingress": [{"from": [], "ports": []}]})).spec.ingress[0] == (
        type(rule)(from_=[], ports=[])
    )
    nulls = {"podSelector": None, "ingress": [{"from": None, "ports": None}], "egress": None}
    assert only(of("NetworkPolicy", nulls)).spec.ingress == [rule]


def test_where_policies_and_namespaces_live() -> None:
    manifest = parse(
        NETWORK_POLICY.replace("  namespace: shop\n", "")
        + "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: team-a, namespace: shop, labels: {tier: front}}\n"
        + "---\n"
        + json.dumps(
            {
                "apiVersion": KINDS["ClusterNetworkPolicy"][0],
                "kind": "ClusterNetworkPolicy",
                "metadata": {"name": "all.of-us", "namespace": "shop"},
                "spec": cluster(),
            }
        )
    )
    assert manifest.errors == []
    assert list(manifest.objects) == [
        Identity("NetworkPolicy", ObjectKey("default", "web")),
        Identity("Namespace", ObjectKey("", "team-a")),
        Identity("ClusterNetworkPolicy", ObjectKey("", "all.of-us")),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (NETWORK_POLICY.replace("name: web", "name: Web"), "'Web' is not a name"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a.b}\n", "'a.b' is not a name of at most 63"),
        (NETWORK_POLICY.replace("networking.k8s.io/v1", "extensions/v1beta1"), "use networking.k8s.io/v1"),
        (NETWORK_POLICY.replace("port: 80", "port: [80]"), "whole number or a string was expected, not a list"),
    ],
)
def test_names_versions_and_types(text: str, reason: str) -> None:
    [error] = parse(text).errors
    assert reason in error.reason


@pytest.mark.parametrize("missing", ["tier", "priority", "subject"])
def test_a_cluster_policy_without_what_it_needs(missing: str) -> None:
    [error] = of("ClusterNetworkPolicy", {k: v for k, v in cluster().items() if k != missing}).errors
    assert error.reason == f"spec.{missing} is missing"


def test_which_pods_of_some_namespaces_has_to_be_said() -> None:
    subject = {"pods": {"namespaceSelector": {"matchLabels": {"tier": "front"}}}}
    [error] = of("ClusterNetworkPolicy", cluster(subject=subject)).errors
    assert error.reason == "spec.subject.pods.podSelector is missing"


# -- the CRD ----------------------------------------------------------------------------------------------------------


def test_the_schema_has_the_fields_of_the_structs_and_ingress_peers_those_of_ingress() -> None:
    version, *_ = custom_resource_definition()["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert set(spec["required"]) == {"tier", "priority", "subject"}
    assert set(spec["properties"]) == {f.encode_name for f in msgspec.structs.fields(ClusterNetworkPolicySpec)}
    rule = {way: spec["properties"][way]["items"] for way in ("ingress", "egress")}
    peers = {way: rule[way]["properties"][where]["items"] for way, where in (("ingress", "from"), ("egress", "to"))}
    assert set(peers["ingress"]["properties"]) == {"namespaces", "pods"}
    assert set(peers["egress"]["properties"]) == {"namespaces", "pods", "nodes", "networks", "domainNames"}
    assert set(rule["ingress"]["required"]) == {"action", "from"} and set(rule["egress"]["required"]) == {
        "action",
        "to",
    }


def test_every_value_of_the_schema_says_what_it_means() -> None:
    def look(schema: dict[str, Any], path: str) -> None:
        for name, inner in schema.get("properties", {}).items():
            assert inner["description"], f"{path}.{name}"
            look(inner, f"{path}.{name}")
        if "items" in schema:
            look(schema["items"], f"{path}[]")

    version, *_ = custom_resource_definition()["spec"]["versions"]
    look(version["schema"]["openAPIV3Schema"]["properties"]["spec"], "spec")


def test_only_the_two_kinds_are_policies() -> None:
    assert isinstance(only(of("NetworkPolicy", ingress())), NetworkPolicy)
    assert isinstance(only(of("ClusterNetworkPolicy", egress({"namespaces": {}}))), ClusterNetworkPolicy)
