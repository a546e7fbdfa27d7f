"""Why a packet passes or not: who is meant, backends, rules in words, and changes that do let it pass."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.policy_random import policy_lists
from tests.unit.policy_worlds import NAMESPACES, NODE, OUTSIDE, PODS, address, cluster_policy, pod, policy, world

from waggle.cli.why import as_yaml, lines
from waggle.errors import ConfigError
from waggle.model.choice import NodeFacts
from waggle.model.meta import ObjectKey
from waggle.model.node_policy import Essentials, Guests
from waggle.model.node_trace import OwnPolicies
from waggle.model.objects import NodePolicy, Pod, PodCondition, Service
from waggle.model.packets import Cluster, LocalNode
from waggle.model.policy import PolicyWorld, Traffic, decide
from waggle.model.policy_fix import fixes
from waggle.model.policy_objects import ClusterNetworkPolicy, NetworkPolicy
from waggle.model.policy_rules import Direction
from waggle.model.policy_trace import look
from waggle.model.service import Family
from waggle.model.why import Situation, Why, party, split_port, why
from waggle.observe.why import why_json
from waggle.sources.yaml_objects import parse_manifest

WEB = """\
metadata: {name: web, namespace: y}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  selector: {app: web}
  loadBalancerSourceRanges: [198.51.100.0/24]
  ports: [{name: http, port: 80, targetPort: serve-81-tcp, nodePort: 30080}, {name: dns, port: 53, protocol: UDP}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.80}]}}
"""


def service(text: str = WEB) -> Service:
    return msgspec.convert(yaml.safe_load(text), Service)


def backend(name: str, *, ready: bool = True) -> Pod:
    one = pod(name, labels={"pod": name[-1], "app": "web"})
    conditions = [PodCondition(type="Ready", status="True" if ready else "False")]
    return msgspec.structs.replace(one, status=msgspec.structs.replace(one.status, conditions=conditions))


def situation(*policies: NetworkPolicy | ClusterNetworkPolicy, services: tuple[Service, ...] = ()) -> Situation:
    """Seen from node1. y/a and y/c (on node2) serve, y/b is not ready."""
    here = world(policies)
    pods = {**here.pods, **{p.key: p for p in (backend("y/a"), backend("y/b", ready=False), backend("y/c"))}}
    here = replace(here, pods=pods, node="node1", node_addresses=frozenset((NODE, "192.0.2.11")))
    every = services or (service(),)
    local = frozenset(address(f"{n}/{p}", family) for n in NAMESPACES for p in "ab" for family in (4, 6))
    node = LocalNode(NodeFacts("node1"), frozenset((NODE, "192.0.2.11")), (NODE,), pods=local)
    return Situation(Cluster({s.key: s for s in every}, {}, pods, here.nodes), here, node)


def told(answer: Why) -> str:
    """The words of an answer; that there is JSON of it is proven on the way."""
    return "\n".join(lines(json.loads(json.dumps(why_json(answer, lambda *_: (None, None))))))


# -- the node's own -------------------------------------------------------------------------------------------------

FRONT = """\
metadata: {name: front}
spec:
  nodeSelector: {matchLabels: {role: node1}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{ipBlock: {cidr: 198.51.100.0/24, except: [198.51.100.7/32]}}], ports: [{port: 22}]}]
  egress: [{to: [{nodeSelector: {matchLabels: {role: node2}}}], ports: [{protocol: UDP, port: 7000, endPort: 7100}]}]
