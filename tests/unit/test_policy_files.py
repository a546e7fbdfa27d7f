"""Policies as files: lint with file and line, the two commands and what they exit with, recorded flows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.unit.policy_worlds import cluster_policy, world

from waggle.cli import main as entry
from waggle.errors import ConfigError
from waggle.model.meta import ObjectKey
from waggle.model.objects import Pod
from waggle.model.policy_lint import lint
from waggle.sources.policy_files import read_policy_files

WORKLOADS = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: ops, labels: {team: ops}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: x, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: report, namespace: shop}
spec: {jobTemplate: {spec: {template: {metadata: {labels: {app: report}}, spec: {containers: []}}}}}
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: probe, namespace: ops, labels: {app: probe}}
  spec: {containers: [{name: c, image: x}]}
  status: {phase: Running, podIPs: [{ip: 10.244.0.2}, {ip: 'fd00::2'}]}
- apiVersion: v1
  kind: Node
  metadata: {name: node1, labels: {role: worker}}
  status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
"""


def network(spec: str, name: str = "p", namespace: str = "shop") -> str:
    return f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}, namespace: {namespace}}}
spec:
{spec}"""


def cluster(spec: str, name: str = "c", priority: int = 5) -> str:
    return f"""\
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {{name: {name}}}
spec:
  tier: Admin
  priority: {priority}
  subject: {{namespaces: {{}}}}
{spec}"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def waggle(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command in this process, in a directory with the workloads."""
    (tmp_path / "workloads.yaml").write_text(WORKLOADS)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["waggle", *arguments])
        capsys.readouterr()
        code = 0
        try:
            entry.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


FINE = network("""\
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{namespaceSelector: {matchLabels: {team: ops}}}, {podSelector: {}}]
    ports: [{port: http}]
  egress:
  - ports: [{port: 53, protocol: UDP}, {port: 53}]
""")

#: code, line, a part of the reason; the policies
FOUND: list[tuple[str, int, str, str]] = [
    (
        "selects-nothing",
        5,
        "no pod of namespace shop has app=wbe",
        network("  podSelector: {matchLabels: {app: wbe}}\n"),
    ),
    (
        "selects-nothing",
        8,
        "no pod is such a peer: app=x in namespace shop",
        network("  podSelector: {}\n  ingress:\n  - from:\n    - podSelector: {matchLabels: {app: x}}\n"),
    ),
    ("unknown-namespace", 3, "no namespace shpo", network("  podSelector: {}\n", namespace="shpo")),
    (
        "unknown-namespace",
        9,
        "no namespace opps",
        network(
            "  podSelector: {}\n  ingress:\n  - from:\n    - podSelector: {}\n"
            "      namespaceSelector: {matchExpressions: "
            "[{key: kubernetes.io/metadata.name, operator: In, values: [ops, opps]}]}\n"
        ),
    ),
    (
        "shadowed",
        8,
        "does not allow already",
        network(
            "  podSelector: {}\n  ingress:\n  - from: [{namespaceSelector: {}}]\n  - from: [{podSelector: {}}]\n"
            "    ports: [{port: 80}]\n"
        ).replace("  - from: [{podSelector", "  - from: [{podSelector"),
    ),
    (
        "shadowed",
        7,
        "ingress[1] does not allow already",
        network("  podSelector: {}\n  ingress:\n  - ports: [{port: 80}]\n  - ports: [{port: 79, endPort: 81}]\n"),
    ),
    (
        "shadowed",
        9,
        "ingress[0] does not",
        network(
            "  podSelector: {}\n  ingress:\n  - from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.9.0.0/16]}}]\n"
            "    ports: [{port: 80}]\n  - from: [{ipBlock: {cidr: 10.1.0.0/16}}]\n    ports: [{port: 80}]\n"
        ),
    ),
    (
        "one-family",
        7,
        "only IPv4 addresses are allowed, none of IPv6",
        network(
            "  podSelector: {matchLabels: {app: probe}}\n  ingress:\n  - from: [{ipBlock: {cidr: 10.0.0.0/8}}]\n",
            namespace="ops",
        ),
    ),
    (
        "no-dns",
        6,
        "shop/deployment/web may send, but no rule of egress allows port 53",
        network("  podSelector: {matchLabels: {app: web}}\n  egress:\n  - ports: [{port: 443}]\n"),
    ),
    (
        "unknown-port",
        7,
        "no pod that the policy selects has a TCP port named metrics",
        network("  podSelector: {}\n  ingress:\n  - ports: [{port: metrics}]\n"),
    ),
    (
        "unknown-port",
        7,
        "a UDP port named http",
        network("  podSelector: {}\n  ingress:\n  - ports: [{port: http, protocol: UDP}]\n"),
    ),
    (
        "unknown-port",
        9,
        "no pod that the rule leads to",
        network(
            "  podSelector: {}\n  egress:\n  - to: [{podSelector: {matchLabels: {app: report}}}]\n"
            "    ports:\n    - port: http\n  - ports: [{port: 53, protocol: UDP}]\n"
        ),
    ),
    (
        "ignored-rules",
        7,
        "policyTypes does not list Egress",
        network("  podSelector: {}\n  policyTypes: [Ingress]\n  egress: [{}]\n"),
    ),
    ("ignored-rules", 6, "write policyTypes: [Egress]", network("  podSelector: {}\n  egress: []\n")),
    (
        "shadowed",
        11,
        "never reached: ingress[0] (Deny) matches",
        cluster(
            "  ingress:\n  - {action: Deny, from: [{namespaces: {}}]}\n"
            "  - action: Accept\n    from: [{pods: {podSelector: {matchLabels: {app: web}}}}]\n"
        ).replace("  - {action: Deny", "\n  - {action: Deny"),
    ),
    (
        "one-family",
        9,
        "only IPv4 addresses are denied",
        cluster("  egress:\n  - {action: Deny, to: [{networks: [0.0.0.0/0]}]}\n"),
    ),
    (
        "selects-nothing",
        9,
        "no node has role=king",
        cluster("  egress:\n  - {action: Deny, to: [{nodes: {matchLabels: {role: king}}}]}\n"),
    ),
    (
        "unknown-port",
        9,
        "has a port named metrics",
        cluster(
            "  ingress:\n  - {action: Deny, from: [{namespaces: {}}], protocols: [{destinationNamedPort: metrics}]}\n"
        ),
    ),
]


