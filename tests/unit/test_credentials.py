"""Logging in: tokens and certificates that rotate, exec plugins, and TLS against a real server on the loopback."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from standin_apiserver import SERVICES, StandInApi, service

from waggle.errors import ApiError, ConfigError
from waggle.sources.apiserver import ApiServer
from waggle.sources.credentials import Credentials
from waggle.sources.kubeconfig import Access, ExecPlugin

TLS = Path(__file__).parent / "tls"


def access(**fields) -> Access:
    return Access(**{"origin": "/etc/kube/config", "server": "https://10.0.0.1:6443", **fields})


def bearer(login) -> str | None:
    return login.headers.get("Authorization")


# -- tokens ---------------------------------------------------------------------------------------------------------


async def test_a_token_file_is_read_again(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one\n")
    credentials = Credentials(access(token_file=token, server="http://127.0.0.1"))
    assert bearer(await credentials.login()) == "Bearer one"
    token.write_text("two\n")
    assert bearer(await credentials.login()) == "Bearer two"
    token.write_text("")
    with pytest.raises(ConfigError, match=f"tokenFile {token} is empty"):
        await credentials.login()
    token.unlink()
    with pytest.raises(ConfigError, match=f"/etc/kube/config: cannot read tokenFile {token}: No such file"):
        await credentials.login()


async def test_the_written_token_serves_where_its_file_is_away(tmp_path: Path) -> None:
    credentials = Credentials(access(token="written", token_file=tmp_path / "token", server="http://127.0.0.1"))
    assert bearer(await credentials.login()) == "Bearer written"
    (tmp_path / "token").write_text("filed")
    assert bearer(await credentials.login()) == "Bearer filed"


async def test_a_token_cannot_smuggle_headers() -> None:
    with pytest.raises(ConfigError, match="characters that no token has"):
        await Credentials(access(token="a\r\nX-Remote-User: admin", server="http://127.0.0.1")).login()


# -- exec plugins ---------------------------------------------------------------------------------------------------


class Plugin:
    """A program whose output the test writes and whose runs it counts."""

    def __init__(self, directory: Path) -> None:
        self.runs = directory / "runs"
        self.output = directory / "output"
        self.script = directory / "plugin"
        self.script.write_text(
            f"#!{sys.executable} -S\nimport os, sys\n"
            f"open({str(self.runs)!r}, 'a').write(os.environ['KUBERNETES_EXEC_INFO'] + '\\n')\n"
            f"sys.stderr.write(os.environ.get('COMPLAINT', ''))\n"
            f"sys.stdout.write(open({str(self.output)!r}).read())\n"
            "sys.exit(int(os.environ.get('CODE', '0')))\n"
        )
        self.script.chmod(0o755)

    def says(self, **status) -> None:
        self.says_text(
            json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status})
        )

    def says_text(self, text: str) -> None:
        self.output.write_text(text)

    @property
    def asked(self) -> list[dict]:
        return [json.loads(line) for line in self.runs.read_text().splitlines()] if self.runs.exists() else []

    def spec(self, command: str | None = None, cluster: dict | None = None, **env: str) -> ExecPlugin:
        return ExecPlugin(
            command=command or str(self.script),
            args=(),
            env=tuple(env.items()),
            api_version="client.authentication.k8s.io/v1",
            install_hint="get it from your administrator",
            cluster=cluster,
        )


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


def expiry(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


async def test_a_plugin_runs_once_until_its_token_expires(plugin: Plugin) -> None:
    plugin.says(token="one", expirationTimestamp=expiry(3600))
    credentials = Credentials(access(exec_plugin=plugin.spec(), server="http://127.0.0.1"))
    logins = await asyncio.gather(*[credentials.login() for _ in range(5)])
    assert {bearer(login) for login in logins} == {"Bearer one"}
    assert plugin.asked == [
        {
            "apiVersion": "client.authentication.k8s.io/v1",
            "kind": "ExecCredential",
            "spec": {"interactive": False},
        }
    ]
    plugin.says(token="two", expirationTimestamp=expiry(5))
    credentials.invalidate(logins[0])
    assert bearer(await credentials.login()) == "Bearer two"
    credentials.invalidate(logins[0])  # news of an older log-in
    plugin.says(token="three")
    assert bearer(await credentials.login()) == "Bearer three"  # because two is about to expire
    assert bearer(await credentials.login()) == "Bearer three"
    assert len(plugin.asked) == 3


async def test_a_plugin_hears_about_the_cluster(plugin: Plugin) -> None:
    plugin.says(token="t")
    cluster = {"server": "https://a", "certificate-authority": str(TLS / "ca.crt")}
    await Credentials(access(exec_plugin=plugin.spec(cluster=cluster), server="http://127.0.0.1")).login()
    told = plugin.asked[0]["spec"]["cluster"]
    assert told["server"] == "https://a"
    assert told["certificate-authority-data"]
    assert "certificate-authority" not in told


async def test_a_plugin_may_hand_out_a_certificate(plugin: Plugin) -> None:
    certificate, key = (TLS / "client.crt").read_text(), (TLS / "client.key").read_text()
    plugin.says(clientCertificateData=certificate, clientKeyData=key)
    login = await Credentials(access(exec_plugin=plugin.spec())).login()
    assert isinstance(login.tls, ssl.SSLContext)
    plugin.says(clientCertificateData=certificate)
    with pytest.raises(ApiError, match="without the other"):
        await Credentials(access(exec_plugin=plugin.spec())).login()


@pytest.mark.parametrize(
    "output, words",
    [
        ("", "is no ExecCredential"),
        ("not json", "is no ExecCredential"),
        ('{"kind": "ExecCredential", "apiVersion": "v2"}', "printed 'v2 ExecCredential' instead of"),
        (
            '{"kind": "ExecCredential", "apiVersion": "client.authentication.k8s.io/v1"}',
            "printed neither status.token nor",
        ),
        (
            '{"kind": "ExecCredential", "status": {"token": ["hush"]}}',
            "Expected `str`, got `array`",
        ),
    ],
)
async def test_what_a_plugin_prints_wrongly(plugin: Plugin, output: str, words: str) -> None:
    plugin.says_text(output)
    with pytest.raises(ApiError) as caught:
        await Credentials(access(exec_plugin=plugin.spec(), server="http://127.0.0.1")).login()
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)


async def test_a_plugin_that_fails(plugin: Plugin) -> None:
    plugin.says_text("")
    failing = plugin.spec(CODE="3", COMPLAINT="session has\nexpired")
    with pytest.raises(ApiError, match="exit code 3: session has expired"):
        await Credentials(access(exec_plugin=failing)).login()
    missing = plugin.spec(command="/nonexistent/plugin")
    with pytest.raises(ConfigError, match=r"cannot be run: No such file .*\(get it from your administrator\)"):
        await Credentials(access(exec_plugin=missing)).login()


async def test_a_plugin_that_hangs_is_killed(plugin: Plugin) -> None:
    pid_file = plugin.script.with_name("pid")
    plugin.script.write_text(f"#!/bin/sh\necho $$ > {pid_file}\nexec sleep 600\n")
    credentials = Credentials(access(exec_plugin=plugin.spec()), plugin_timeout=0.3)
    with pytest.raises(ApiError, match=r"no answer within 0.3 s"):
        await credentials.login()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


# -- TLS ------------------------------------------------------------------------------------------------------------


def server_context(certificate: str = "server.crt", *, ask: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / certificate, TLS / "server.key")
    if ask:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(TLS / "ca.crt")
    return context


@pytest.fixture
async def api() -> AsyncIterator[StandInApi]:
    async with StandInApi(server_context()) as server:
        server.put(SERVICES, service("web"))
        yield server


async def ask(directory: Path, api: StandInApi, cluster: dict, user: dict | None = None) -> bytes:
    """One request as the source would make it."""
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": api.url, **cluster}}],
                "users": [{"name": "u", "user": user or {}}],
            }
        )
    )
    async with ApiServer(kubeconfig) as server:
        return await server.get(SERVICES, {"limit": "1"})


NAMED = {"tls-server-name": "apiserver.test"}


async def test_a_known_authority_and_name(tmp_path: Path, api: StandInApi) -> None:
    assert b'"web"' in await ask(tmp_path, api, {"certificate-authority": str(TLS / "ca.crt"), **NAMED})
    assert b'"web"' in await ask(tmp_path, api, {"insecure-skip-tls-verify": True})


@pytest.mark.parametrize(
    "cluster, words",
    [
        ({"certificate-authority": str(TLS / "other-ca.crt"), **NAMED}, "is not trusted: unable to get local issuer"),
        ({**NAMED}, "is not trusted: unable to get local issuer certificate; compare certificate-authority in "),
        ({"certificate-authority": str(TLS / "ca.crt")}, "set tls-server-name"),
        ({"certificate-authority": "/nonexistent/ca.crt"}, "cannot read certificate-authority /nonexistent/ca.crt"),
        ({"certificate-authority": str(TLS / "server.key")}, "certificate-authority /"),
    ],
)
async def test_an_untrusted_server_is_told_in_words(tmp_path: Path, api: StandInApi, cluster: dict, words: str) -> None:
    with pytest.raises((ApiError, ConfigError)) as caught:
        await ask(tmp_path, api, cluster)
    assert words in str(caught.value)
    assert str(tmp_path / "kubeconfig") in str(caught.value)


async def test_an_expired_certificate_is_told_in_words(tmp_path: Path) -> None:
    async with StandInApi(server_context("server-expired.crt")) as api:
        with pytest.raises(ApiError, match="certificate has expired; renew it, and compare the clocks"):
            await ask(tmp_path, api, {"certificate-authority": str(TLS / "ca.crt"), **NAMED})


async def test_client_certificates(tmp_path: Path) -> None:
    cluster = {"certificate-authority": str(TLS / "ca.crt"), **NAMED}
    async with StandInApi(server_context(ask=True)) as api:
        api.put(SERVICES, service("web"))
        user = {"client-certificate": str(TLS / "client.crt"), "client-key": str(TLS / "client.key")}
        assert b'"web"' in await ask(tmp_path, api, cluster, user)
        with pytest.raises(ApiError, match="is the client certificate missing or refused"):
            await ask(tmp_path, api, cluster)
        with pytest.raises(ConfigError, match=r"client-certificate /.* are not a usable pair"):
            await ask(tmp_path, api, cluster, {**user, "client-key": str(TLS / "server.key")})


async def test_plain_http_where_tls_is_expected_and_the_reverse(tmp_path: Path, api: StandInApi) -> None:
    async with StandInApi() as plain:
        with pytest.raises(ApiError, match=r"TLS with https://.* failed"):
            await ask(
                tmp_path, plain, {"server": plain.url.replace("http:", "https:"), "insecure-skip-tls-verify": True}
            )
    with pytest.raises(ApiError, match=r"http://127"):
        await ask(tmp_path, api, {"server": api.url.replace("https:", "http:")})


async def test_rotated_certificate_files_are_used(tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    authority.write_bytes((TLS / "other-ca.crt").read_bytes())
    credentials = Credentials(access(certificate_authority=authority))
    before = (await credentials.login()).tls
    assert (await credentials.login()).tls is before  # the same object keeps connections reusable
    replacement = tmp_path / "new"
    replacement.write_bytes((TLS / "ca.crt").read_bytes())
    replacement.rename(authority)
    after = (await credentials.login()).tls
    assert after is not before
    assert [dict(x[0] for x in c["subject"])["commonName"] for c in after.get_ca_certs()] == ["waggle test authority"]