"""


def guarded(*texts: str, own: OwnPolicies | None = None) -> Situation:
    made = tuple(msgspec.convert(yaml.safe_load(text), NodePolicy) for text in texts or (FRONT,))
    return situation()._replace(node_policies=made, own=own._replace(policies=made) if own else None)


@pytest.mark.parametrize(
    ("source", "destination", "protocol", "verdict", "words"),
    [
        ("198.51.100.1", f"{NODE}:22", "tcp", "passes", "NodePolicy front ingress[0] allows it"),
        ("198.51.100.7", f"{NODE}:22", "tcp", "dropped", "198.51.100.7 is excepted from 198.51.100.0/24"),
        ("198.51.100.1", f"{NODE}:23", "tcp", "dropped", "TCP 23 is not TCP 22"),
        ("203.0.113.1", f"{NODE}:22", "tcp", "dropped", "203.0.113.1 is not in 198.51.100.0/24"),
        ("node1", "node2:7050", "udp", "passes", "NodePolicy front egress[0] allows it"),
        ("node1", "node2:7101", "udp", "dropped", "UDP 7101 is not UDP 7000-7100"),
        ("node1", "203.0.113.1:7000", "udp", "dropped", "203.0.113.1 is no node's address"),
        ("x/c", "node1:22", "tcp", "dropped", "is not in 198.51.100.0/24"),
    ],
)
def test_node_policies_are_asked_about_the_nodes_own(
    source: str, destination: str, protocol: str, verdict: str, words: str
) -> None:
    answer = why(guarded(own=OwnPolicies((), known=True)), source, destination, protocol)
    assert answer.verdict == verdict
    assert words in told(answer)
    if verdict == "dropped":
        (fix,) = answer.paths[0].fixes
        assert fix.manifest is not None
        read = parse_manifest(as_yaml(fix.manifest).encode(), "-")
        assert not read.errors and len(read.objects) == 1
        again = guarded(FRONT, json.dumps(fix.manifest), own=OwnPolicies((), known=True))
        assert why(again, source, destination, protocol).verdict == "passes"


@pytest.mark.parametrize(
    ("source", "destination"), [("x/a", "node1:22"), ("node1", "x/b:80"), ("node1", "node1:22"), ("node2", "x/c:80")]
)
def test_node_policies_are_not_asked_about_a_node_and_what_runs_there(source: str, destination: str) -> None:
    answer = why(guarded(FRONT, FRONT.replace("front", "second").replace("node1", "node2")), source, destination)
    assert answer.verdict == "passes" and not answer.paths[0].nodes


def test_a_second_fix_does_not_replace_the_first() -> None:
    own = OwnPolicies((), known=True)
    given = [FRONT]
    for source in ("203.0.113.1", "203.0.113.2"):
        (fix,) = why(guarded(*given, own=own), source, "node1:22").paths[0].fixes
        given.append(json.dumps(fix.manifest))
    for source in ("203.0.113.1", "203.0.113.2"):
        assert why(guarded(*given, own=own), source, "node1:22").verdict == "passes"
    assert len({yaml.safe_load(text)["metadata"]["name"] for text in given}) == 3


def test_what_always_passes_and_what_is_tried_or_not_known_is_said() -> None:
    essentials = Essentials(8472, apiservers=frozenset({("203.0.113.1", 6443)}))
    own = OwnPolicies((), essentials, Guests(("203.0.113.9",), (22,)), known=True, on_trial=True)
    answer = why(guarded(own=own), "node1", "203.0.113.1:6443")
    assert answer.verdict == "passes"
    assert "node node1, on trial: connections to the API server always pass" in told(answer)
    assert "those who were logged in" in told(why(guarded(own=own), "203.0.113.9", "node1:22"))
    other = FRONT.replace("node1", "node2")
    assert "of node node2, if it has confirmed" in told(why(guarded(other, own=own), "203.0.113.9", "node2:22"))


def test_an_audited_node_policy_drops_nothing() -> None:
    audited = FRONT.replace("name: front", 'name: front, annotations: {"waggle.io/audit": "true"}')
    answer = why(guarded(audited, own=OwnPolicies((), known=True)), "203.0.113.1", "node1:22")
    assert answer.verdict == "audit" and not answer.paths[0].fixes
    assert "no rule would allow it" in told(answer)
    assert why(guarded(audited, own=OwnPolicies((), known=True)), "198.51.100.1", "node1:22").verdict == "passes"


# -- who is meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "meant"),
    [
        ("x/a", "pod", "x/a"),
        ("pod/y/a", "pod", "y/a"),
        ("y/web", "service", "Service y/web"),
        ("svc/y/web", "service", "Service y/web"),
        ("web.y.svc", "service", "Service y/web"),
        ("web.y.svc.cluster.local", "service", "Service y/web"),
        ("node2", "node", "node node2"),
        ("node/node2", "node", "node node2"),
        ("10.0.1.1", "pod", "x/a"),
        ("fd00::1:1", "pod", "x/a"),
        ("192.0.2.2", "node", "node node2"),
        ("192.0.2.11", "node", "node node1"),
        ("203.0.113.9", "address", "203.0.113.9"),
        ("example.com", "name", "example.com"),
    ],
)
def test_who_is_meant(text: str, kind: str, meant: str) -> None:
    found = party(situation(), text, is_source=False)
    assert (found.kind, found.text) == (kind, meant)


def test_a_name_of_both_means_the_service_and_of_a_source_the_pod() -> None:
    twin = service("{metadata: {name: a, namespace: x}, spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}}")
    here = situation(services=(twin,))
    assert party(here, "x/a", is_source=False).kind == "service"
    assert party(here, "pod/x/a", is_source=False).kind == "pod"
    assert party(here, "x/a", is_source=True).kind == "pod"


@pytest.mark.parametrize(
    ("source", "target", "protocol", "reason"),
    [
        ("x/nobody", "y/web:80", "", "x/nobody: there is no such pod, node or address"),
        ("x/a", "pod/x/nobody:80", "", "there is no such pod"),
        ("x/a", "y/web:8080", "", "Service y/web has no port 8080: there is 80/TCP (http), 53/UDP (dns)"),
        ("x/a", "y/web", "", "Service y/web has several ports: say which"),
        ("x/a", "y/web:80", "udp", "has no port 80"),
        ("x/a", "pod/y/a", "", "say which port"),
        ("x/a", "pod/y/a:nope", "", "pod y/a has no TCP port named nope"),
        ("x/a", "203.0.113.9:99999", "", "a port is a number from 1 to 65535"),
        ("203.0.113.9", "[fd00::1:1]:80", "", "no address of the same family"),
        ("example.com", "y/web:80", "", "there is no such"),
    ],
)
def test_what_cannot_be_understood(source: str, target: str, protocol: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        why(situation(), source, target, protocol)
    assert reason in str(error.value)


def test_ports() -> None:
    assert split_port("x/a:80") == ("x/a", "80")
    assert split_port("[fd00::1]:80") == ("fd00::1", "80")
    assert split_port("fd00::1") == ("fd00::1", "")
    assert why(situation(), "x/a", "pod/y/a:serve-81-tcp").port == 81
    assert why(situation(), "x/a", "pod/y/a", "icmp").port is None
    assert why(situation(), "x/a", "y/web", "udp").port == 53
    assert why(situation(), "x/a", "[fd00::2:1]:80").paths[0].traffic.source == "fd00::1:1"
    assert why(situation(), "x/a", "pod/y/a:80", family=Family.IPV6).paths[0].traffic.destination == "fd00::2:1"


# -- Services -------------------------------------------------------------------------------------------------------


def test_backends_and_why_not() -> None:
    text = told(why(situation(), "x/a", "y/web:http"))
    assert text.splitlines()[0] == "x/a (10.0.1.1, node1) → Service y/web (10.96.0.10):80 TCP: passes"
    assert "  + y/a 10.0.2.1:81 on node1" in text
    assert "  - y/b 10.0.2.2:81 on node1: not ready" in text
    assert "to y/a 10.0.2.1:81, and 1 more backends alike: passes" in text


def test_a_local_policy_keeps_other_nodes_out() -> None:
    local = msgspec.structs.replace(
        service(), spec=msgspec.structs.replace(service().spec, internal_traffic_policy="Local")
    )
    text = told(why(situation(services=(local,)), "x/a", "10.96.0.10:80"))
    assert "  - y/c 10.0.2.3:81 on node2: not on node1, and internalTrafficPolicy is Local" in text
    there = told(why(situation(services=(local,)), "x/c", "10.96.0.10:80"))
    assert "  + y/c 10.0.2.3:81 on node2" in there
    assert "not on node2" in there


def test_frontends_by_address() -> None:
    here = situation()
    assert (
        told(why(here, OUTSIDE, "192.0.2.1:30080")).splitlines()[2].startswith("Service y/web: TCP 80 (http), NodePort")
    )
    assert why(here, "198.51.100.7", "203.0.113.80:80").verdict == "passes"
    shut = why(here, OUTSIDE, "203.0.113.80:80")
    assert shut.verdict == "dropped"
    assert "so that loadBalancerSourceRanges do not have 203.0.113.9" in told(shut)
    assert why(here, "x/a", "10.96.0.10:81").verdict == "rejected"


def test_nobody_serves() -> None:
    empty = service(
        "{metadata: {name: e, namespace: x}, spec: {clusterIP: 10.96.0.9, selector: {app: none}, ports: [{port: 80}]}}"
    )
    answer = why(situation(services=(empty,)), "x/a", "x/e")
    assert answer.verdict == "rejected"
    assert "it has no endpoints" in told(answer)


def test_backends_may_differ() -> None:
    wall = policy("{podSelector: {matchLabels: {pod: c}}, policyTypes: [Ingress]}", "wall", "y")
    answer = why(situation(wall), "x/a", "y/web:80")
    assert answer.verdict == "depends"
    assert [path.decision.allowed for path in answer.paths] == [True, False]


# -- words ----------------------------------------------------------------------------------------------------------

RULES = """
podSelector: {matchLabels: {pod: a}}
ingress:
- from: [{podSelector: {matchLabels: {pod: b}}}]
- from: [{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {matchLabels: {role: client}}}]
- from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.2.0/24]}}, {ipBlock: {cidr: 192.0.2.0/24}}]
- ports: [{port: 443}, {port: 1, endPort: 9}, {protocol: UDP}, {port: nope}]
- from: [{podSelector: {}}]
  ports: [{port: 81}]
