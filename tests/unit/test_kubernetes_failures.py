"""An API that is away, slow, talks nonsense or refuses: what the source says, and that it goes on."""

from __future__ import annotations

import asyncio
import gc
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from kubernetes_bench import PATIENT, QUICK, free_port, running, running_api, write_kubeconfig, written_kubeconfig  # noqa: F401  (fixtures)
from standin_apiserver import (
    NODES,
    SERVICE_CIDRS,
    SERVICES,
    SLICES,
    StandInApi,
    answers,
    answers_text,
    breaks_in_the_body,
    hangs_up,
    says_nothing,
    sends_garbage,
    service,
    service_cidr,
    stalls_after_head,
    status,
    until,
)

from waggle.model.objects import ObjectKey
from waggle.sources.apiserver import ApiServer, Limits
from waggle.sources.informer import Backoff, Timing

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
        assert [informer.lists for informer in bench.source.informers] == [1] * 7


async def test_one_answer_wakes_all_that_wait_for_the_api(tmp_path: Path) -> None:
    """Backoffs grow long while the API is away; the first informer to reach it ends the wait of the others."""
    api = StandInApi()
    api.port = free_port()
    kubeconfig = write_kubeconfig(tmp_path, api.url)
    async with running(kubeconfig, api) as bench:
        for informer in (bench.services, bench.slices, bench.service_cidrs):
            informer._backoff = Backoff(60.0, 60.0)
        await until(lambda: len(bench.source.problems()) == 1)  # all failed once
        try:
            await api.start()
            await bench.settled()
        finally:
            await api.stop()


@pytest.mark.parametrize("code", [401, 403])
async def test_an_api_that_is_back_but_refuses_at_first_is_asked_again_soon(tmp_path: Path, code: int) -> None:
    """An apiserver answers before it has read its RBAC rules: that must not cost the backoff of the outage before."""
    api = StandInApi()
    api.port = free_port()
    kubeconfig = write_kubeconfig(tmp_path, api.url)
    async with running(kubeconfig, api) as bench:
        bench.services._backoff = Backoff(0.01, 60.0)
        await until(lambda: len(bench.source.problems()) == 1)
        bench.services._backoff._next = 60.0  # as after a long time away
        api.fault(SERVICES, answers(code, "not yet"), answers(code, "not yet"))
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
    slow = fault in (says_nothing, stalls_after_head)  # for the others, a busy machine must not be slow as well
    limits = Limits(connect=1, head=0.1, read=0.1, whole=0.5) if slow else PATIENT
    async with running(kubeconfig, api, limits=limits) as bench:
        async with asyncio.timeout(10):
            while not bench.source.synced.is_set():
                heard.update(problem.reason for problem in bench.source.problems())
                await asyncio.sleep(0.001)
        assert any(words in reason for reason in heard), heard
        assert bench.key("web") in bench.store.services
        await bench.settled()
        await until(lambda: not bench.source.problems())


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


async def test_a_half_open_watch_is_given_up(
    api: StandInApi, kubeconfig: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The peer accepted the watch, and is silent: after `idle` the connection counts as dead. That is no news: an API
    server sends nothing at all of resources that have not changed since it started."""
    caplog.set_level("INFO")
    timing = Timing(chunk=3, watch_least=20, watch_most=30, idle=0.1, backoff_least=0.005, healthy=0.05)
    async with running(kubeconfig, api, timing=timing) as bench:
        async with asyncio.timeout(5):
            await bench.source.synced.wait()
        await until(lambda: bench.services.watches >= 3)
        api.put(SERVICES, service("web"))
        await until(lambda: bench.key("web") in bench.store.services)
        assert bench.services.lists == 1
        assert not bench.source.problems()
    assert "listed 0 services" in caplog.text
    assert "broke" not in caplog.text


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


async def test_an_api_without_service_ranges_is_no_problem(api: StandInApi, kubeconfig: Path) -> None:
    """ServiceCIDR came with Kubernetes 1.33: neither the other objects nor anybody else wait for it."""
    api.put(SERVICES, service("web"))
    api.without(SERVICE_CIDRS)
    timing = replace(QUICK, absent=0.1)
    async with running(kubeconfig, api, timing) as bench:
        async with asyncio.timeout(5):
            await bench.source.synced.wait()
        assert bench.key("web") in bench.store.services
        await until(lambda: len(api.queries(SERVICE_CIDRS)) > 2)
        assert bench.source.problems() == []
        api.with_again(SERVICE_CIDRS)
        api.put(SERVICE_CIDRS, service_cidr("kubernetes", "10.96.0.0/16"))
        await until(lambda: ObjectKey("", "kubernetes") in bench.store.service_cidrs)


async def test_service_ranges_that_are_refused_hold_up_nothing(api: StandInApi, kubeconfig: Path) -> None:
    async def forbidden(_request: web.Request) -> web.StreamResponse:
        return status(403, "servicecidrs is forbidden")

    api.fault(SERVICE_CIDRS, *[forbidden] * 50)
    async with running(kubeconfig, api) as bench:
        async with asyncio.timeout(5):
            await bench.source.synced.wait()
        await until(lambda: 'resources: ["servicecidrs"]' in bench.reasons())