@pytest.mark.parametrize(("code", "line", "reason", "text"), FOUND, ids=[f"{row[0]}-{row[2][:30]}" for row in FOUND])
def test_lint(code: str, line: int, reason: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "policies.yaml").write_text(text)
    (tmp_path / "workloads.yaml").write_text(WORKLOADS)
    files = read_policy_files([tmp_path])
    found = [
        (finding.code, place.line if (place := files.place(finding.kind, finding.key, finding.path)) else 0)
        for finding in lint(files.world())
        if reason in finding.reason
    ]
    assert found == [(code, line)], [str(finding) for finding in lint(files.world())]


def test_equal_priorities(tmp_path: Path) -> None:
    def both(one: str, other: str, priority: int = 5) -> list[str]:
        text = f"{cluster(one, 'a')}---\n{cluster(other, 'b', priority)}"
        (tmp_path / "p.yaml").write_text(f"{text}---\n{WORKLOADS}")
        return [f.reason for f in lint(read_policy_files([tmp_path]).world()) if f.code == "equal-priority"]

    deny = "  ingress: [{action: Deny, from: [{namespaces: {}}]}]\n"
    tcp, udp = (f"protocols: [{{{name}: {{destinationPort: {{number: 80}}}}}}]" for name in ("tcp", "udp"))
    accept = f"  ingress: [{{action: Accept, from: [{{namespaces: {{matchLabels: {{team: ops}}}}}}], {tcp}}}]\n"
    (reason,) = both(deny, accept)
    assert reason.startswith("has the priority of a, and ingress[0] can match what ingress[0] there matches")
    assert both(deny, accept, priority=6) == []
    assert both(deny, deny) == []  # they agree
    assert both(deny.replace("}]}]", "}], " + udp + "}]"), accept) == []  # no packet is of both


def test_rules_that_are_not_understood() -> None:
    """The apiserver lets through what its version of the resource knows, and ours may not."""
    newer = cluster_policy("{ingress: [{action: Pass, from: [{}]}, {action: Accept, from: [{}]}]}")
    found = [finding for finding in lint(world([newer])) if finding.code == "not-understood"]
    assert [(finding.path, finding.reason.rpartition("that it ")[2]) for finding in found] == [
        (("spec", "ingress", 0), "denies everything"),
        (("spec", "ingress", 1), "matches nothing"),
    ]


def test_what_is_right_is_left_alone(waggle, tmp_path: Path) -> None:
    (tmp_path / "policies.yaml").write_text(FINE)
    ran = waggle("policy", "check", ".")
    assert (ran.code, ran.out) == (0, "1 policies, 3 pods: nothing found\n")


def test_check_says_where(waggle, tmp_path: Path) -> None:
    (tmp_path / "policies.yaml").write_text(FINE.replace("port: http", "port: htpp"))
    ran = waggle("policy", "check", "policies.yaml", "--with", "workloads.yaml")
    assert ran.code == 1
    assert ran.out.startswith("policies.yaml:8: NetworkPolicy shop/p: spec.ingress[0].ports[0].port: no pod that")
    (finding,) = json.loads(waggle("policy", "check", ".", "-o", "json").out)["findings"]
    assert (finding["code"], finding["line"], finding["file"]) == ("unknown-port", 8, "policies.yaml")


def test_refused_objects_are_errors(waggle, tmp_path: Path) -> None:
    (tmp_path / "policies.yaml").write_text(FINE + "---\nkind: NetworkPolicy\nmetadata: {name: x}\n")
    ran = waggle("policy", "check", ".")
    assert ran.code == 2
    assert "error: policies.yaml:12: NetworkPolicy x: the NetworkPolicy has no apiVersion" in ran.out
    assert waggle("policy", "check", "nowhere").code == 2
    (tmp_path / "policies.yaml").write_text(FINE)
    assert waggle("policy", "check", "policies.yaml", "--with", ".").code == 0  # the same file twice is one file
    (tmp_path / "again.yaml").write_text(FINE)
    assert "policies.yaml:1: NetworkPolicy shop/p: is given in again.yaml:1 too" in waggle("policy", "check", ".").out


