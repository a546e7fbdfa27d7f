"""Manifest text → typed objects: what is taken, what is refused, and in which line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from waggle.model.objects import KINDS, EndpointSlice, Node, ObjectKey, Pod, Service
from waggle.sources.admission import completed, violations
from waggle.sources.yaml_objects import MAX_FILE_SIZE, Identity, Manifest, parse_manifest

SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  clusterIP: 10.96.0.10
  ports:
  - port: 80
"""
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-a
  labels:
    kubernetes.io/service-name: web
addressType: IPv4
endpoints:
- addresses: [10.244.1.5]
ports:
- port: 8080
"""
POD = """\
apiVersion: v1
kind: Pod
metadata:
  name: p
spec:
  containers:
  - name: c
    ports:
    - containerPort: 80
status:
  podIPs:
  - ip: 10.244.1.5
"""
NODE = """\
apiVersion: v1
kind: Node
metadata:
  name: node1
spec:
  podCIDRs: [10.244.1.0/24, "fd00:10:244:1::/64"]
status:
  addresses:
  - type: InternalIP
    address: 10.77.0.11
"""


SERVICE_CIDR = """\
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata:
  name: kubernetes
spec:
  cidrs:
  - 10.96.0.0/16
  - "fd00:10:96::/112"
"""


def parse(text: str) -> Manifest:
    return parse_manifest(text.encode(), "f.yaml")


def test_a_service_range():
    found = the_object(SERVICE_CIDR)
    assert found.spec.cidrs == ["10.96.0.0/16", "fd00:10:96::/112"]
    assert (found.key.namespace, found.key.name) == ("", "kubernetes")


def the_object(text: str):
    manifest = parse(text)
    assert manifest.errors == []
    (placed,) = manifest.objects.values()
    return placed.obj


def errors(text: str) -> list[tuple[int | None, str]]:
    return [(error.line, error.reason) for error in parse(text).errors]


def test_every_kind_is_read_with_its_namespace():
    manifest = parse("---\n".join([SERVICE, SLICE, POD, NODE]))
    assert manifest.errors == []
    assert {type(placed.obj) for placed in manifest.objects.values()} == {Service, EndpointSlice, Pod, Node}
    assert list(manifest.objects) == [
        Identity("Service", ObjectKey("default", "web")),
        Identity("EndpointSlice", ObjectKey("default", "web-a")),
        Identity("Pod", ObjectKey("default", "p")),
        Identity("Node", ObjectKey("", "node1")),
    ]
    assert [placed.line for placed in manifest.objects.values()] == [1, 10, 22, 35]


def test_namespace_of_a_cluster_scoped_kind_is_dropped():
    node = the_object(NODE.replace("name: node1", "name: node1\n  namespace: kube-system"))
    assert node.key == ObjectKey("", "node1")


def test_defaults_are_those_of_an_apiserver():
    service = the_object(SERVICE)
    assert service.spec.cluster_ips == ["10.96.0.10"]
    assert (service.spec.ports[0].target_port, service.spec.ports[0].protocol) == (80, "TCP")
    only_list = the_object(SERVICE.replace("clusterIP: 10.96.0.10", 'clusterIPs: [10.96.0.10, "fd00::1"]'))
    assert only_list.spec.cluster_ip == "10.96.0.10"
    piece = the_object(SLICE)
    assert (piece.ports[0].name, piece.ports[0].protocol) == ("", "TCP")


def test_a_copied_resource_version_does_not_hide_edits():
    """`kubectl get -o yaml > file` leaves one in; the store takes an equal version for an equal object."""
    for namespace in ("", "\n  namespace: default"):
        text = SERVICE.replace("name: web", 'name: web\n  resourceVersion: "77"' + namespace)
        assert the_object(text).metadata.resource_version == ""


def test_null_means_not_given():
    service = the_object(
        SERVICE.replace("name: web", "name: web\n  creationTimestamp: null\n  labels:").replace(
            "spec:", "spec:\n  selector:\n  type: ~\n  externalIPs: null"
        )
    )
    assert service.spec.selector is None
    assert service.spec.type == "ClusterIP"
    assert service.metadata.labels is None


@pytest.mark.parametrize(
    ("old", "new", "line", "part"),
    [
        # decoding
        ("port: 80", "port: eighty", 8, "spec.ports[0].port: a whole number was expected, not a string"),
        ("port: 80", 'port: "80"', 8, "a whole number was expected, not a string"),
        ("port: 80", "name: x", 8, "spec.ports[0].port is missing"),
        ("  - port: 80", "    port: 80", 7, "spec.ports: a list was expected, not a mapping"),
        (
            "name: web",
            "name: 12",
            4,
            'metadata.name: a string was expected, not the number 12; write it in quotes: "12"',
        ),
        ("name: web", "name: on", 4, 'not the boolean on; write it in quotes: "on"'),
        ("name: web", "name: web\n  namespace: 5", 5, "metadata.namespace: a string was expected, not the number 5"),
        ("name: web", "labels: {a: b}", 3, "metadata.name is missing"),
        ("name: web", "generateName: web-", 4, "generateName needs an apiserver"),
        ("name: web", "name: web\n  labels:\n    a: b\n    ver: 1.10", 7, "the number 1.10; write it in quotes"),
        (
            "spec:",
            "spec:\n  selector:\n    app: yes",
            7,
            "spec.selector.app: a string was expected, not the boolean yes",
        ),
        ("spec:", "spec:\n  selector:\n    app:", 7, "spec.selector.app: a string was expected, not null"),
        # names
        ("name: web", "name: Web", 4, "metadata.name: 'Web' is not a name"),
        ("name: web", r'name: "web\n"', 4, r"'web\n' is not a name"),
        ("name: web", "name: " + "a" * 64, 4, "at most 63"),
        ("name: web", "name: web.x", 4, "is not a name"),  # a Service name is a label, not a subdomain
        ("name: web", "name: web\n  namespace: a/b", 5, "metadata.namespace: 'a/b'"),
        ("name: web", "name: web\n  labels:\n    'a b': c", 6, "not a label key"),
        ("name: web", "name: web\n  labels:\n    a: -c", 6, "not a label value"),
        # ports
        ("port: 80", "port: 0", 8, "between 1 and 65535, not 0"),
        ("port: 80", "port: 65536", 8, "between 1 and 65535, not 65536"),
        ("port: 80", "port: 80\n    targetPort: 70000", 9, "spec.ports[0].targetPort: must lie between"),
        ("port: 80", "port: 80\n    targetPort: HTTP", 9, "'HTTP' is not a port name"),
        ("port: 80", "port: 80\n    protocol: tcp", 9, "must be TCP, UDP or SCTP, in capital letters, not 'tcp'"),
        ("port: 80", "port: 80\n    nodePort: 30000", 9, "a Service of type ClusterIP has no node ports"),
        ("port: 80", "port: 80\n  - port: 81\n    name: b", 8, "every port needs a name"),
        ("port: 80", "port: 80\n    name: a\n  - port: 81\n    name: a", 11, "'a' is used by another port"),
        ("port: 80", "port: 80\n    name: a\n  - port: 80\n    name: b", 10, "80/TCP is another port"),
        ("  ports:\n  - port: 80", "  sessionAffinity: None", 5, "needs at least one port"),
        ("ports:", "healthCheckNodePort: 30000\n  ports:", 7, "only a Service of type LoadBalancer with"),
        (
            "ports:",
            "type: LoadBalancer\n  externalTrafficPolicy: Local\n  healthCheckNodePort: 65536\n  ports:",
            9,
            "spec.healthCheckNodePort: must lie between 1 and 65535",
        ),
        # addresses
        ("10.96.0.10", "10.96.0.300", 6, "'10.96.0.300' is not an IP address"),
        ("10.96.0.10", "10.96.0.010", 6, "is not an IP address"),
        ("10.96.0.10", "10.96.0.10/24", 6, "is not an IP address"),
        ("10.96.0.10", "127.0.0.1", 6, "is a loopback address"),
        ("10.96.0.10", "0.0.0.0", 6, "is the unspecified address"),
        ("10.96.0.10", "169.254.1.1", 6, "is a link-local address"),
        ("10.96.0.10", "255.255.255.255", 6, "multicast or reserved"),
        ("10.96.0.10", '"fe80::1"', 6, "is a link-local address"),
        ("10.96.0.10", '"ff02::1"', 6, "is a multicast address"),
        ("10.96.0.10", '"::ffff:10.0.0.1"', 6, "an IPv4 address in IPv6 notation"),
        ("ports:", 'clusterIPs: ["fd00::1"]\n  ports:', 7, "spec.clusterIPs[0]: must equal clusterIP"),
        ("ports:", "clusterIPs:\n  - 10.96.0.10\n  - 10.96.0.11\n  ports:", 9, "two cluster IPs of one family (IPv4)"),
        ("ports:", "ipFamilies: [IPv6]\n  ports:", 6, "not of family IPv6"),
        ("ports:", "ipFamilies: [IPv5]\n  ports:", 7, "must be IPv4 or IPv6, not 'IPv5'"),
        ("ports:", "ipFamilies: [IPv4, IPv4]\n  ports:", 7, "the same family is given twice"),
        ("ports:", "externalIPs:\n  - x\n  ports:", 8, "'x' is not an IP address"),
        # enumerations
        ("ports:", "type: Clusterip\n  ports:", 7, "spec.type: must be one of ClusterIP, NodePort"),
        ("ports:", "externalTrafficPolicy: local\n  ports:", 7, "must be one of Cluster, Local, not 'local'"),
        ("ports:", "internalTrafficPolicy: local\n  ports:", 7, "must be one of Cluster, Local"),
        ("ports:", "sessionAffinity: clientip\n  ports:", 7, "must be one of None, ClientIP"),
        ("ports:", "type: ExternalName\n  ports:", 6, "an ExternalName Service has no cluster IP"),
    ],
)
def test_refused_services(old, new, line, part):
    assert old in SERVICE
    found = errors(SERVICE.replace(old, new, 1))
    assert found, "it was taken"
    assert any(part in reason and at == line for at, reason in found), found


@pytest.mark.parametrize(
    ("old", "new", "line", "part"),
    [
        ("[10.244.1.5]", '["fd00::5"]', 9, "endpoints[0].addresses[0]: fd00::5 is not of addressType IPv4"),
        ("[10.244.1.5]", "[127.0.0.1]", 9, "is a loopback address"),
        ("[10.244.1.5]", "[]", 9, "must hold between 1 and 100 addresses, not 0"),
        ("addressType: IPv4\n", "", 1, "addressType is missing"),
        ("addressType: IPv4", "addressType: ipv4", 7, "must be IPv4, IPv6 or FQDN"),
        ("discovery.k8s.io/v1", "discovery.k8s.io/v1beta1", 1, "use discovery.k8s.io/v1"),
        ("discovery.k8s.io/v1", "v1", 1, "apiVersion 'v1' has no EndpointSlice"),
        ("- port: 8080", "- port: 0", 11, "between 1 and 65535"),
        ("- port: 8080", "- port: 8080\n- port: 8081", 12, "used by another port"),
        ("- port: 8080", "- port: 8080\n  protocol: ICMP", 12, "must be TCP, UDP or SCTP, not 'ICMP'"),
        ("[10.244.1.5]", "[10.244.1.5]\n  nodeName: 'a b'", 10, "endpoints[0].nodeName"),
        ("[10.244.1.5]", "[10.244.1.5]\n  conditions: {ready: 'true'}", 10, "true or false was expected, not a string"),
    ],
)
def test_refused_slices(old, new, line, part):
    assert old in SLICE
    found = errors(SLICE.replace(old, new, 1))
    assert any(part in reason and at == line for at, reason in found), found


def test_a_slice_holds_at_most_a_thousand_endpoints():
    def with_endpoints(count: int) -> str:
        lines = "".join(f"- addresses: [10.1.{n // 250}.{n % 250 + 1}]\n" for n in range(count))
        return SLICE.replace("- addresses: [10.244.1.5]\n", lines)

    assert errors(with_endpoints(1000)) == []
    assert errors(with_endpoints(1001)) == [(8, "endpoints: holds 1001 endpoints; 1000 are allowed in one slice")]


@pytest.mark.parametrize(
    ("text", "old", "new", "line", "part"),
    [
        (POD, "containerPort: 80", "containerPort: 80\n      name: UPPER", 10, "not a port name"),
        (POD, "containerPort: 80", "containerPort: 99999", 9, "between 1 and 65535"),
        (POD, "- name: c", "- name: c_c", 7, "spec.containers[0].name"),
        (POD, "- ip: 10.244.1.5", "- ip: here", 12, "'here' is not an IP address"),
        (POD, "podIPs:", "conditions: [{type: Ready, status: True}]\n  podIPs:", 11, 'write it in quotes: "True"'),
        (NODE, "10.244.1.0/24", "10.244.1.7/24", 6, "bits set beyond its prefix; the range is 10.244.1.0/24"),
        (NODE, '"fd00:10:244:1::/64"', "10.244.1.64/26", 6, "overlaps with 10.244.1.0/24"),
        (SERVICE_CIDR, "10.96.0.0/16", "10.96.0.1/16", 7, "bits set beyond its prefix; the range is 10.96.0.0/16"),
        (SERVICE_CIDR, '"fd00:10:96::/112"', "10.97.0.0/16", 8, "two ranges of one family"),
        (
            SERVICE_CIDR,
            "10.96.0.0/16\n",
            "10.96.0.0/16\n  - fd01::/64\n",
            6,
            "must hold one range or one of each family",
        ),
        (NODE, "10.244.1.0/24", "10.244.1.0/33", 6, "is not an address range"),
        (NODE, "10.77.0.11", "node.example", 10, "is not an IP address"),
    ],
)
def test_refused_pods_and_nodes(text, old, new, line, part):
    assert old in text
    found = errors(text.replace(old, new, 1))
    assert any(part in reason and at == line for at, reason in found), found


@pytest.mark.parametrize(
    "text",
    [
        SERVICE.replace("10.96.0.10", "None"),
        SERVICE.replace("10.96.0.10", "None").replace("  ports:\n  - port: 80\n", ""),
        SERVICE.replace("10.96.0.10", '""'),
        SERVICE.replace("port: 80", "port: 80\n    targetPort: http-alt\n    protocol: SCTP"),
        SERVICE.replace("port: 80", "port: 53\n    name: t\n  - port: 53\n    name: u\n    protocol: UDP"),
        SERVICE.replace("clusterIP: 10.96.0.10", 'clusterIP: "fd00::A"\n  clusterIPs: ["fd00::A", 10.96.0.10]'),
        SERVICE.replace("name: web", "name: 1-web"),
        SLICE.replace("- port: 8080", "- name: a"),  # a port without a number stands for all; the proxy ignores it
        SLICE.replace("IPv4", "FQDN").replace("10.244.1.5", "db.example.com"),
        SLICE.replace("name: web-a", "name: web.a-1"),
        POD.replace("podIPs:\n  - ip: 10.244.1.5", "phase: Pending"),
    ],
)
def test_taken(text):
    assert errors(text) == []
    assert len(parse(text).objects) == 1


def test_one_bad_document_takes_no_other_with_it():
    text = "---\n".join(
        [
            SERVICE,
            SERVICE.replace("name: web", "name: bad-port").replace("port: 80", "port: 99999"),
            "kind: Service\n metadata: broken\n  x\n",
            "just text\n",
            "apiVersion: v1\nmetadata: {name: x}\n",
            "kind: Service\nmetadata: {name: x}\n",
            SLICE,
        ]
    )
    manifest = parse(text)
    assert [str(identity) for identity in manifest.objects] == ["Service default/web", "EndpointSlice default/web-a"]
    assert [(error.line, error.subject) for error in manifest.errors] == [
        (17, "Service default/bad-port"),
        (20, ""),
        (23, ""),
        (25, "x"),
        (28, "Service x"),
    ]
    known = [refusal.identity for refusal in manifest.refusals]
    assert known[0] == Identity("Service", ObjectKey("default", "bad-port"))
    assert known[1:] == [None] * 4
    assert str(manifest.errors[0]).startswith("f.yaml:17: Service default/bad-port: spec.ports[0].port: must lie")


def test_a_document_that_does_not_parse_still_says_what_it_probably_is():
    (error,) = parse(SERVICE + "  selector: [\n").errors
    assert error.subject == "Service web"


def test_all_reasons_of_one_object_are_given_but_not_without_end():
    ports = "".join(f"  - port: {70000 + n}\n    name: p{n}\n" for n in range(50))
    found = errors(SERVICE.replace("  - port: 80\n", ports))
    assert len(found) == 10
    assert [line for line, _ in found[:2]] == [8, 10]


def test_lists_expand_and_their_items_are_independent():
    text = """\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: a}
  spec: {clusterIP: None}
