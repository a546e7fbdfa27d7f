"""What proves the agent to the Kubernetes API, and the API to the agent, as it is *now*.

Tokens and certificates are rotated while the agent runs: the kubelet rewrites service account tokens and its own
certificates in place, exec plugins hand out tokens that last minutes. So every `login()` looks again: files are read
anew when their modification time or inode changed, and a plugin runs again when its credentials expired or the API
refused them (`invalidate`). An unchanged log-in returns the same SSLContext object, which keeps connections reusable.

Private keys that came as data never touch a disk: OpenSSL reads them from an anonymous memory file.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from waggle.errors import ApiError, ConfigError
from waggle.sources.kubeconfig import Access, ExecPlugin

_PLUGIN_TIMEOUT = 60.0  # seconds
_EXPIRY_MARGIN = 10.0  # seconds before its expiry at which a credential is renewed

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Login:
    """`tls` is False for plain http."""

    headers: Mapping[str, str] = field(repr=False)
    tls: ssl.SSLContext | Literal[False]


class _PluginStatus(msgspec.Struct, frozen=True, rename="camel"):
    token: str = ""
    client_certificate_data: str = ""
    client_key_data: str = ""
    expiration_timestamp: datetime | None = None


class _ExecCredential(msgspec.Struct, frozen=True, rename="camel"):
    api_version: str = ""
    kind: str = ""
    status: _PluginStatus | None = None


class Credentials:
    """The log-in of one Access."""

    def __init__(self, access: Access, plugin_timeout: float = _PLUGIN_TIMEOUT) -> None:
        self._access = access
        self._plugin_timeout = plugin_timeout
        self._plugin_status: _PluginStatus | None = None
        self._plugin_lock = asyncio.Lock()
        self._context: ssl.SSLContext | None = None
        self._context_stamp: object = None

    @property
    def renewable(self) -> bool:
        """Whether a log-in that the API refused may be followed by a better one."""
        return self._access.exec_plugin is not None

    def invalidate(self, refused: Login) -> None:
        """The API answered 401 to `refused`: run the plugin again. A log-in newer than that is left alone."""
        if self._plugin_status is not None and refused.headers == self._headers(self._plugin_status):
            self._plugin_status = None

    async def login(self) -> Login:
        """Headers and TLS for a request now. Raises ConfigError (file, field) or ApiError (a plugin failed)."""
        status = await self._run_plugin_if_due() if self._access.exec_plugin is not None else None
        tls: ssl.SSLContext | Literal[False] = False
        if self._access.server.startswith("https:"):
            tls = self._tls(status)
        return Login(self._headers(status), tls)

    # -- tokens -------------------------------------------------------------------------------------------------

    def _headers(self, status: _PluginStatus | None) -> dict[str, str]:
        token = self._token(status)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _token(self, status: _PluginStatus | None) -> str | None:
        token, at = self._access.token, "token"
        if self._access.token_file is not None:
            try:
                token, at = self._access.token_file.read_text().strip(), f"tokenFile {self._access.token_file}"
            except (OSError, UnicodeDecodeError) as error:
                if token is None:
                    reason = getattr(error, "strerror", None) or str(error)
                    raise self._error(f"cannot read tokenFile {self._access.token_file}: {reason}") from error
            if not token:
                raise self._error(f"tokenFile {self._access.token_file} is empty")
        elif token is None and status is not None:
            token, at = status.token or None, "the token of the exec plugin"
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise self._error(f"{at}: holds characters that no token has")
        return token

    # -- TLS ----------------------------------------------------------------------------------------------------

    def _tls(self, status: _PluginStatus | None) -> ssl.SSLContext:
        authority = self._access.certificate_authority
        certificate, key = self._access.client_certificate, self._access.client_key
        if certificate is None and status is not None and status.client_certificate_data:
            certificate, key = status.client_certificate_data.encode(), status.client_key_data.encode()
        sources = (("certificate-authority", authority), ("client-certificate", certificate), ("client-key", key))
        stamp = tuple(self._stamp(name, source) for name, source in sources)
        if self._context is None or stamp != self._context_stamp:
            self._context = self._make_context(authority, certificate, key)
            self._context_stamp = stamp
        return self._context

    def _make_context(
        self, authority: bytes | Path | None, certificate: bytes | Path | None, key: bytes | Path | None
    ) -> ssl.SSLContext:
        try:
            pem = None if authority is None else self._read("certificate-authority", authority).decode("ascii")
            context = ssl.create_default_context(cadata=pem)
        except (ssl.SSLError, ValueError) as error:
            raise self._error(f"certificate-authority{_file(authority)}: is not a PEM certificate: {error}") from error
        # From Python 3.13 on this is set by default; it refuses authorities without a key usage extension, which
        # many private clusters have and every other Kubernetes client accepts.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self._access.insecure_skip_tls_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if certificate is not None and key is not None:
            chain = self._read("client-certificate", certificate)
            secret = self._read("client-key", key)
            try:
                with _memory_file(chain) as chain_path, _memory_file(secret) as key_path:
                    context.load_cert_chain(chain_path, key_path, password=_no_password)
            except (ssl.SSLError, ValueError) as error:
                where = f"client-certificate{_file(certificate)} and client-key{_file(key)}"
                raise self._error(f"{where}: are not a usable pair of PEM certificate and key: {error}") from error
        return context

    def _stamp(self, name: str, source: bytes | Path | None) -> _Stamp | bytes | None:
        if not isinstance(source, Path):
            return source
        try:
            stat = source.stat()
        except OSError as error:
            raise self._error(f"cannot read {name} {source}: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    def _read(self, name: str, source: bytes | Path) -> bytes:
        if isinstance(source, bytes):
            return source
        try:
            return source.read_bytes()
        except OSError as error:
            raise self._error(f"cannot read {name} {source}: {error.strerror}") from error

    def _error(self, reason: str) -> ConfigError:
        return ConfigError(f"kubeconfig: {self._access.origin}: {reason}")

    # -- exec plugins -------------------------------------------------------------------------------------------

    async def _run_plugin_if_due(self) -> _PluginStatus:
        assert self._access.exec_plugin is not None
        async with self._plugin_lock:  # several watches ask at once; one run serves them all
            status = self._plugin_status
            if status is None or _expired(status):
                status = self._plugin_status = await self._run_plugin(self._access.exec_plugin)
            return status

    async def _run_plugin(self, plugin: ExecPlugin) -> _PluginStatus:
        """Protocol: https://kubernetes.io/docs/reference/access-authn-authz/authentication/ (ExecCredential)."""
        environment = {**os.environ, **dict(plugin.env), "KUBERNETES_EXEC_INFO": self._plugin_input(plugin)}
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        try:
            process = await asyncio.create_subprocess_exec(
                plugin.command,
                *plugin.args,
                stdin=nothing,
                stdout=pipe,
                stderr=pipe,
                env=environment,
            )
        except OSError as error:
            hint = f" ({plugin.install_hint})" if plugin.install_hint else ""
            raise self._error(f"exec plugin {plugin.command}: cannot be run: {error.strerror}{hint}") from error
        try:
            async with asyncio.timeout(self._plugin_timeout):
                output, complaint = await process.communicate()
        except TimeoutError as error:
            raise ApiError(f"exec plugin {plugin.command}: no answer within {self._plugin_timeout:g} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            text = " ".join(complaint.decode(errors="replace").split())[-300:]
            raise ApiError(f"exec plugin {plugin.command}: exit code {process.returncode}: {text or 'no message'}")
        return self._plugin_output(plugin, output)

    def _plugin_input(self, plugin: ExecPlugin) -> str:
        spec: dict[str, Any] = {"interactive": False}
        if plugin.cluster is not None:
            cluster = dict(plugin.cluster)
            authority = cluster.pop("certificate-authority", None)
            if authority is not None:
                pem = self._read("certificate-authority", Path(authority))
                cluster["certificate-authority-data"] = base64.b64encode(pem).decode()
            spec["cluster"] = cluster
        document = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": spec}
        return msgspec.json.encode(document).decode()

    def _plugin_output(self, plugin: ExecPlugin, output: bytes) -> _PluginStatus:
        try:
            credential = msgspec.json.decode(output, type=_ExecCredential)
        except msgspec.MsgspecError as error:  # the output is secret: say what is wrong, never show it
            raise ApiError(f"exec plugin {plugin.command}: its output is no ExecCredential: {error}") from error
        status = credential.status
        if credential.kind != "ExecCredential" or credential.api_version != plugin.api_version:
            got = f"{credential.api_version} {credential.kind}"
            raise ApiError(
                f"exec plugin {plugin.command}: printed {got!r} instead of {plugin.api_version} ExecCredential"
            )
        if status is None or not (status.token or status.client_certificate_data):
            raise ApiError(f"exec plugin {plugin.command}: printed neither status.token nor a client certificate")
        if bool(status.client_certificate_data) != bool(status.client_key_data):
            raise ApiError(f"exec plugin {plugin.command}: printed a client certificate or key without the other")
        return status


def _expired(status: _PluginStatus) -> bool:
    expiry = status.expiration_timestamp
    if expiry is None:
        return False
    if expiry.tzinfo is None:
        expiry = expiry.replace(tzinfo=UTC)
    return expiry.timestamp() - _EXPIRY_MARGIN <= time.time()


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # otherwise OpenSSL asks on the terminal


def _file(source: bytes | Path | None) -> str:
    return f" {source}" if isinstance(source, Path) else "-data"


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    """A path that holds `content` while the context lasts, backed by memory only."""
    descriptor = os.memfd_create("waggle-pem", os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
