"""Kubeconfig files and service accounts: what they mean, and which file and field is named when they are wrong."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yaml

from waggle.errors import ConfigError
from waggle.sources.kubeconfig import IN_CLUSTER, in_cluster_access, load_access

TLS = Path(__file__).parent / "tls"


def document(cluster: dict | None = None, user: dict | None = None, **top) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "preferences": {},
        "current-context": "main",
        "contexts": [
            {"name": "other", "context": {"cluster": "nowhere", "user": "nobody"}},
            {"name": "main", "context": {"cluster": "c", "user": "u", "namespace": "default"}},
        ],
        "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443", **(cluster or {})}}],
        "users": [{"name": "x"}, {"name": "u", "user": user or {}}],
        **top,
    }


def write(directory: Path, content: object) -> Path:
    path = directory / "kubeconfig"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def b64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


# -- what is accepted -----------------------------------------------------------------------------------------------


def test_inline_data(tmp_path: Path) -> None:
    cluster = {"certificate-authority-data": b64(TLS / "ca.crt"), "tls-server-name": "apiserver.test"}
    user = {"client-certificate-data": b64(TLS / "client.crt"), "client-key-data": b64(TLS / "client.key")}
    access = load_access(write(tmp_path, document(cluster, user)))
    assert access.server == "https://10.0.0.1:6443"
    assert access.certificate_authority == (TLS / "ca.crt").read_bytes()
    assert access.client_certificate == (TLS / "client.crt").read_bytes()
    assert access.client_key == (TLS / "client.key").read_bytes()
    assert access.tls_server_name == "apiserver.test"
    assert access.origin == str(tmp_path / "kubeconfig")


def test_files_are_relative_to_the_kubeconfig(tmp_path: Path) -> None:
    cluster = {"certificate-authority": "pki/ca.crt"}
    user = {"client-certificate": "/abs/client.crt", "client-key": "client.key", "tokenFile": "token"}
    access = load_access(write(tmp_path, document(cluster, user)))
    assert access.certificate_authority == tmp_path / "pki/ca.crt"
    assert access.client_certificate == Path("/abs/client.crt")
    assert access.client_key == tmp_path / "client.key"
    assert access.token_file == tmp_path / "token"


def test_data_wins_over_a_file(tmp_path: Path) -> None:
    cluster = {"certificate-authority": "missing.crt", "certificate-authority-data": b64(TLS / "ca.crt")}
    assert load_access(write(tmp_path, document(cluster))).certificate_authority == (TLS / "ca.crt").read_bytes()


def test_token_insecure_and_compression(tmp_path: Path) -> None:
    cluster = {
        "insecure-skip-tls-verify": True,
        "disable-compression": True,
        "server": "https://[fd00::1]:6443/k8s/c1/",
    }
    access = load_access(write(tmp_path, document(cluster, {"token": "abc.def\n"})))
    assert (access.token, access.insecure_skip_tls_verify, access.compression) == ("abc.def", True, False)
    assert access.server == "https://[fd00::1]:6443/k8s/c1"


def test_a_context_without_a_user_and_json(tmp_path: Path) -> None:
    text = (
        '{"current-context": "a", "contexts": [{"name": "a", "context": {"cluster": "b"}}],'
        '"clusters": [{"name": "b", "cluster": {"server": "http://127.0.0.1:8001"}}], "users": null}'
    )
    access = load_access(write(tmp_path, text))
    assert (access.server, access.token, access.client_certificate) == ("http://127.0.0.1:8001", None, None)


def test_exec_plugin(tmp_path: Path) -> None:
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "bin/get-token",
        "args": ["--cluster", "c"],
        "env": [{"name": "PROFILE", "value": "prod"}],
        "interactiveMode": "Never",
        "installHint": "install\n  it",
        "provideClusterInfo": True,
    }
    extension = {"name": "client.authentication.k8s.io/exec", "extension": {"audience": "me"}}
    access = load_access(write(tmp_path, document({"extensions": [extension]}, {"exec": plugin})))
    assert access.exec_plugin is not None
    assert access.exec_plugin.command == str(tmp_path / "bin/get-token")
    assert access.exec_plugin.args == ("--cluster", "c")
    assert access.exec_plugin.env == (("PROFILE", "prod"),)
    assert access.exec_plugin.install_hint == "install it"
    assert access.exec_plugin.cluster == {"server": "https://10.0.0.1:6443", "config": {"audience": "me"}}
    plugin |= {
        "command": "get-token",
        "provideClusterInfo": False,
        "apiVersion": "client.authentication.k8s.io/v1beta1",
    }
    access = load_access(write(tmp_path, document(user={"exec": plugin})))
    assert access.exec_plugin is not None
    assert (access.exec_plugin.command, access.exec_plugin.cluster) == ("get-token", None)


def test_secrets_do_not_show_when_printed(tmp_path: Path) -> None:
    user = {
        "client-certificate-data": b64(TLS / "client.crt"),
        "client-key-data": b64(TLS / "client.key"),
        "token": "very-secret",
    }
    shown = repr(load_access(write(tmp_path, document(user=user))))
    assert "very-secret" not in shown
    assert "PRIVATE" not in shown


# -- what is refused, and in which words ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is not valid YAML"),
        ("- a list", "holds no mapping"),
        ("", "holds no mapping"),
        (document(**{"current-context": ""}), "current-context: is not set; contexts in this file: other, main"),
        (document(**{"current-context": "gone"}), "current-context: 'gone' is not among the contexts"),
        (document(**{"current-context": "other"}), "contexts[0].cluster: 'nowhere' is not among the clusters"),
        (document(users=[]), "contexts[1].user: 'u' is not among the users of this file (none)"),
        (document(clusters=[{"cluster": {}}]), "clusters[0]: Object missing required field name"),
        (document({"server": 5}), "clusters[0].cluster.server: Expected str, got int"),
        (document({"server": ""}), "clusters[0].cluster.server: '' is not a URL"),
        (document({"server": "10.0.0.1:6443"}), "clusters[0].cluster.server: '10.0.0.1:6443' is not a URL"),
        (document({"server": "https://a:99999"}), "clusters[0].cluster.server: "),
        (document({"server": "https://u:p@a"}), "clusters[0].cluster.server: must hold no user"),
        (document({"proxy-url": "http://p:1"}), "clusters[0].cluster.proxy-url: proxies are not supported"),
        (
            document({"certificate-authority-data": "@@@"}),
            "clusters[0].cluster.certificate-authority-data: is not base64",
        ),
        (document({"certificate-authority-data": "aGVsbG8="}), "certificate-authority-data: holds no PEM block"),
        (
            document({"certificate-authority": "ca.crt", "insecure-skip-tls-verify": True}),
            "clusters[0].cluster.insecure-skip-tls-verify: contradicts",
        ),
        (
            document(user={"client-certificate": "a.crt"}),
            "users[1].user.client-key: is missing beside client-certificate",
        ),
        (document(user={"client-key": "a.key"}), "users[1].user.client-certificate: is missing beside client-key"),
        (document(user={"token": 12345}), "users[1].user.token: Expected str, got int"),
        (document(user={"username": "a", "password": "b"}), "users[1].user.username: password log-in was removed"),
        (document(user={"auth-provider": {"name": "gcp"}}), "users[1].user.auth-provider: was removed"),
        (document(user={"as": "admin"}), "users[1].user.as: impersonation is not supported"),
        (document(user={"exec": {"command": "x"}}), "users[1].user.exec.apiVersion: '' is not one of"),
        (
            document(user={"exec": {"apiVersion": "client.authentication.k8s.io/v1"}}),
            "users[1].user.exec.command: is not set",
        ),
        (
            document(
                user={
                    "exec": {
                        "apiVersion": "client.authentication.k8s.io/v1",
                        "command": "x",
                        "interactiveMode": "Always",
                    }
                }
            ),
            "users[1].user.exec.interactiveMode: the plugin wants a terminal",
        ),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, content: object, words: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_access(path)
    assert str(caught.value).startswith(f"kubeconfig: {path}")
    assert words in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/kubeconfig: No such file or directory"):
        load_access(tmp_path / "kubeconfig")


# -- in a pod -------------------------------------------------------------------------------------------------------


def test_service_account(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    (tmp_path / "ca.crt").write_bytes((TLS / "ca.crt").read_bytes())
    environ = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    access = in_cluster_access(environ, tmp_path)
    assert access.server == "https://10.96.0.1:443"
    assert access.token_file == tmp_path / "token"
    assert access.certificate_authority == tmp_path / "ca.crt"
    assert (
        in_cluster_access({**environ, "KUBERNETES_SERVICE_HOST": "fd00::1"}, tmp_path).server == "https://[fd00::1]:443"
    )
    (tmp_path / "token").unlink()
    with pytest.raises(ConfigError, match=f"in-cluster: {tmp_path / 'token'} is missing"):
        in_cluster_access(environ, tmp_path)


def test_in_cluster_outside_of_a_pod() -> None:
    with pytest.raises(ConfigError, match="in-cluster: KUBERNETES_SERVICE_HOST is not set"):
        load_access(IN_CLUSTER, {})
