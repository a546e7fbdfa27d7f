"""What deploy/ ships: the chart and the plain manifests agree, rights are those that the source uses and no others."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from standin_apiserver import NETWORK_POLICIES, StandInApi, network_policy, until

from waggle.config import _coerce, load_config
from waggle.kernel.capabilities import NEEDED
from waggle.model.objects import KINDS, is_read
from waggle.sources.informer import Resource
from waggle.sources.kubernetes import CLUSTER_NETWORK_POLICIES, NODE_POLICIES, RESOURCES, KubernetesSource
from waggle.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ROOT / "deploy/kubernetes/waggle.yaml"
CHART = ROOT / "deploy/helm/waggle"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_deploy", ROOT / "tools/generate_deploy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(kind: str) -> dict[str, Any]:
    return next(one for one in yaml.safe_load_all(PLAIN.read_text()) if one["kind"] == kind)


def rendered(generator: ModuleType, namespace: str = "kube-system", **values: Any) -> list[dict[str, Any]]:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    return generator.render((CHART / "templates/waggle.yaml").read_text(), {**defaults, **values}, namespace)


def test_the_chart_makes_the_plain_manifests(generator: ModuleType) -> None:
    assert rendered(generator) == list(yaml.safe_load_all(PLAIN.read_text()))


@pytest.mark.parametrize(
    ("file", "watched"),
    [("clusternetworkpolicies.yaml", CLUSTER_NETWORK_POLICIES), ("nodepolicies.yaml", NODE_POLICIES)],
)
def test_crds_are_shipped_with_both_and_are_what_the_agent_watches(file: str, watched: Resource[Any]) -> None:
    [crd] = yaml.safe_load_all((ROOT / "deploy/kubernetes" / file).read_text())
    assert crd == yaml.safe_load((CHART / "crds" / file).read_text())
    spec = crd["spec"]
    assert crd["metadata"]["name"] == f"{spec['names']['plural']}.{spec['group']}"
    stored, *others = sorted(spec["versions"], key=lambda one: not one["storage"])
    assert stored["storage"] and not any(one["storage"] for one in others)
    paths = [f"/apis/{spec['group']}/{one['name']}/{spec['names']['plural']}" for one in (stored, *others)]
    assert (watched.path, *watched.earlier) == tuple(paths)
    kind = spec["names"]["kind"]
    assert KINDS[kind][0] == f"{spec['group']}/{stored['name']}"
    for one in (stored, *others):
        assert is_read(f"{spec['group']}/{one['name']}", kind)
        assert {**one, "name": "", "storage": True} == {**stored, "name": "", "storage": True}


def test_values_reach_their_places(generator: ModuleType) -> None:
    settings = {"kubeconfig": "in-cluster", "cni-bin-dir": "/usr/lib/cni", "cni-conf-dir": "/x", "xdp": "native"}
    made = rendered(
        generator,
        "elsewhere",
        apiServerHost="192.0.2.9",
        apiServerPort=443,
        metricsHost="",
        metricsPort=1234,
        settings=settings,
    )
    daemon = next(one for one in made if one["kind"] == "DaemonSet")
    assert {one["metadata"].get("namespace", "elsewhere") for one in made} == {"elsewhere"}
    pod = daemon["spec"]["template"]["spec"]
    agent = pod["containers"][0]
    assert "--metrics-address=:1234" in agent["args"]
    assert {"name": "KUBERNETES_SERVICE_HOST", "value": "192.0.2.9"} in agent["env"]
    assert {"name": "KUBERNETES_SERVICE_PORT", "value": "443"} in agent["env"]
    assert agent["livenessProbe"]["httpGet"]["port"] == agent["readinessProbe"]["httpGet"]["port"] == 1234
    assert "/usr/lib/cni" in [one["mountPath"] for one in agent["volumeMounts"]]
    config = next(one for one in made if one["kind"] == "ConfigMap")["data"]["agent.yaml"]
    assert yaml.safe_load(config) == settings
    before = next(one for one in rendered(generator) if one["kind"] == "DaemonSet")
    key = "waggle.dev/settings"
    annotations = [one["spec"]["template"]["metadata"]["annotations"][key] for one in (before, daemon)]
    assert annotations[0] != annotations[1]  # else a changed setting would start no new agent


def test_the_agent_takes_what_the_manifests_tell_it(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(plain("ConfigMap")["data"]["agent.yaml"])
    config = load_config(file, {})
    assert (str(config.kubeconfig), str(config.cni_bin_dir)) == ("in-cluster", "/opt/cni/bin")
    pod = plain("DaemonSet")["spec"]["template"]["spec"]
    mounted = {one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    needed = {
        config.bpf_root.parent,
        config.state_dir,
        config.api_socket.parent,
        config.cni_bin_dir,
        config.cni_conf_dir,
    }
    assert {str(path) for path in needed} <= mounted
    assert {one["name"] for one in pod["volumes"]} == {one["name"] for one in pod["containers"][0]["volumeMounts"]}


def test_every_setting_in_the_values_is_one_of_the_agent() -> None:
    text = (CHART / "values.yaml").read_text()
    lines = re.findall(r"^  (?:# )?([a-z-]+: [^ ].*)$", text.partition("settings:\n")[2], re.MULTILINE)
    document = yaml.safe_load("\n".join(lines))
    assert len(document) > 15
    for name, value in document.items():
        _coerce(name.replace("-", "_"), value)


def test_privileges_are_those_that_the_agent_keeps() -> None:
    agent = plain("DaemonSet")["spec"]["template"]["spec"]["containers"][0]
    context = agent["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": list(NEEDED)}
    assert context["privileged"] is False and context["allowPrivilegeEscalation"] is False


def allowed(path: str, watching: bool) -> bool:
    """Whether the manifests' role allows this request, as Kubernetes reads it."""
    parts = path.strip("/").split("/")
    group, resource = ("", parts[2]) if parts[0] == "api" else (parts[1], parts[3])
    return any(
        group in rule["apiGroups"]
        and resource in rule["resources"]
        and ("watch" if watching else "list") in rule["verbs"]
        for rule in plain("ClusterRole")["rules"]
    )


async def test_rights_are_exactly_those_that_the_source_uses(tmp_path: Path) -> None:
    async with StandInApi() as api:
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "clusters": [{"name": "c", "cluster": {"server": api.url}}],
                    "users": [{"name": "u", "user": {}}],
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                }
            )
        )
        api.put(NETWORK_POLICIES, network_policy("deny"))  # without any, pods are not asked for
        source = KubernetesSource(Store(), kubeconfig)
        task = asyncio.create_task(source.run())
        try:
            await until(lambda: all(api.queries(resource.path, watch=True) for resource in RESOURCES))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    used = {(path, "watch" in query) for path, query in api.requests}
    assert not [request for request in used if not allowed(*request)]
    rules = plain("ClusterRole")["rules"]
    given = sum(len(rule["resources"]) * len(rule["verbs"]) * len(rule["apiGroups"]) for rule in rules)
    assert given == len(used)  # and nothing besides
    assert not [rule for rule in rules if "*" in rule["resources"] + rule["verbs"] + rule["apiGroups"]]
