"""Label selectors: which labels they select, and what is missing where they do not.

As of Kubernetes (apimachinery, pkg/labels): all of a selector must hold, an empty one selects everything; NotIn and
DoesNotExist hold where the key is absent. An operator that is none of the four holds nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from waggle.model.policy_objects import NAMESPACE_NAME_LABEL, LabelSelector, LabelSelectorRequirement, Namespace


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether `labels` have all that a selector asks for."""
    return selector.match_labels.items() <= labels.items() and all(
        holds(requirement, labels) for requirement in selector.match_expressions
    )


def holds(requirement: LabelSelectorRequirement, labels: Mapping[str, str]) -> bool:
    """Whether `labels` meet one expression of a selector."""
    value = labels.get(requirement.key)
    match requirement.operator:
        case "In":
            return value in requirement.values
        case "NotIn":
            return value not in requirement.values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    return False


def namespace_labels(name: str, namespace: Namespace | None) -> dict[str, str]:
    """The labels of a namespace. The one with its name is there whoever made the object, and also without one."""
    labels = (namespace.metadata.labels or {}) if namespace else {}
    return {**labels, NAMESPACE_NAME_LABEL: name}


def requirements(selector: LabelSelector) -> list[LabelSelectorRequirement]:
    """A selector as a list of which all must hold: a label that must match is one of a single value."""
    exact = [LabelSelectorRequirement(key, "In", [value]) for key, value in selector.match_labels.items()]
    return [*exact, *selector.match_expressions]


def unmet(selector: LabelSelector, labels: Mapping[str, str]) -> list[LabelSelectorRequirement]:
    """What a selector asks for and `labels` do not have."""
    return [requirement for requirement in requirements(selector) if not holds(requirement, labels)]


def requirement_text(requirement: LabelSelectorRequirement) -> str:
    """One requirement as kubectl writes it: app=web, tier in (a,b), !legacy."""
    values = ",".join(requirement.values)
    match requirement.operator:
        case "In":
            return f"{requirement.key}={values}" if len(requirement.values) == 1 else f"{requirement.key} in ({values})"
        case "NotIn":
            alone = len(requirement.values) == 1
            return f"{requirement.key}!={values}" if alone else f"{requirement.key} notin ({values})"
        case "Exists":
            return requirement.key
        case "DoesNotExist":
            return f"!{requirement.key}"
    return f"{requirement.key} {requirement.operator} ({values})"


def selector_text(selector: LabelSelector) -> str:
    """A selector as kubectl writes it; "" for one that selects everything."""
    return ",".join(map(requirement_text, requirements(selector)))