def test_diff(waggle, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(FINE)
    (tmp_path / "new.yaml").write_text(FINE.replace("[{port: http}]", "[{port: http}, {port: 9100, endPort: 9200}]"))
    (tmp_path / "flows.jsonl").write_text(
        '{"src": "ops/probe", "dst": "shop/deployment/web", "proto": "tcp", "dport": 9150, "verdict": "dropped"}\n\n'
        '{"src": "10.244.0.2", "dst": "shop/deployment/web", "dport": 8080}\n'
        '{"kind": "drop", "protocol": "TCP", "source": {"address": "10.244.0.2"}, '
        '"destination": {"address": "10.96.0.1", "port": 80}, "backend": {"address": "10.244.0.3", "port": 9101}}\n'
        '{"src": "nobody", "dst": "shop/deployment/web"}\n'
    )
    assert waggle("policy", "diff", "old.yaml", "old.yaml", "--with", "workloads.yaml").code == 0
    ran = waggle("policy", "diff", "old.yaml", "new.yaml", "--with", "workloads.yaml", "--flows", "flows.jsonl")
    assert ran.code == 1, ran.err
    assert ran.out.splitlines() == [
        "ops/probe, shop/cronjob/report → shop/deployment/web (IPv4 only)",
        "  + deny → allow: TCP 9100-9200",
        "      before: no rule allows: ingress isolated by NetworkPolicy shop/p",
        "      after: NetworkPolicy shop/p ingress[0]",
        "1 set of flows change",
        "line 1: TCP ops/probe → shop/deployment/web:9150: deny → allow (seen: dropped): "
        "NetworkPolicy shop/p ingress[0]",
        "line 4: TCP 10.244.0.2 → 10.244.0.3:9101: deny → allow (seen: dropped): NetworkPolicy shop/p ingress[0]",
        "2 recorded flows would change",
        "ends that are not known here, in lines 5",
    ]
    said = json.loads(waggle("policy", "diff", "new.yaml", "old.yaml", "--with", "workloads.yaml", "-o", "json").out)
    (change,) = said["changes"]
    assert change["ports"][0]["before"] == "allow"
    assert (change["ports"][0]["first"], change["ports"][0]["last"]) == (9100, 9200)


def test_node_policies_that_differ_are_named(waggle, tmp_path: Path) -> None:
    """No pods are needed: what a node makes of a change, it says when it tries it."""

    def written(name: str, *ports: int) -> str:
        rules = json.dumps([{"ports": [{"port": port} for port in ports]}])
        return (
            f"---\napiVersion: waggle.io/v1alpha1\nkind: NodePolicy\nmetadata: {{name: {name}}}\n"
            f"spec: {{ingress: {rules}}}\n"
        )

    (tmp_path / "old.yaml").write_text(written("a", 22) + written("b", 80) + written("gone", 1))
    (tmp_path / "new.yaml").write_text(written("a", 22) + written("b", 80, 443) + written("new", 1))
    found = waggle("policy", "diff", "old.yaml", "new.yaml", "-o", "json")
    assert found.code == 1
    assert json.loads(found.out) == {
        "changes": [], "flows": None, "notCompared": [], "nodePolicies": ["b", "gone", "new"],
    }  # fmt: skip
    assert "NodePolicies that differ: b, gone, new" in waggle("policy", "diff", "old.yaml", "new.yaml").out
    assert waggle("policy", "diff", "old.yaml", "old.yaml", "--with", "workloads.yaml").code == 0


def test_diff_that_cannot_be_told(waggle, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(FINE)
    assert "there are no pods" in waggle("policy", "diff", "old.yaml", "old.yaml").err
    (tmp_path / "flows.jsonl").write_text("[1]\n")
    ran = waggle("policy", "diff", "old.yaml", "old.yaml", "--with", "workloads.yaml", "--flows", "flows.jsonl")
    assert ran.code == 2
    assert "flows.jsonl:1: this is no flow" in ran.err
    assert "pod-cidr" in waggle("policy", "check", ".", "--pod-cidr", "10.0.0.1/8").err


def test_addresses_of_pods_that_have_none(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WORKLOADS)
    addresses: dict[ObjectKey, str] = {}
    files = read_policy_files([tmp_path], "10.244.0.0/29", addresses)
    assert files.placed == {ObjectKey("shop", "deployment/web"), ObjectKey("shop", "cronjob/report")}
    given = {key: [entry.ip for entry in pod.status.pod_ips] for key, pod in files.of(Pod).items()}
    assert given[ObjectKey("shop", "cronjob/report")] == ["10.244.0.1"]
    assert given[ObjectKey("shop", "deployment/web")] == ["10.244.0.3"]  # 10.244.0.2 is another's
    with pytest.raises(ConfigError, match="no address left for pod"):
        read_policy_files([tmp_path], "10.244.0.2/32")