- apiVersion: v1
  kind: Service
  metadata: {name: b}
  spec:
    ports:
    - port: -1
- 7
- apiVersion: apps/v1
  kind: Deployment
  metadata: {name: d}
- apiVersion: v1
  kind: List
  items:
  - {apiVersion: v1, kind: Service, metadata: {name: c}, spec: {clusterIP: None}}
"""
    manifest = parse(text)
    assert [(identity.key.name, placed.line) for identity, placed in manifest.objects.items()] == [("a", 4), ("c", 21)]
    assert [error.line for error in manifest.errors] == [13, 14]
    assert [(note.line, note.subject) for note in manifest.notes] == [(15, "Deployment d")]


def test_typed_lists_lend_their_kind_to_items():
    items = [{"metadata": {"name": name}, "addressType": "IPv4"} for name in ("a", "b")]
    text = json.dumps({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "items": items})
    assert [identity.key.name for identity in parse(text).objects] == ["a", "b"]


def test_lists_without_items_and_lists_without_end():
    assert parse("apiVersion: v1\nkind: List\n").objects == {}
    assert "must be a list" in errors("apiVersion: v1\nkind: List\nitems: {a: b}\n")[0][1]
    nested = '{"apiVersion": "v1", "kind": "List", "items": [' * 20 + "]}" * 20
    assert "Lists within Lists" in errors(nested)[0][1]


@pytest.mark.parametrize(
    "text",
    [
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {on: yes}\n",
        "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: k}\n",
    ],
)
def test_other_kinds_are_passed_over_with_a_note(text):
    manifest = parse(text)
    assert manifest.errors == []
    assert manifest.objects == {}
    (note,) = manifest.notes
    assert "passed over" in note.reason
    assert (note.file, note.line) == ("f.yaml", 1)


def test_a_service_of_a_wrong_builtin_version_is_no_other_kind():
    assert "apiVersion 'apps/v1' has no Service; use v1" in errors(SERVICE.replace("v1", "apps/v1"))[0][1]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            SERVICE.replace("clusterIP: 10.96.0.10", "type: ClusterIP"),
            "it gets one from service-cidr; where that is not set, it is not",
        ),
        (
            SERVICE.replace("clusterIP: 10.96.0.10", "type: NodePort").replace(
                "port: 80", "port: 80\n    nodePort: 30000"
            ),
            "only its node ports are served",
        ),
        (SERVICE.replace("spec:", "spec:\n  type: NodePort"), "spec.ports[0]: has no nodePort"),
        (
            SERVICE.replace("spec:", "spec:\n  type: LoadBalancer\n  externalTrafficPolicy: Local"),
            "has no healthCheckNodePort",
        ),
        (SLICE.replace("kubernetes.io/service-name: web", "app: web"), "belongs to no Service"),
        (SLICE.replace("IPv4", "FQDN").replace("10.244.1.5", "db.example"), "names are not served"),
    ],
)
def test_what_will_not_do_what_was_meant_is_noted(text, part):
    manifest = parse(text)
    assert manifest.errors == []
    assert any(part in note.reason for note in manifest.notes), manifest.notes


def test_the_same_object_twice_in_a_file():
    manifest = parse(SERVICE + "---\n" + SERVICE.replace("10.96.0.10", "10.96.0.11"))
    assert [error.reason for error in manifest.errors] == ["given twice in this file; the one in line 1 is used"]
    assert manifest.errors[0].line == 10
    (placed,) = manifest.objects.values()
    assert placed.obj.spec.cluster_ip == "10.96.0.10"


def test_files_beyond_the_limit_are_refused():
    manifest = parse_manifest(b"#" * (MAX_FILE_SIZE + 1), "big.yaml")
    assert manifest.has_unknown
    assert "8,388,608 is the limit" in manifest.errors[0].reason


def test_a_long_list_is_read_without_looking_for_lines_that_nobody_asked_for():
    item = {"apiVersion": "v1", "kind": "Service", "spec": {"clusterIP": "None"}}
    items = [item | {"metadata": {"name": f"s{n}", "annotations": {"a": "x" * 400}}} for n in range(1000)]
    items.append({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bad"}, "spec": {"type": "x"}})
    manifest = parse(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1))
    assert len(manifest.objects) == 1000
    assert {placed.line for placed in manifest.objects.values()} == {None}
    assert manifest.errors[0].line is not None  # a mistake always has one
    assert manifest.errors[0].line > 7000


def test_names_that_cannot_be_printed_do_not_get_into_the_log_as_they_are():
    manifest = parse(SERVICE.replace("name: web", r'name: "a\nb\e[31m"'))
    assert "\n" not in str(manifest.errors[0])
    assert "\x1b" not in str(manifest.errors[0])


def test_an_object_of_the_api_passes_unchanged():
    """What an apiserver has stored must not be refused or altered here, apart from the version."""
    service = Service(metadata=the_object(SERVICE).metadata, spec=the_object(SERVICE).spec)
    assert list(violations(service)) == []
    assert completed(service) == service


def test_the_examples_are_right():
    folder = Path(__file__).parents[2] / "examples"
    examples = sorted((*folder.glob("*.yaml"), *folder.glob("*/*.yaml")))
    assert examples
    seen: set[Identity] = set()
    for path in examples:
        manifest = parse_manifest(path.read_bytes(), str(path))
        assert manifest.errors == []
        assert manifest.notes == []
        assert not seen & manifest.objects.keys(), "an object in two files"
        seen |= manifest.objects.keys()
    assert {identity.kind for identity in seen} == set(KINDS) - {"ServiceCIDR"}


def test_a_node_may_have_several_ranges_of_one_family():
    assert errors(NODE.replace('"fd00:10:244:1::/64"', "10.244.2.0/24", 1)) == []
