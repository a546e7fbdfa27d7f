"""What DNS answers told pods whose policies accept names: rows for people, and what the model is asked about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from waggle.abi.learned_names import Learned, is_cut
from waggle.model.interface import PodInterface
from waggle.model.policy import name_matches


def name_rows(
    found: Iterable[Learned], pods: Iterable[PodInterface], patterns: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """A row for each pod, address and pattern in use (`patterns`, with their ids), those that end first in front."""
    texts = {number: pattern for pattern, number in patterns.items()}
    by_interface = {pod.host_ifindex: pod for pod in pods}
    rows = []
    for one in found:
        pod = by_interface.get(one.ifindex)
        if pod is None:
            continue  # it is gone: nobody can use what it was told
        for number, seconds in one.patterns.items():
            if number in texts:
                rows.append(
                    {
                        "namespace": pod.namespace,
                        "pod": pod.name or pod.host_ifname,
                        "address": one.address,
                        "name": one.name,
                        "cut": is_cut(one.name),
                        "pattern": texts[number],
                        "seconds": seconds,
                    }
                )
    yield from sorted(rows, key=lambda row: (row["namespace"], row["pod"], row["seconds"], row["address"]))


def told(
    found: Iterable[Learned], pods: Iterable[PodInterface], patterns: Mapping[str, int]
) -> dict[str, dict[str, Sequence[str]]]:
    """`PolicyWorld.told`. An address is called by the patterns that it is known to be of, and by the name that was
    asked for last, as long as that is in force with all of its patterns."""
    texts = {number: pattern for pattern, number in patterns.items()}
    by_interface = {pod.host_ifindex: pod for pod in pods}
    known: dict[str, dict[str, Sequence[str]]] = {}
    for one in found:
        pod = by_interface.get(one.ifindex)
        names = [texts[number] for number in one.patterns if number in texts]
        if pod is None or not names:
            continue
        of = [pattern for pattern in patterns if name_matches(pattern, one.name)]
        if not is_cut(one.name) and all(pattern in names for pattern in of):
            names.insert(0, one.name)
        for address in map(str, pod.addresses):
            known.setdefault(address, {})[one.address] = names
    return known
