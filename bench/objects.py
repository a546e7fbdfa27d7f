"""Services and EndpointSlices by the thousand, as a Kubernetes API would show them.

Service number i has the address 10.96.0.0 + 256 + i, one TCP port, and one EndpointSlice; its endpoints are at
addresses of nodes that do not exist, so nothing ever answers there. Everything is a function of the numbers: two
processes that are given the same ones speak of the same objects.
"""

from __future__ import annotations

import hashlib
import ipaddress
import uuid
from typing import Any

NAMESPACE = "bench"
FILLER_PORT = 80
TARGET_PORT = 8080

_FIRST_CLUSTER_IP = int(ipaddress.IPv4Address("10.96.1.0"))
_FIRST_ENDPOINT_IP = int(ipaddress.IPv4Address("10.128.0.0"))
_ENDPOINTS_RESERVED = 64  # addresses per Service
_STAMP = "2025-01-01T00:00:00Z"


def cluster_ip(number: int) -> str:
    return str(ipaddress.IPv4Address(_FIRST_CLUSTER_IP + number))


def endpoint_ip(number: int, index: int) -> str:
    """Address of an endpoint of Service `number`; `index` below 64."""
    return str(ipaddress.IPv4Address(_FIRST_ENDPOINT_IP + number * _ENDPOINTS_RESERVED + index % _ENDPOINTS_RESERVED))


def service_name(number: int) -> str:
    return f"service-{number:05d}"


def service(number: int, version: int) -> dict[str, Any]:
    """A ClusterIP Service."""
    name = service_name(number)
    ip = cluster_ip(number)
    return {
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": _uid("service", number),
            "resourceVersion": str(version),
            "creationTimestamp": _STAMP,
            "labels": {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": NAMESPACE},
            "managedFields": [_managed_fields("helm", "v1", _SERVICE_FIELDS)],
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": ip,
            "clusterIPs": [ip],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            "ports": [{"name": "http", "protocol": "TCP", "port": FILLER_PORT, "targetPort": TARGET_PORT}],
            "selector": {"app.kubernetes.io/name": name},
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(number: int, version: int, indices: list[int]) -> dict[str, Any]:
    """The slice of Service `number` with the endpoints `indices`."""
    name = service_name(number)
    return {
        "metadata": {
            "name": f"{name}-x{number % 97:02d}",
            "namespace": NAMESPACE,
            "labels": {
                "kubernetes.io/service-name": name,
                "app.kubernetes.io/name": name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
            "uid": _uid("slice", number),
            "resourceVersion": str(version),
            "generation": 1,
            "creationTimestamp": _STAMP,
            "generateName": f"{name}-",
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "name": name,
                    "uid": _uid("service", number),
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
            "managedFields": [_managed_fields("kube-controller-manager", "discovery.k8s.io/v1", _SLICE_FIELDS)],
        },
        "addressType": "IPv4",
        "endpoints": [_endpoint(number, index) for index in indices],
        "ports": [{"name": "http", "protocol": "TCP", "port": TARGET_PORT}],
    }


def _endpoint(number: int, index: int) -> dict[str, Any]:
    uid = _uid("pod", number * _ENDPOINTS_RESERVED + index)
    return {
        "addresses": [endpoint_ip(number, index)],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{(number * 7 + index) % 1000:04d}",
        "zone": f"zone-{index % 3}",
        "targetRef": {
            "kind": "Pod",
            "namespace": NAMESPACE,
            "name": f"{service_name(number)}-6d4cf56db6-{uid[:5]}",
            "uid": uid,
        },
    }


def _uid(kind: str, number: int) -> str:
    """As random as a real one, so that it compresses as badly."""
    return str(uuid.UUID(bytes=hashlib.blake2b(f"{kind}/{number}".encode(), digest_size=16).digest(), version=4))


def _managed_fields(manager: str, version: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "manager": manager,
        "operation": "Update",
        "apiVersion": version,
        "time": _STAMP,
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    }


_SERVICE_FIELDS: dict[str, Any] = {
    "f:metadata": {
        "f:annotations": {".": {}, "f:meta.helm.sh/release-name": {}, "f:meta.helm.sh/release-namespace": {}},
        "f:labels": {".": {}, "f:app.kubernetes.io/managed-by": {}, "f:app.kubernetes.io/name": {}},
    },
    "f:spec": {
        "f:internalTrafficPolicy": {},
        "f:ports": {
            ".": {},
            'k:{"port":80,"protocol":"TCP"}': {
                ".": {},
                "f:name": {},
                "f:port": {},
                "f:protocol": {},
                "f:targetPort": {},
            },
        },
        "f:selector": {},
        "f:sessionAffinity": {},
        "f:type": {},
    },
}
_SLICE_FIELDS: dict[str, Any] = {
    "f:addressType": {},
    "f:endpoints": {},
    "f:metadata": {
        "f:generateName": {},
        "f:labels": {
            ".": {},
            "f:app.kubernetes.io/name": {},
            "f:endpointslice.kubernetes.io/managed-by": {},
            "f:kubernetes.io/service-name": {},
        },
        "f:ownerReferences": {".": {}, 'k:{"uid":"00000000-0000-0000-0000-000000000000"}': {}},
    },
    "f:ports": {},
}
