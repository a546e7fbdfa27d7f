"""Every line of semantics.md section 6, Netpol: policies, and who then reaches whom on which port."""

from __future__ import annotations

from collections.abc import Callable

from tests.unit.policy_worlds import NAMESPACES, PODS, policy

from waggle.model.policy_objects import NetworkPolicy

EVERY = [f"{n}/{p}" for n in NAMESPACES for p in PODS]
PROTOCOLS = ("TCP", "UDP", "SCTP")

#: (source, destination, protocol, port) → whether it passes. Both families are probed.
Expected = Callable[[str, str, str, int], bool]


def others(*pods: str) -> Callable[[str], bool]:
    return lambda name: name not in pods


def to(target: str, allowed: Callable[[str], bool], port: int | None = None, protocol: str = "TCP") -> Expected:
    """Only sources that `allowed` knows reach `target`, on this port of this protocol, or on every port of every
    protocol; everybody else is reached by all."""
    return lambda source, destination, proto, number: (
        destination != target or (allowed(source) and (port is None or (port, protocol) == (number, proto)))
    )


def of(target: str, allowed: Callable[[str], bool], port: int | None = None, protocol: str = "TCP") -> Expected:
    """The same for what `target` sends."""
    return lambda source, destination, proto, number: (
        source != target or (allowed(destination) and (port is None or (port, protocol) == (number, proto)))
    )


def in_x(name: str) -> bool:
    return name.startswith("x/")


def nobody(name: str) -> bool:
    return False


def anybody(name: str) -> bool:
    return True


A, B = "podSelector: {matchLabels: {pod: a}}", "podSelector: {matchLabels: {pod: b}}"
X_A = "x/a"