"""


def test_words_of_rules_that_do_not_match() -> None:
    side = look(world([policy(RULES)]), Direction.INGRESS, Traffic(address("y/b"), address("x/a"), "TCP", 80))
    assert not side.side.allowed
    assert [rule.why for rule in side.policies[0].rules] == [
        "y/b is not in namespace x",
        "namespace y is not team=blue and y/b is not role=client",
        "10.0.2.2 is excepted from 10.0.0.0/8, nor: 10.0.2.2 is not in 192.0.2.0/24",
        "TCP 80 is not TCP 443, TCP 1-9, any UDP, TCP nope (nothing at 10.0.1.1 is named nope)",
        "y/b is not in namespace x; TCP 80 is not TCP 81",
    ]


def test_words_of_cluster_policies() -> None:
    rules = cluster_policy(
        "{egress: [{action: Deny, to: [{nodes: {}}]}, {action: Accept, to: [{domainNames: [example.com]}]}, "
        "{action: Deny, to: [{namespaces: {matchLabels: {ns: y}}}]}, {action: Accept, to: [{}]}, "
        "{action: Deny, to: [{networks: [203.0.113.0/24]}], name: out}]}"
    )
    side = look(world([rules]), Direction.EGRESS, Traffic(address("x/a"), OUTSIDE, "TCP", 80))
    assert [(rule.matches, rule.why) for rule in side.policies[0].rules] == [
        (False, "203.0.113.9 is of no such node"),
        (False, "203.0.113.9 is not known as example.com"),
        (False, "203.0.113.9 is no pod's address"),
        (False, "a part of it is not known here: it accepts nothing"),
        (True, ""),
    ]
    assert str(side.side.rule) == "ClusterNetworkPolicy cluster egress[4] 'out'"


def test_audited_policies_are_shown_and_decide_nothing() -> None:
    quiet = policy("{podSelector: {}}", "quiet", "y", audit=True)
    answer = why(situation(quiet), "x/a", "pod/y/a:80")
    assert answer.verdict == "audit"
    text = told(answer)
    assert "~ were the audited policies enforced, no rule would allow it" in text
    assert "NetworkPolicy y/quiet, audited: it decides nothing, no rules" in text


# -- changes that help ----------------------------------------------------------------------------------------------


def applied(here: PolicyWorld, manifests: list[dict]) -> PolicyWorld:
    """A world after the manifests have gone through what files go through."""
    for manifest in manifests:
        parsed = parse_manifest(as_yaml(manifest).encode(), "-")
        assert not parsed.errors, parsed.errors
        for placed in parsed.objects.values():
            match placed.obj:
                case NetworkPolicy() as one:
                    here = replace(here, policies={**here.policies, one.key: one})
                case ClusterNetworkPolicy() as one:
                    here = replace(here, cluster_policies={**here.cluster_policies, one.key: one})
    return here


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(policy_lists, st.data())
def test_what_is_proposed_helps_and_isolates_nobody(policies: list, data: st.DataObject) -> None:
    here = world(policies)
    ends = [f"{n}/{p}" for n in NAMESPACES for p in PODS] + ["node2", OUTSIDE]
    source, target = (address(data.draw(st.sampled_from(ends))) for _ in range(2))
    protocol = data.draw(st.sampled_from(["TCP", "UDP", "ICMP"]))
    traffic = Traffic(
        source, target, protocol, None if protocol == "ICMP" else data.draw(st.sampled_from([79, 80, 85]))
    )
    before = decide(here, *traffic)
    found = fixes(here, traffic)
    assert bool(found) <= (not before.allowed)
    if before.allowed or any(fix.manifest is None for fix in found):
        return
    assert found, (before, policies)
    after = applied(here, [fix.manifest for fix in found if fix.manifest])
    assert decide(after, *traffic).allowed
    for one in here.pods.values():  # no pod is isolated that was not
        for direction in Direction:
            was = here.policies_of(one, direction, with_audited=False)
            assert bool(was) == bool(after.policies_of(one, direction, with_audited=False))


def test_a_label_or_a_port_would_do_too() -> None:
    guarded = policy(
        "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {role: client}}}], "
        "ports: [{port: 80}]}, {from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{port: 443}]}]}",
        "guarded",
    )
    (fix,) = fixes(world([guarded]), Traffic(address("x/b"), address("x/a"), "TCP", 80))
    assert fix.instead == (
        "label pod x/b with role=client: NetworkPolicy x/guarded ingress[0] allows it then",
        "add port 80 of TCP to NetworkPolicy x/guarded ingress[1], for all that it allows",
    )
    assert fix.manifest == {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "allow-ingress", "namespace": "x"},
        "spec": {
            "podSelector": {"matchLabels": {"pod": "a"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "b"}}}], "ports": [{"port": 80}]}],
        },
    }


def test_labels_of_one_generation_are_left_out() -> None:
    one = pod("y/b", labels={"pod": "b", "pod-template-hash": "5d4f"})
    here = world([policy("{podSelector: {}}")])
    here = replace(here, pods={**here.pods, one.key: one})
    (fix,) = fixes(here, Traffic(address("y/b"), address("x/a"), "TCP", 80))
    assert fix.manifest is not None
    assert fix.manifest["spec"]["ingress"][0]["from"] == [
        {
            "podSelector": {"matchLabels": {"pod": "b"}},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "y"}},
        }
    ]


def test_names_are_accepted_by_name() -> None:
    closed = policy("{podSelector: {}, policyTypes: [Egress]}")
    answer = why(situation(closed), "x/a", "example.com:443")
    assert answer.verdict == "dropped"
    (fix,) = answer.paths[0].fixes
    assert fix.manifest is not None
    assert fix.manifest["spec"]["egress"] == [
        {
            "action": "Accept",
            "to": [{"domainNames": ["example.com"]}],
            "protocols": [{"tcp": {"destinationPort": {"number": 443}}}],
        }
    ]
    denied = cluster_policy("{egress: [{action: Deny, to: [{networks: [0.0.0.0/0]}]}]}")
    (fix,) = why(situation(denied), "x/a", "example.com:443").paths[0].fixes
    assert fix.words == "accept it by a rule before egress[0] of ClusterNetworkPolicy cluster"


def test_pass_is_less_than_accept() -> None:
    deny = cluster_policy("{ingress: [{action: Deny, from: [{namespaces: {}}]}]}")
    (fix,) = fixes(world([deny]), Traffic(address("y/b"), address("x/a"), "TCP", 80))
    assert fix.words == "pass it by a rule before ingress[0] of ClusterNetworkPolicy cluster"
    isolated = policy("{podSelector: {}}")
    (fix,) = fixes(world([deny, isolated]), Traffic(address("y/b"), address("x/a"), "TCP", 80))
    assert fix.words.startswith("accept it")


def test_what_is_not_understood_cannot_be_mended_by_a_rule() -> None:
    newer = cluster_policy("{ingress: [{action: Deny, from: [{}]}]}")
    (fix,) = fixes(world([newer]), Traffic(address("y/b"), address("x/a"), "TCP", 80))
    assert fix.manifest is None
    assert "take that part away" in fix.words


def test_the_own_node_needs_no_change() -> None:
    answer = why(situation(policy("{podSelector: {}}")), "node1", "pod/x/a:80")
    assert answer.verdict == "passes"
    assert "a pod and the node it runs on may always talk to each other" in told(answer)
    assert why(situation(policy("{podSelector: {}}")), "node2", "pod/x/a:80").verdict == "dropped"


def test_pods_without_an_address() -> None:
    here = situation()
    ended = pod("z/a")
    ended = msgspec.structs.replace(ended, status=msgspec.structs.replace(ended.status, phase="Succeeded"))
    here = here._replace(world=replace(here.world, pods={**here.world.pods, ObjectKey("z", "a"): ended}))
    with pytest.raises(ConfigError, match="pod z/a has no address: it is Succeeded"):
        why(here, "z/a", "y/web:80")
