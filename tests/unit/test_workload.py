"""Containers as Pods: names, namespaces, labels, readiness, and the Services that select them."""

from __future__ import annotations

from waggle.model.endpoints import pod_endpoints
from waggle.model.objects import ObjectMeta, Service, ServicePort, ServiceSpec
from waggle.model.service import Family
from waggle.model.workload import Attached, Workload, pod_rows, unresolved_ports

ID = "0123456789abcdef" * 4


def attached(container_id: str = ID, **more) -> Attached:
    return Attached(container_id, ("10.0.0.2", "fd00::2"), **more)


def podman(name: str = "web", ready: bool = True, **labels: str) -> Workload:
    return Workload("podman", name, labels, ready)


def service(target: int | str | None = 8080, **selector: str) -> Service:
    spec = ServiceSpec(cluster_ip="10.96.0.1", selector=selector, ports=[ServicePort(80, target_port=target)])
    return Service(ObjectMeta(name="web", namespace="default"), spec)


def test_labels_of_the_request_are_enough() -> None:
    (pod,) = pod_rows("here", [attached(labels={"app": "web"})])
    assert str(pod.key) == f"default/{ID[:12]}"
    (endpoint,) = pod_endpoints(service(app="web"), [pod], service().spec.ports[0], Family.IPV4)
    assert (endpoint.address, endpoint.port, endpoint.ready, endpoint.node) == ("10.0.0.2", 8080, True, "here")
    (endpoint,) = pod_endpoints(service(app="web"), [pod], service().spec.ports[0], Family.IPV6)
    assert endpoint.address == "fd00::2"


def test_what_the_runtime_says_comes_on_top() -> None:
    (pod,) = pod_rows("here", [attached(name="asked", labels={"a": "1", "b": "1"}, workload=podman(b="2"))])
    assert str(pod.key) == "default/web" and pod.metadata.labels == {"a": "1", "b": "2"}
    (pod,) = pod_rows("here", [attached(workload=podman(ready=False, app="web"))])
    (endpoint,) = pod_endpoints(service(app="web"), [pod], service().spec.ports[0], Family.IPV4)
    assert not endpoint.ready and not endpoint.serving


def test_namespace() -> None:
    def of(**more) -> str:
        return pod_rows("here", [attached(**more)])[0].metadata.namespace

    assert of() == "default"
    assert of(labels={"io.kubernetes.pod.namespace": "kube"}) == "kube"
    assert of(labels={"io.kubernetes.pod.namespace": "kube"}, workload=podman(**{"waggle.dev/namespace": "shop"})) == (
        "shop"
    )
    assert of(namespace="asked", labels={"waggle.dev/namespace": "shop"}) == "asked"


def test_what_kubernetes_made_is_no_row() -> None:
    assert pod_rows("here", [attached(managed=True, labels={"app": "web"})]) == []


def test_one_row_per_container_and_no_name_twice() -> None:
    other = "f" * 64
    rows = pod_rows(
        "here",
        [attached(name="web"), attached(name="web")._replace(addresses=("10.0.0.9",)), attached(other, name="web")],
    )
    assert [pod.metadata.name for pod in rows] == ["web", f"web-{other[:12]}"]
    assert rows[0].status.pod_ip == "10.0.0.2"


def test_named_target_ports_have_no_source() -> None:
    rows = pod_rows("here", [attached(labels={"app": "web"})])
    named = service("http", app="web")
    assert unresolved_ports([named, service(80, app="web"), service("http", app="db")], rows) == {named.key: "http"}
    assert unresolved_ports([named], []) == {}