NETPOL: list[tuple[str, list[NetworkPolicy], Expected]] = [
    (
        "default deny ingress",
        [policy("{podSelector: {}, policyTypes: [Ingress]}")],
        lambda s, d, _, __: not in_x(d),
    ),
    (
        "default deny all",
        [policy("{podSelector: {}, policyTypes: [Ingress, Egress]}")],
        lambda s, d, _, __: not in_x(d) and not in_x(s),
    ),
    (
        "allow from pods by podSelector, own namespace",
        [policy(f"{{{A}, ingress: [{{from: [{{{B}}}]}}]}}")],
        to(X_A, lambda s: s == "x/b"),
    ),
    (
        "allow ingress for a target",
        [policy("{podSelector: {}, policyTypes: [Ingress]}", "deny"), policy(f"{{{A}, ingress: [{{}}]}}", "allow")],
        lambda s, d, _, __: not in_x(d) or d == X_A,
    ),
    (
        "from pods in all namespaces",
        [policy(f"{{{A}, ingress: [{{from: [{{namespaceSelector: {{}}}}]}}]}}")],
        to(X_A, anybody),
    ),
    (
        "only another namespace by namespaceSelector",
        [policy(f"{{{A}, ingress: [{{from: [{{namespaceSelector: {{matchLabels: {{ns: y}}}}}}]}}]}}")],
        to(X_A, lambda s: s.startswith("y/")),
    ),
    (
        "podSelector matchExpressions",
        [
            policy(
                f"{{{A}, ingress: [{{from: [{{podSelector: "
                "{matchExpressions: [{key: pod, operator: In, values: [b]}]}}]}]}"
            )
        ],
        to(X_A, lambda s: s == "x/b"),
    ),
    (
        "namespaceSelector matchExpressions",
        [
            policy(
                f"{{{A}, ingress: [{{from: [{{namespaceSelector: "
                "{matchExpressions: [{key: ns, operator: NotIn, values: [x, z]}]}}]}]}"
            )
        ],
        to(X_A, lambda s: s.startswith("y/")),
    ),
    (
        "pod or namespace",
        [policy(f"{{{A}, ingress: [{{from: [{{{B}}}, {{namespaceSelector: {{matchLabels: {{ns: y}}}}}}]}}]}}")],
        to(X_A, lambda s: s == "x/b" or s.startswith("y/")),
    ),
    (
        "pod and namespace",
        [policy(f"{{{A}, ingress: [{{from: [{{{B}, namespaceSelector: {{matchLabels: {{ns: y}}}}}}]}}]}}")],
        to(X_A, lambda s: s == "y/b"),
    ),
    (
        "several pod and namespace selectors",
        [
            policy(
                f"{{{A}, ingress: [{{from: [{{namespaceSelector: {{matchExpressions: "
                "[{key: ns, operator: NotIn, values: [x]}]}, podSelector: {matchExpressions: "
                "[{key: pod, operator: In, values: [b, c]}]}}]}]}"
            )
        ],
        to(X_A, lambda s: s in ("y/b", "y/c", "z/b", "z/c")),
    ),
    (
        "any podSelector",
        [policy(f"{{{A}, ingress: [{{from: [{{{B}}}, {{podSelector: {{matchLabels: {{pod: c}}}}}}]}}]}}")],
        to(X_A, lambda s: s in ("x/b", "x/c")),
    ),
    (
        "by ports",
        [policy(f"{{{A}, ingress: [{{ports: [{{port: 81}}], from: [{{namespaceSelector: {{}}}}]}}]}}")],
        to(X_A, anybody, 81),
    ),
    (
        "stacked policies that overlap",
        [
            policy(f"{{{A}, ingress: [{{ports: [{{port: 80}}], from: [{{namespaceSelector: {{}}}}]}}]}}", "80"),
            policy(
                f"{{{A}, ingress: [{{ports: [{{port: 81}}], "
                "from: [{namespaceSelector: {matchLabels: {ns: y}}}]}]}",
                "81",
            ),
        ],
        lambda s, d, p, n: d != X_A or (p == "TCP" and (n == 80 or s.startswith("y/"))),
    ),
    ("allow all", [policy("{podSelector: {}, ingress: [{}]}")], lambda *_: True),
    (
        "empty from is everybody",
        [policy("{podSelector: {}, ingress: [{from: []}]}")],
        lambda *_: True,
    ),
    (
        "named port, ingress",
        [policy(f"{{{A}, ingress: [{{ports: [{{port: serve-81-tcp}}]}}]}}")],
        to(X_A, anybody, 81),
    ),
    (
        "from a namespace on a named port",
        [
            policy(
                f"{{{A}, ingress: [{{ports: [{{port: serve-80-tcp}}], "
                "from: [{namespaceSelector: {matchLabels: {ns: y}}}]}]}"
            )
        ],
        to(X_A, lambda s: s.startswith("y/"), 80),
    ),
    (
        "egress to a named port",
        [policy(f"{{{A}, policyTypes: [Egress], egress: [{{ports: [{{port: serve-80-tcp}}]}}]}}")],
        of(X_A, anybody, 80),
    ),
    (
        "a named port of another protocol is none",
        [policy(f"{{{A}, ingress: [{{ports: [{{port: serve-81-udp}}]}}]}}")],
        to(X_A, nobody),
    ),
    (
        "named port of SCTP",
        [policy(f"{{{A}, ingress: [{{ports: [{{port: serve-81-sctp, protocol: SCTP}}]}}]}}")],
        to(X_A, anybody, 81, "SCTP"),
    ),
    (
        "deny other namespaces",
        [policy("{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}")],
        lambda s, d, _, __: not in_x(d) or in_x(s),
    ),
    (
        "deny egress by podSelector",
        [policy(f"{{{A}, policyTypes: [Egress]}}")],
        of(X_A, nobody),
    ),
    (
        "deny egress for a namespace",
        [policy("{podSelector: {}, policyTypes: [Egress]}")],
        lambda s, d, _, __: not in_x(s),
    ),
    (
        "ingress and egress together",
        [
            policy(
                f"{{{A}, policyTypes: [Ingress, Egress], ingress: [{{from: [{{{B}}}]}}], "
                "egress: [{to: [{podSelector: {matchLabels: {pod: c}}}]}]}"
            )
        ],
        lambda s, d, _, __: (d != X_A or s == "x/b") and (s != X_A or d == "x/c"),
    ),
    (
        "egress denied on the client although the server allows",
        [
            policy("{podSelector: {matchLabels: {pod: b}}, ingress: [{}]}", "server"),
            policy(f"{{{A}, policyTypes: [Egress]}}", "client"),
        ],
        of(X_A, nobody),
    ),
    (
        "egress to another namespace",
        [
            policy(
                f"{{{A}, policyTypes: [Egress], egress: [{{to: [{{namespaceSelector: {{matchLabels: {{ns: y}}}}}}]}}]}}"
            )
        ],
        of(X_A, lambda d: d.startswith("y/")),
    ),
    (
        "any port of a protocol",
        [policy(f"{{{A}, ingress: [{{ports: [{{protocol: UDP}}]}}]}}")],
        lambda s, d, p, n: d != X_A or p == "UDP",
    ),
    (
        "several ingress policies, allow-all wins",
        [
            policy(f"{{{A}, ingress: [{{from: [{{{B}}}]}}]}}", "a"),
            policy("{podSelector: {}, ingress: [{}]}", "b"),
            policy("{podSelector: {}, policyTypes: [Ingress]}", "c"),
        ],
        lambda *_: True,
    ),
    (
        "several egress policies, allow-all wins",
        [
            policy(f"{{{A}, policyTypes: [Egress], egress: [{{to: [{{{B}}}]}}]}}", "a"),
            policy("{podSelector: {}, policyTypes: [Egress], egress: [{}]}", "b"),
            policy("{podSelector: {}, policyTypes: [Egress]}", "c"),
        ],
        lambda *_: True,
    ),
    (
        "egress to a CIDR, of both families",
        [
            policy(
                f"{{{A}, policyTypes: [Egress], "
                "egress: [{to: [{ipBlock: {cidr: 10.0.2.2/32}}, {ipBlock: {cidr: 'fd00::2:2/128'}}]}]}"
            )
        ],
        of(X_A, lambda d: d == "y/b"),
    ),
    (
        "CIDR with except",
        [
            policy(
                f"{{{A}, policyTypes: [Egress], egress: [{{to: ["
                "{ipBlock: {cidr: 10.0.2.0/24, except: [10.0.2.2/32]}}, "
                "{ipBlock: {cidr: 'fd00::2:0/112', except: ['fd00::2:2/128']}}]}]}"
            )
        ],
        of(X_A, lambda d: d in ("y/a", "y/c")),
    ),
    (
        "an address in the CIDR of one and the except of another is allowed",
        [
            policy(
                f"{{{A}, policyTypes: [Egress], egress: [{{to: ["
                "{ipBlock: {cidr: 10.0.2.0/24, except: [10.0.2.2/32]}}, "
                "{ipBlock: {cidr: 'fd00::2:0/112', except: ['fd00::2:2/128']}}]}]}",
                "1",
            ),
            policy(
                f"{{{A}, policyTypes: [Egress], "
                "egress: [{to: [{ipBlock: {cidr: 10.0.2.2/32}}, {ipBlock: {cidr: 'fd00::2:2/128'}}]}]}",
                "2",
            ),
        ],
        of(X_A, lambda d: d.startswith("y/")),
    ),
    (
        "ingress and egress are controlled independently",
        [policy(f"{{{A}, policyTypes: [Ingress]}}")],
        to(X_A, nobody),
    ),
    (
        "a rule of SCTP opens no TCP",
        [policy(f"{{{A}, ingress: [{{ports: [{{port: 80, protocol: SCTP}}]}}]}}")],
        to(X_A, anybody, 80, "SCTP"),
    ),
    (
        "a rule of UDP opens no TCP",
        [policy(f"{{{A}, ingress: [{{ports: [{{port: 80, protocol: UDP}}]}}]}}")],
        to(X_A, anybody, 80, "UDP"),
    ),
    (
        "the name label of namespaces, matchLabels",
        [
            policy(
                f"{{{A}, ingress: [{{from: [{{namespaceSelector: "
                "{matchLabels: {kubernetes.io/metadata.name: y}}}]}]}"
            )
        ],
        to(X_A, lambda s: s.startswith("y/")),
    ),
    (
        "the name label of namespaces, matchExpressions",
        [
            policy(
                f"{{{A}, ingress: [{{from: [{{namespaceSelector: "
                "{matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: [y, z]}]}}]}]}"
            )
        ],
        to(X_A, lambda s: s[0] in "yz"),
    ),
    (
        "endPort",
        [policy(f"{{{A}, ingress: [{{ports: [{{port: 79, endPort: 80}}]}}]}}")],
        to(X_A, anybody, 80),
    ),
    (
        "endPort is the last port of the range",
        [policy(f"{{{A}, ingress: [{{ports: [{{port: 81, endPort: 90}}]}}]}}")],
        to(X_A, anybody, 81),
    ),
    (
        "policyTypes default: rules of egress isolate both ways",
        [policy(f"{{{A}, egress: [{{to: [{{{B}}}]}}]}}")],
        lambda s, d, _, __: d != X_A and (s != X_A or d == "x/b"),
    ),
    (
        "policyTypes default: an empty list of egress rules is none",
        [policy(f"{{{A}, egress: []}}")],
        to(X_A, nobody),
    ),
    (
        "policyTypes without Egress: its rules do nothing",
        [policy(f"{{{A}, policyTypes: [Ingress], ingress: [{{}}], egress: [{{to: [{{{B}}}]}}]}}")],
        lambda *_: True,
    ),
    (
        "a policy of a namespace without such pods",
        [policy("{podSelector: {matchLabels: {pod: nobody}}, policyTypes: [Ingress, Egress]}")],
        lambda *_: True,
    ),
    (
        "DoesNotExist and Exists",
        [
            policy(
                "{podSelector: {matchExpressions: [{key: pod, operator: Exists}, "
                "{key: pod, operator: In, values: [a]}]}, "
                "ingress: [{from: [{podSelector: {matchExpressions: [{key: pod, operator: DoesNotExist}]}}]}]}"
            )
        ],
        to(X_A, nobody),
    ),
]
