"""The words for what the programs report by number."""

from __future__ import annotations

from waggle.abi._generated import Direction, Hook, Outcome, Reason

#: what a reason means, for people; the names are those of enum wag_reason
REASONS = {
    Reason.MALFORMED: "IP or transport header cut short or impossible",
    Reason.NO_BACKEND: "the Service has no usable endpoint",
    Reason.FRAGMENT: "a later fragment to a Service whose first one was not translated here",
    Reason.NAT_PORTS: "no free source port for SNAT",
    Reason.NAT_FULL: "the NAT table took no entry: raise max-nat",
    Reason.REWRITE: "the packet could not be rewritten",
    Reason.NO_NODE_IP: "SNAT needed, but this node has no address of the family: set node-ip",
    Reason.STALE_BACKEND: "the backend record is missing: the tables are inconsistent",
    Reason.NO_LOCAL_BACKEND: "traffic policy Local: the usable endpoints are on other nodes",
    Reason.SOURCE_RANGE: "the client is in none of the Service's loadBalancerSourceRanges",
    Reason.NO_PORT: "the address is a Service's, but no Service defines this port there",
    Reason.FREE_ADDRESS: "an address of a Service range that no Service has",
    Reason.TOO_BIG: "translated, it does not fit the way to the backend; the sender was told",
    Reason.NO_ROUTE: "no route to the backend's node",
    Reason.EXPIRED: "translated, and its time to live is over; the sender was told",
    Reason.POLICY_INGRESS: "policies of the pod that it is for do not let it in",
    Reason.POLICY_EGRESS: "policies of the pod that sends it do not let it out",
    Reason.POLICY_PENDING: "which policies the pod has is not known yet",
    Reason.NODE_POLICY_INGRESS: "policies of the node do not let it in",
    Reason.NODE_POLICY_EGRESS: "policies of the node do not let it out",
    Reason.SPOOFED: "a pod sends it with an address that is not its own",
}
#: those that the sender is told of at once
REJECTING = frozenset((Reason.NO_BACKEND, Reason.NO_PORT, Reason.TOO_BIG, Reason.EXPIRED, Reason.NO_ROUTE))
VERDICTS = tuple(outcome.name.lower() for outcome in Outcome)


def reason_name(number: int) -> str:
    """ "no_backend" for 2: the label used in metrics and JSON."""
    try:
        return Reason(number).name.lower()
    except ValueError:
        return f"unknown_{number}"


def all_reasons() -> list[str]:
    """Every drop reason there is, for documentation and for metrics that start at zero."""
    return [r.name.lower() for r in Reason if r not in (Reason.NONE, Reason.MAX)]


def explain(number: int) -> str:
    """What a reason means, "" for one of another version."""
    try:
        return REASONS.get(Reason(number), "")
    except ValueError:
        return ""


def hook_name(number: int) -> str:
    """ "pod_egress" for 1."""
    try:
        return Hook(number).name.lower()
    except ValueError:
        return f"unknown_{number}"


def hook_direction(hook: str) -> str:
    """ "egress" of what pods and processes of the node send, "ingress" of what comes to them."""
    return "egress" if hook in ("socket", "pod_egress", "node_egress") else "ingress"


def verdict_name(number: int) -> str:
    """ "forwarded" for 1."""
    try:
        return Outcome(number).name.lower()
    except ValueError:
        return f"unknown_{number}"


def direction_name(number: int) -> str:
    """ "ingress" for 1, "" for none."""
    return {Direction.INGRESS: "ingress", Direction.EGRESS: "egress"}.get(Direction(number), "") if number < 3 else ""
