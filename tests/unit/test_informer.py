"""List and watch against a stand-in API that fails in every way an API can."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from standin_apiserver import (
    NODES,
    SERVICES,
    SLICES,
    StandInApi,
    answers,
    answers_text,
    breaks_in_the_body,
    endpoint_slice,
    event_line,
    hangs_up,
    node,
    says_nothing,
    sends_garbage,
    service,
    stalls_after_head,
    status,
    until,
)

from waggle.model.objects import ObjectKey
from waggle.sources.apiserver import ApiServer, Limits
from waggle.sources.informer import Backoff, Timing
from waggle.sources.kubernetes import KubernetesSource
from waggle.store.store import Store

QUICK = Timing(
    chunk=3,
    watch_least=20,
    watch_most=30,
    idle=5,
    backoff_least=0.005,
    backoff_most=0.02,
    healthy=0.05,
    retry_after_most=0.3,
)
PATIENT = Limits(connect=2, head=2, read=2, whole=4)


class Bench:
    """A running source, its store and its API."""

    def __init__(self, api: StandInApi, store: Store, source: KubernetesSource) -> None:
        self.api, self.store, self.source = api, store, source
        self.nodes, self.services, self.slices = source.informers

    def key(self, name: str) -> ObjectKey:
        return ObjectKey("default", name)

    def reasons(self) -> str:
        return "\n".join(map(str, self.source.problems()))

    async def settled(self) -> None:
        """Synced, and all three watches open."""
        async with asyncio.timeout(5):
            await self.source.synced.wait()
        await until(lambda: all(self.api.watching(path) for path in (NODES, SERVICES, SLICES)))


def write_kubeconfig(directory: Path, server: str, user: dict | None = None, cluster: dict | None = None) -> Path:
    path = directory / "kubeconfig"
    document = {
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": "test", "user": user or {}}],
    }
    path.write_text(json.dumps(document))
    return path


@asynccontextmanager
async def running(
    kubeconfig: Path, api: StandInApi, timing: Timing = QUICK, limits: Limits = PATIENT
) -> AsyncIterator[Bench]:
    store = Store()
    source = KubernetesSource(store, kubeconfig, timing=timing, limits=limits)
    task = asyncio.create_task(source.run())
    try:
        yield Bench(api, store, source)
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gc.unfreeze()


@pytest.fixture
async def api() -> AsyncIterator[StandInApi]:
    async with StandInApi() as server:
        yield server


@pytest.fixture
def kubeconfig(tmp_path: Path, api: StandInApi) -> Path:
    return write_kubeconfig(tmp_path, api.url)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


# -- an API that is away, slow, or talks nonsense --------------------------------------------------------------------


async def test_away_at_start_then_there(tmp_path: Path) -> None:
    api = StandInApi()
    api.port = free_port()
    api.put(SERVICES, service("web"))
    kubeconfig = write_kubeconfig(tmp_path, api.url)
    async with running(kubeconfig, api) as bench:
        await until(lambda: len(bench.source.problems()) == 1)
        [problem] = bench.source.problems()
        assert problem.subject == "Kubernetes API"
        assert problem.reason == f"cannot connect to {api.url}: connection refused"
        await asyncio.sleep(0.05)  # several attempts later it is still the same problem
        assert bench.source.problems()[0].since == problem.since
        assert not bench.source.synced.is_set()
        try:
            await api.start()
            await bench.settled()
            assert not bench.source.problems()
            assert bench.key("web") in bench.store.services
        finally:
            await api.stop()


async def test_a_restart_of_the_api_keeps_everything(api: StandInApi, kubeconfig: Path) -> None:
    api.put(SERVICES, service("web"))
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        await api.stop()
        await until(lambda: "connection refused" in bench.reasons())
        assert bench.key("web") in bench.store.services
        assert bench.source.synced.is_set()
        api.put(SERVICES, service("new"))
        await api.start()
        await until(lambda: bench.key("new") in bench.store.services)
        await until(lambda: not bench.source.problems())
        assert [informer.lists for informer in bench.source.informers] == [1, 1, 1]


async def test_one_answer_wakes_all_that_wait_for_the_api(tmp_path: Path) -> None:
    """Backoffs grow long while the API is away; the first informer to reach it ends the wait of the others."""
    api = StandInApi()
    api.port = free_port()
    kubeconfig = write_kubeconfig(tmp_path, api.url)
    async with running(kubeconfig, api) as bench:
        for informer in (bench.services, bench.slices):
            informer._backoff = Backoff(60.0, 60.0)
        await until(lambda: len(bench.source.problems()) == 1)  # all three failed once
        try:
            await api.start()
            await bench.settled()
        finally:
            await api.stop()


@pytest.mark.parametrize(
    "fault, words",
    [
        (hangs_up, "closed the connection without an answer"),
        (breaks_in_the_body, "broke in the middle of an answer"),
        (sends_garbage, "does not speak HTTP as it should"),
        (says_nothing, "did not answer within 0.1 s"),
        (stalls_after_head, "stopped sending"),
        (answers_text("<html>hello</html>"), "is not JSON"),
        (answers_text("[1, 2, 3]"), "is not a list"),
        (answers_text('{"metadata": {}, "items": []}'), "no metadata.resourceVersion"),
        (answers_text("upstream connect error", 503), "(503: upstream connect error)"),
        (answers(500, "etcd is unwell"), "(500: etcd is unwell)"),
        (answers(404, "page not found"), "does not know /api/v1/services"),
        (answers(302, "moved", {"Location": "https://login.example/"}), "redirects to https://login.example/"),
    ],
)
async def test_a_failing_list_is_told_and_tried_again(api: StandInApi, kubeconfig: Path, fault, words: str) -> None:
    api.put(SERVICES, service("web"))
    api.fault(SERVICES, *[fault] * 3)
    heard: set[str] = set()
    async with running(kubeconfig, api, limits=Limits(connect=1, head=0.1, read=0.1, whole=0.5)) as bench:
        async with asyncio.timeout(5):
            while not bench.source.synced.is_set():
                heard.update(problem.reason for problem in bench.source.problems())
                await asyncio.sleep(0.001)
        assert any(words in reason for reason in heard), heard
        assert bench.key("web") in bench.store.services
        await bench.settled()
        assert not bench.source.problems()


@pytest.mark.parametrize("garbage", [b"\x00\xff\xfe\n", b'{"type":\n', b"hello\n", b'{"type":"DANCE","object":{}}\n'])
async def test_garbage_in_a_watch_loses_nothing(api: StandInApi, kubeconfig: Path, garbage: bytes) -> None:
    api.put(SERVICES, service("web"))
    async with running(kubeconfig, api, timing=QUICK) as bench:
        await bench.settled()
        api.send(SERVICES, garbage)
        await until(lambda: bench.services.watches == 2)
        api.put(SERVICES, service("later"))
        await until(lambda: bench.key("later") in bench.store.services)
        assert bench.key("web") in bench.store.services
        assert bench.services.lists == 1
        await until(lambda: not bench.source.problems())


async def test_a_watch_that_always_breaks_is_a_problem(api: StandInApi, kubeconfig: Path) -> None:
    async with running(kubeconfig, api, timing=QUICK) as bench:
        await bench.settled()
        watches = api._watch

        async def nonsense(request, path, query):
            if path != SERVICES:
                return await watches(request, path, query)
            return await answers_text("nonsense\n")(request)

        api._watch = nonsense
        api.break_watches(SERVICES)
        await until(lambda: "not JSON" in bench.reasons())
        api._watch = watches
        await until(lambda: api.watching(SERVICES))
        api.bookmark(SERVICES)
        await until(lambda: not bench.source.problems())


async def test_a_half_open_watch_is_given_up(api: StandInApi, kubeconfig: Path) -> None:
    """The peer accepted the watch, and is silent: after `idle` the connection counts as dead."""
    timing = Timing(chunk=3, watch_least=20, watch_most=30, idle=0.1, backoff_least=0.005, healthy=0.05)
    async with running(kubeconfig, api, timing=timing) as bench:
        async with asyncio.timeout(5):
            await bench.source.synced.wait()
        await until(lambda: bench.services.watches >= 3)
        api.put(SERVICES, service("web"))
        await until(lambda: bench.key("web") in bench.store.services)
        assert bench.services.lists == 1
        assert not bench.source.problems()


async def test_a_watch_the_server_does_not_end_is_ended(api: StandInApi, kubeconfig: Path) -> None:
    timing = Timing(watch_least=0.1, watch_most=0.1, idle=0.2, backoff_least=0.005, healthy=0.05)
    async with running(kubeconfig, api, timing=timing) as bench:
        async with asyncio.timeout(5):
            await bench.source.synced.wait()

        async def chatter() -> None:
            while True:
                api.bookmark(SERVICES)
                await asyncio.sleep(0.02)

        task = asyncio.create_task(chatter())
        try:
            await until(lambda: bench.services.watches >= 2)
        finally:
            task.cancel()
        assert bench.services.lists == 1


async def test_sockets_find_dead_peers(api: StandInApi, kubeconfig: Path) -> None:
    server = ApiServer(kubeconfig)
    made = server._make_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1)))
    with made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        probes = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        interval = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        assert idle + probes * interval <= 30
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


# -- refusals -------------------------------------------------------------------------------------------------------


async def test_retry_after_is_honoured(api: StandInApi, kubeconfig: Path) -> None:
    clock = asyncio.get_running_loop().time
    asked: list[float] = []

    async def busy(request):
        asked.append(clock())
        return status(429, "too many requests", headers={"Retry-After": "1"})  # capped to 0.3 s by retry_after_most

    async def note(request):
        asked.append(clock())
        return api._list(SERVICES, dict(request.query))

    api.fault(SERVICES, busy, busy, note)
    async with running(kubeconfig, api) as bench:
        await until(lambda: "overloaded and asks to wait (429" in bench.reasons())
        await bench.settled()
        assert asked[1] - asked[0] >= 0.29
        assert asked[2] - asked[1] >= 0.29


async def test_forbidden_names_the_missing_rule(api: StandInApi, kubeconfig: Path) -> None:
    text = 'endpointslices.discovery.k8s.io is forbidden: User "waggle" cannot list resource "endpointslices"'
    api.fault(SLICES, *[answers(403, text)] * 4)
    async with running(kubeconfig, api) as bench:
        await until(lambda: bench.source.problems())
        [problem] = bench.source.problems()
        assert problem.subject == "Kubernetes endpointslices"
        rule = 'apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], verbs: ["list", "watch"]'
        assert rule in problem.reason
        assert text in problem.reason
        assert bench.services.synced.is_set() or await bench.services.synced.wait()
        assert not bench.source.synced.is_set()
        await bench.settled()
        assert not bench.source.problems()


async def test_unauthorized_then_the_token_file_is_rotated(api: StandInApi, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("stale\n")
    kubeconfig = write_kubeconfig(tmp_path, api.url, {"tokenFile": "token"})
    api.token = "fresh"
    async with running(kubeconfig, api) as bench:
        await until(lambda: "does not accept the credentials" in bench.reasons())
        assert len(bench.source.problems()) == 1
        token.write_text("fresh\n")
        await bench.settled()
        assert not bench.source.problems()
        token.write_text("fresher\n")
        api.token = "fresher"
        api.put(SERVICES, service("web"))
        api.end_watches(SERVICES)
        await until(lambda: bench.services.watches == 2)
        assert bench.services.lists == 1


async def test_the_kubeconfig_may_come_later_and_change(api: StandInApi, tmp_path: Path) -> None:
    api.put(SERVICES, service("web"))
    async with running(tmp_path / "kubeconfig", api) as bench:
        await until(lambda: bench.source.problems())
        assert f"cannot read {tmp_path / 'kubeconfig'}: No such file" in bench.reasons()
        write_kubeconfig(tmp_path, api.url)
        await bench.settled()
        async with StandInApi() as other:
            other.put(SERVICES, service("elsewhere"))
            write_kubeconfig(tmp_path, other.url)
            for path in (NODES, SERVICES, SLICES):
                api.end_watches(path)  # in order: only the kubeconfig tells that this is another cluster
            await until(lambda: bench.key("elsewhere") in bench.store.services)
            assert bench.key("web") not in bench.store.services
            assert all("watch" not in query for query in other.queries(SERVICES)[:1])
            (tmp_path / "kubeconfig").write_text("{half a")
            other.break_watches()
            other.put(SERVICES, service("more"))
            await until(lambda: bench.key("more") in bench.store.services)


# -- the collector, and pauses ---------------------------------------------------------------------------------------


async def test_the_collector_is_off_during_lists_and_frozen_after(api: StandInApi, kubeconfig: Path) -> None:
    enabled: list[bool] = []

    async def look(request):
        enabled.append(gc.isenabled())
        return api._list(SERVICES, dict(request.query))

    api.put(SERVICES, service("web"))
    api.fault(SERVICES, look)
    before = gc.get_freeze_count()
    async with running(kubeconfig, api) as bench:
        await bench.settled()
        assert enabled == [False]
        assert gc.isenabled()
        assert gc.get_freeze_count() > before


def test_backoff_grows_to_its_limit_and_varies() -> None:
    backoff = Backoff(1.0, 8.0)
    delays = [backoff.delay() for _ in range(200)]
    for delay, most in zip(delays, [1, 2, 4, 8, 8, 8], strict=False):
        assert most / 2 <= delay <= most
    assert len(set(delays)) > 100
    backoff.reset()
    assert backoff.delay() <= 1.0
