"""How to reach a Kubernetes API: a kubeconfig file, or the service account of the pod this agent runs in.

Both end in one `Access`. Nothing is read from the network here and no file that the kubeconfig names is opened:
those may change while the agent runs, so `waggle.sources.credentials` reads them at the time of use.

What a daemon cannot honour is refused with the file and the field, never passed over: a proxy, impersonation,
password log-in and legacy auth providers.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import yaml

from waggle.errors import ConfigError

IN_CLUSTER = Path("in-cluster")
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EXEC_API_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class ExecPlugin:
    """A program that prints credentials. `command` holds a slash only if it is an absolute path."""

    command: str
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = field(repr=False)
    api_version: str
    install_hint: str
    cluster: dict[str, Any] | None = field(repr=False)  # what provideClusterInfo passes on; None = not asked for


@dataclass(frozen=True, slots=True)
class Access:
    """One cluster and one user. `bytes` are PEM from the kubeconfig itself, `Path` is a file to read when needed."""

    origin: str  # the file, as error messages name it
    server: str  # http(s)://host[:port][/prefix], without a trailing slash
    certificate_authority: bytes | Path | None = None  # None: the machine's own authorities
    insecure_skip_tls_verify: bool = False
    tls_server_name: str | None = None
    client_certificate: bytes | Path | None = field(default=None, repr=False)
    client_key: bytes | Path | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None  # where it can be read it wins over `token`
    exec_plugin: ExecPlugin | None = None
    compression: bool = True


def load_access(kubeconfig: Path, environ: Mapping[str, str] | None = None) -> Access:
    """The access that `kubeconfig` describes; the path `in-cluster` means the pod's service account.

    Raises ConfigError naming the file and the field.
    """
    if kubeconfig == IN_CLUSTER:
        return in_cluster_access(os.environ if environ is None else environ)
    return _KubeconfigReader(kubeconfig).access()


def in_cluster_access(environ: Mapping[str, str], directory: Path = SERVICE_ACCOUNT) -> Access:
    """The access of a pod: address from its environment, token and authority from its service account's volume."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    for name, value in (("KUBERNETES_SERVICE_HOST", host), ("KUBERNETES_SERVICE_PORT", port)):
        if not value:
            raise ConfigError(f"kubeconfig: in-cluster: {name} is not set in the environment; is this a pod?")
    for name in ("token", "ca.crt"):
        if not (directory / name).is_file():
            raise ConfigError(f"kubeconfig: in-cluster: {directory / name} is missing; is the service account mounted?")
    server = f"https://[{host}]:{port}" if _is_ipv6(host) else f"https://{host}:{port}"
    return Access(
        origin="in-cluster",
        server=server,
        certificate_authority=directory / "ca.crt",
        token_file=directory / "token",
    )


# -- the file's own shape ---------------------------------------------------------------------------------------


# Fields that nothing here reads are skipped.


class _Cluster(msgspec.Struct, frozen=True, rename="kebab"):
    server: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""
    disable_compression: bool = False
    extensions: list[dict[str, Any]] | None = None


class _EnvVar(msgspec.Struct, frozen=True, rename="kebab"):
    name: str
    value: str = ""


class _Exec(msgspec.Struct, frozen=True, rename="camel"):  # unlike its surroundings, written in camelCase
    api_version: str = ""
    command: str = ""
    args: list[str] | None = None
    env: list[_EnvVar] | None = None
    install_hint: str = ""
    interactive_mode: str = "IfAvailable"
    provide_cluster_info: bool = False


class _User(msgspec.Struct, frozen=True, rename="kebab"):
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    token: str = ""
    token_file: str = msgspec.field(default="", name="tokenFile")
    exec: _Exec | None = None
    username: str = ""
    password: str = ""
    auth_provider: dict[str, Any] | None = None
    impersonate: str = msgspec.field(default="", name="as")


class _Context(msgspec.Struct, frozen=True, rename="kebab"):
    cluster: str = ""
    user: str = ""


