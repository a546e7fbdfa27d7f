"""What lists and watches put into the store, also across disconnects, 410 Gone and restored histories."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kubernetes_bench import QUICK, running, running_api, written_kubeconfig  # noqa: F401  (fixtures)
from standin_apiserver import (
    NODES,
    SERVICES,
    SLICES,
    StandInApi,
    answers,
    endpoint_slice,
    event_line,
    node,
    service,
    until,
)

from waggle.model.objects import ObjectKey
from waggle.sources.informer import Backoff

# -- what reaches the store -----------------------------------------------------------------------------------------


async def test_lists_in_chunks_then_watches(api: StandInApi, kubeconfig: Path) -> None:
    for number in range(8):
        api.put(SERVICES, service(f"s{number}", f"10.96.0.{number}"))
    api.put(SLICES, endpoint_slice("s1-abc", ["10.1.0.1", "10.1.0.2"], of="s1"))
    api.put(NODES, node("node1"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        assert sorted(key.name for key in bench.store.services) == [f"s{n}" for n in range(8)]
        assert [("continue" in q, q["limit"]) for q in api.queries(SERVICES, watch=False)] == [
            (False, "3"),
            (True, "3"),
            (True, "3"),
        ]
        assert list(bench.store.slices_of[bench.key("s1")]) == [bench.key("s1-abc")]
        assert bench.store.nodes[ObjectKey("", "node1")].spec.pod_cidrs == ["10.244.1.0/24"]
        [watch] = api.queries(SERVICES, watch=True)
        assert watch["resourceVersion"] == str(api.version)
        assert watch["allowWatchBookmarks"] == "true"
        assert QUICK.watch_least <= int(watch["timeoutSeconds"]) <= QUICK.watch_most

        api.put(SERVICES, service("new", "10.96.1.1"))
        api.put(SERVICES, service("s1", "10.96.0.1", port=81))
        api.delete(SERVICES, "default", "s2")
        await until(lambda: bench.key("s2") not in bench.store.services)
        assert bench.store.services[bench.key("new")].spec.cluster_ip == "10.96.1.1"
        assert bench.store.services[bench.key("s1")].spec.ports[0].port == 81
        assert not bench.source.problems()


async def test_asks_only_for_what_kube_proxy_would_serve(api: StandInApi, kubeconfig: Path) -> None:
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        for query in api.queries(SERVICES):
            assert query["labelSelector"] == "!service.kubernetes.io/service-proxy-name"
            assert query["fieldSelector"] == "spec.clusterIP!=None"
        for query in api.queries(SLICES):
            assert query["labelSelector"].split(",") == [
                "!service.kubernetes.io/headless",
                "!service.kubernetes.io/service-proxy-name",
            ]


async def test_keeps_in_memory_only_what_the_plan_reads(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("web"))
    api.put(SLICES, endpoint_slice("web-1", ["10.1.0.1", "10.1.0.2"], of="web"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        api.put(SLICES, endpoint_slice("web-2", ["10.1.0.3"], of="web"))
        await until(lambda: bench.key("web-2") in bench.store.slices)
        meta = bench.store.services[bench.key("web")].metadata
        assert (meta.annotations, meta.labels, meta.resource_version) == (None, None, "")
        first, second = bench.store.slices[bench.key("web-1")], bench.store.slices[bench.key("web-2")]
        assert first.metadata.labels == {"kubernetes.io/service-name": "web"}
        endpoints = [*first.endpoints, *second.endpoints]
        assert len({id(endpoint.node_name) for endpoint in endpoints}) == 1
        assert len({id(endpoint.zone) for endpoint in endpoints}) == 1
        assert len({id(endpoint.conditions) for endpoint in endpoints}) == 1
        assert first.ports[0] is second.ports[0]
        assert first.metadata.namespace is meta.namespace


async def test_a_new_version_that_says_the_same_is_no_change(api: StandInApi, kubeconfig: Path) -> None:
    api.put(NODES, node("node1"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        bench.store.take_changes()
        api.put(NODES, node("node1"))  # a heartbeat
        api.put(NODES, node("node2"))
        await until(lambda: ObjectKey("", "node2") in bench.store.nodes)
        assert bench.store.take_changes().nodes == {ObjectKey("", "node2")}


async def test_an_object_that_does_not_fit_is_refused_alone(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("good"))
    api.put(SERVICES, service("bad"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        broken = service("bad")
        broken["spec"]["ports"] = [{"port": "eighty"}]
        api.put(SERVICES, broken)  # as an event
        await until(lambda: "Service default/bad" in bench.reasons())
        assert "$.object.spec.ports[0].port" in bench.reasons()
        assert bench.store.services[bench.key("bad")].spec.ports[0].port == 80
        api.put_silently(SERVICES, broken)  # and in a list
        api.break_watches(SERVICES)
        await until(lambda: bench.services.lists == 2)
        assert "Service default/bad" in bench.reasons()
        assert bench.store.services[bench.key("bad")].spec.ports[0].port == 80
        assert bench.key("good") in bench.store.services
        await until(lambda: api.watching(SERVICES))
        api.put(SERVICES, service("bad", port=90))
        await until(lambda: bench.store.services[bench.key("bad")].spec.ports[0].port == 90)
        assert not bench.source.problems()
        api.put(SERVICES, broken)
        api.delete(SERVICES, "default", "bad")
        await until(lambda: bench.key("bad") not in bench.store.services)
        assert not bench.source.problems()


# -- resuming -------------------------------------------------------------------------------------------------------


async def test_resumes_from_the_last_version_without_a_list(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("web"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        api.put(SERVICES, service("second"))
        await until(lambda: bench.key("second") in bench.store.services)
        reached = api.version
        api.break_watches(SERVICES)
        api.put(SERVICES, service("while-away"))
        await until(lambda: bench.key("while-away") in bench.store.services)
        assert api.queries(SERVICES, watch=True)[-1]["resourceVersion"] == str(reached)
        assert bench.services.lists == 1


async def test_an_orderly_end_resumes_at_once(api: StandInApi, kubeconfig: Path) -> None:
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        api.put(SLICES, endpoint_slice("other", []))  # versions grow without an event here
        api.bookmark(SERVICES)
        await until(lambda: bench.services.events == 1)
        api.end_watches(SERVICES)
        await until(lambda: bench.services.watches == 2)
        assert api.queries(SERVICES, watch=True)[-1]["resourceVersion"] == str(api.version)
        assert bench.services.lists == 1
        assert len(api.queries(SERVICES, watch=False)) == 1


async def test_half_an_event_is_not_applied(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("web"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        line = event_line("MODIFIED", service("web", port=9999))
        api.send(SERVICES, line[:-40])
        api.break_watches(SERVICES)
        await until(lambda: bench.services.watches == 2)
        api.send(SERVICES, line[: len(line) // 2])
        api.send(SERVICES, b"")  # the end of the answer, in order, but in the middle of the event
        api.put_silently(SERVICES, service("web", port=81))
        api.break_watches(SERVICES)
        await until(lambda: bench.store.services[bench.key("web")].spec.ports[0].port == 81)


async def test_an_event_may_come_in_many_pieces(api: StandInApi, kubeconfig: Path) -> None:
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        big = endpoint_slice("big", [f"10.9.{n // 250}.{n % 250}" for n in range(1000)])
        big["metadata"]["resourceVersion"] = "500"
        line = event_line("ADDED", big)
        for start in range(0, len(line), 4099):
            api.send(SLICES, line[start : start + 4099])
            await asyncio.sleep(0)
        await until(lambda: bench.key("big") in bench.store.slices)
        assert len(bench.store.slices[bench.key("big")].endpoints) == 1000
        assert bench.slices.events == 1


# -- 410 Gone -------------------------------------------------------------------------------------------------------


async def test_gone_as_an_event_lists_again_and_replaces(api: StandInApi, kubeconfig: Path) -> None:
    for name in ("stays", "goes", "changes"):
        api.put(SERVICES, service(name))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        stays = bench.store.services[bench.key("stays")]
        await asyncio.sleep(QUICK.healthy)  # a watch that lasted and then breaks is no problem
        api.delete_silently(SERVICES, "default", "goes")
        api.put_silently(SERVICES, service("changes", port=82))
        api.put_silently(SERVICES, service("comes"))
        api.break_watches(SERVICES)
        await until(lambda: bench.key("comes") in bench.store.services)
        assert sorted(key.name for key in bench.store.services) == ["changes", "comes", "stays"]
        assert bench.store.services[bench.key("changes")].spec.ports[0].port == 82
        assert bench.store.services[bench.key("stays")] is stays
        assert not bench.source.problems()


async def test_gone_in_the_middle_of_a_watch(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("web"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        api.send(SERVICES, event_line("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "old"}))
        await until(lambda: bench.services.lists == 2)
        await until(lambda: bench.services.watches == 2)
        assert bench.key("web") in bench.store.services


async def test_gone_after_an_outage_lists_at_once_but_not_over_and_over(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("web"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        bench.services._backoff = Backoff(60.0, 60.0)  # as if the API had been away for long
        old = event_line("ERROR", {"kind": "Status", "code": 410, "message": "old"})
        api.send(SERVICES, event_line("BOOKMARK", {"metadata": {"resourceVersion": str(api.version)}}) + old)
        await until(lambda: bench.services.lists == 2)  # not in a minute
        await until(lambda: api.watching(SERVICES))
        api.send(SERVICES, old)  # again, before the new list led to anything
        await until(lambda: bench.services._delay > 1.0)
        assert bench.services.lists == 2


async def test_gone_as_an_http_status(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("web"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        api.break_watches(SERVICES)
        await until(lambda: bench.services.watches == 2)
        api.end_watches(SERVICES)
        api.fault(SERVICES, answers(410, "too old resource version"))
        await until(lambda: bench.services.lists == 2)


async def test_nothing_is_deleted_until_the_new_list_is_complete(api: StandInApi, kubeconfig: Path) -> None:
    for number in range(7):
        api.put(SERVICES, service(f"s{number}"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        for number in range(7):
            api.delete_silently(SERVICES, "default", f"s{number}")
        for number in range(7):
            api.put_silently(SERVICES, service(f"t{number}"))
        seen: list[set[str]] = []
        bench.store.on_change = lambda: seen.append({key.name for key in bench.store.services})

        async def first_chunk_then_failure(request):
            api.fault(SERVICES, answers(500, "etcd is unwell"))  # the second chunk
            return api._list(SERVICES, {"limit": "3"})

        api.fault(SERVICES, first_chunk_then_failure)
        api.send(SERVICES, event_line("ERROR", {"kind": "Status", "code": 410, "message": "old"}))
        await until(lambda: bench.services.lists == 2)
        assert {key.name for key in bench.store.services} == {f"t{n}" for n in range(7)}
        # the old ones were there until all new ones were
        new = {f"t{n}" for n in range(7)}
        assert all(new <= names for names in seen if not {f"s{n}" for n in range(7)} <= names)


async def test_an_expired_continue_token_starts_again_with_larger_chunks(api: StandInApi, kubeconfig: Path) -> None:
    for number in range(30):
        api.put(SERVICES, service(f"s{number:02}"))

    async def compacts_after(request):
        answer = api._list(SERVICES, dict(request.query))
        api.compact()
        return answer

    api.fault(SERVICES, compacts_after)
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        assert [q["limit"] for q in api.queries(SERVICES, watch=False)] == ["3", "3", "12", "12", "12"]
        assert len(bench.store.services) == 30
        assert bench.services.lists == 1


# -- history that goes backwards ------------------------------------------------------------------------------------


async def test_a_restored_etcd_is_noticed_after_the_restart(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("old"))
    api.put(SERVICES, service("kept"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        await api.stop()
        await until(lambda: "cannot connect" in bench.reasons())
        api.delete_silently(SERVICES, "default", "old")
        api.restore(version=40)
        api.put(SERVICES, service("restored"))
        assert bench.key("old") in bench.store.services  # nothing is lost while it is away
        await api.start()
        await until(lambda: bench.key("restored") in bench.store.services)
        assert {key.name for key in bench.store.services} == {"kept", "restored"}
        await bench.settled()
        assert not bench.source.problems()
        assert api.queries(SERVICES, watch=True)[-1]["resourceVersion"] == "41"


async def test_events_that_go_back_cause_a_list(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("web"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        api.restore(version=7)
        api.put(SERVICES, service("web", port=83))
        await until(lambda: bench.services.lists == 2)
        assert bench.store.services[bench.key("web")].spec.ports[0].port == 83