class _NamedCluster(msgspec.Struct, frozen=True, rename="kebab"):
    name: str
    cluster: _Cluster


class _NamedUser(msgspec.Struct, frozen=True, rename="kebab"):
    name: str
    user: _User | None = None


class _NamedContext(msgspec.Struct, frozen=True, rename="kebab"):
    name: str
    context: _Context


class _File(msgspec.Struct, frozen=True, rename="kebab"):
    current_context: str = ""
    clusters: list[_NamedCluster] | None = None
    users: list[_NamedUser] | None = None
    contexts: list[_NamedContext] | None = None


_Named = TypeVar("_Named", _NamedCluster, _NamedUser, _NamedContext)


class _KubeconfigReader:
    """Turns one file into an Access; holds the file's name for messages and for relative paths."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._base = path.absolute().parent

    def access(self) -> Access:
        file = self._parse()
        if not file.current_context:
            known = ", ".join(c.name for c in file.contexts or []) or "none"
            raise self._error("current-context", f"is not set; contexts in this file: {known}")
        context_at, named_context = self._pick("contexts", file.contexts, file.current_context, "current-context")
        context = named_context.context
        cluster_at, named_cluster = self._pick("clusters", file.clusters, context.cluster, f"{context_at}.cluster")
        cluster, user, user_at = named_cluster.cluster, _User(), "users"
        if context.user:
            user_at, named_user = self._pick("users", file.users, context.user, f"{context_at}.user")
            user = named_user.user or _User()
        self._refuse_unsupported(f"{cluster_at}.cluster", cluster, f"{user_at}.user", user)
        authority = self._material(
            f"{cluster_at}.cluster", "certificate-authority", cluster.certificate_authority_data, cluster
        )
        if authority is not None and cluster.insecure_skip_tls_verify:
            raise self._error(
                f"{cluster_at}.cluster.insecure-skip-tls-verify", "contradicts the certificate-authority given with it"
            )
        certificate = self._material(f"{user_at}.user", "client-certificate", user.client_certificate_data, user)
        key = self._material(f"{user_at}.user", "client-key", user.client_key_data, user)
        if (certificate is None) != (key is None):
            have, lack = ("client-certificate", "client-key") if key is None else ("client-key", "client-certificate")
            raise self._error(f"{user_at}.user.{lack}", f"is missing beside {have}")
        return Access(
            origin=str(self._path),
            server=self._server(f"{cluster_at}.cluster.server", cluster.server),
            certificate_authority=authority,
            insecure_skip_tls_verify=cluster.insecure_skip_tls_verify,
            tls_server_name=cluster.tls_server_name or None,
            client_certificate=certificate,
            client_key=key,
            token=user.token.strip() or None,
            token_file=self._base / user.token_file if user.token_file else None,
            exec_plugin=self._exec(f"{user_at}.user.exec", user.exec, cluster, authority),
            compression=not cluster.disable_compression,
        )

    def _parse(self) -> _File:
        try:
            document = yaml.load(self._path.read_bytes(), Loader=_Loader)
        except OSError as error:
            raise ConfigError(f"kubeconfig: cannot read {self._path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"kubeconfig: {self._path} is not valid YAML: {text}") from error
        if not isinstance(document, dict):
            raise ConfigError(f"kubeconfig: {self._path} is not a kubeconfig: it holds no mapping")
        try:
            return msgspec.convert(document, _File)
        except msgspec.ValidationError as error:
            reason, _, where = str(error).partition(" - at `$.")
            raise self._error(where.rstrip("`"), reason.replace("`", "")) from error

    def _error(self, at: str, reason: str) -> ConfigError:
        return ConfigError(f"kubeconfig: {self._path}: {at}: {reason}" if at else f"kubeconfig: {self._path}: {reason}")

    def _pick(self, section: str, entries: list[_Named] | None, name: str, by: str) -> tuple[str, _Named]:
        """(where, entry) of the first entry called `name`, as kubectl picks."""
        for index, entry in enumerate(entries or []):
            if entry.name == name:
                return f"{section}[{index}]", entry
        known = ", ".join(entry.name for entry in entries or []) or "none"
        raise self._error(by, f"{name!r} is not among the {section} of this file ({known})" if name else "is not set")

    def _refuse_unsupported(self, cluster_at: str, cluster: _Cluster, user_at: str, user: _User) -> None:
        if cluster.proxy_url:
            raise self._error(f"{cluster_at}.proxy-url", "proxies are not supported; the API must be reached directly")
        if user.username or user.password:
            raise self._error(f"{user_at}.username", "password log-in was removed from Kubernetes; use a token")
        if user.auth_provider is not None:
            raise self._error(f"{user_at}.auth-provider", "was removed from Kubernetes; use an exec plugin")
        if user.impersonate:
            raise self._error(f"{user_at}.as", "impersonation is not supported; give the agent a user of its own")

    def _server(self, at: str, server: str) -> str:
        try:
            parts = urlsplit(server)
            _ = parts.port
        except ValueError as error:
            raise self._error(at, f"{server!r} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self._error(at, f"{server!r} is not a URL that starts with https:// or http://")
        if parts.username or parts.query or parts.fragment:
            raise self._error(at, "must hold no user, query or fragment")
        return server.rstrip("/")

    def _material(self, at: str, name: str, data: str, section: _Cluster | _User) -> bytes | Path | None:
        """PEM given inline (`NAME-data`, which wins) or as a path relative to the kubeconfig, or None."""
        if data:
            try:
                pem = base64.b64decode(re.sub(r"\s", "", data), validate=True)
            except (binascii.Error, ValueError) as error:
                raise self._error(f"{at}.{name}-data", f"is not base64: {error}") from error
            if b"-----BEGIN" not in pem:
                raise self._error(f"{at}.{name}-data", "holds no PEM block")
            return pem
        file = str(getattr(section, name.replace("-", "_")))
        return self._base / file if file else None

    def _exec(
        self, at: str, plugin: _Exec | None, cluster: _Cluster, authority: bytes | Path | None
    ) -> ExecPlugin | None:
        if plugin is None:
            return None
        if plugin.api_version not in EXEC_API_VERSIONS:
            raise self._error(
                f"{at}.apiVersion", f"{plugin.api_version!r} is not one of {', '.join(EXEC_API_VERSIONS)}"
            )
        if not plugin.command:
            raise self._error(f"{at}.command", "is not set")
        if plugin.interactive_mode == "Always":
            raise self._error(f"{at}.interactiveMode", "the plugin wants a terminal, which an agent has not")
        command = str(self._base / plugin.command) if "/" in plugin.command else plugin.command
        return ExecPlugin(
            command=command,
            args=tuple(plugin.args or ()),
            env=tuple((entry.name, entry.value) for entry in plugin.env or ()),
            api_version=plugin.api_version,
            install_hint=" ".join(plugin.install_hint.split()),
            cluster=_cluster_info(cluster, authority) if plugin.provide_cluster_info else None,
        )


def _cluster_info(cluster: _Cluster, authority: bytes | Path | None) -> dict[str, Any]:
    """`spec.cluster` of the ExecCredential given to a plugin (client.authentication.k8s.io/v1, type Cluster)."""
    info: dict[str, Any] = {"server": cluster.server}
    if cluster.tls_server_name:
        info["tls-server-name"] = cluster.tls_server_name
    if cluster.insecure_skip_tls_verify:
        info["insecure-skip-tls-verify"] = True
    if isinstance(authority, bytes):
        info["certificate-authority-data"] = base64.b64encode(authority).decode()
    elif authority is not None:
        info["certificate-authority"] = str(authority)  # replaced by the data when the plugin runs
    for extension in cluster.extensions or []:
        if extension.get("name") == "client.authentication.k8s.io/exec":
            info["config"] = extension.get("extension")
    return info


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
