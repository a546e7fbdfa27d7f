"""The plugin's binary alone: what it says without an agent, to hostile input, and to a server that is no agent.

Needs a C compiler, no root: the binary is built from its sources here.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waggle.sources.cni_request import MAX_REQUEST_BYTES, SUPPORTED_VERSIONS, split_body

CNI = Path(__file__).resolve().parents[2] / "cni"
ENVIRONMENT = {"CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0", "CNI_NETNS": "/run/netns/c"}

pytestmark = pytest.mark.skipif(not (shutil.which("make") and shutil.which("gcc")), reason="needs make and gcc")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("plugin") / "waggle-cni"
    built = subprocess.run(
        ["make", "--no-print-directory", "-C", str(CNI), f"OUTPUT={binary}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return binary


def run(plugin: Path, command: str | None, stdin: bytes, **environment: str) -> tuple[int, Any]:
    variables = {**ENVIRONMENT, **environment, **({"CNI_COMMAND": command} if command is not None else {})}
    done = subprocess.run([plugin], input=stdin, env=variables, capture_output=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done
    document = json.loads(done.stdout)
    if done.returncode == 1:
        assert document.keys() == {"cniVersion", "code", "msg"}
    return done.returncode, document


def conf(path: Path, **more: Any) -> bytes:
    return json.dumps(
        {"cniVersion": "1.0.0", "name": "n", "type": "waggle-cni", "apiSocket": str(path), **more}
    ).encode()


# -- what it answers alone


def test_binary_needs_nothing_on_the_host(plugin: Path) -> None:
    assert plugin.stat().st_size < 1 << 20
    assert b"/ld-linux" not in plugin.read_bytes(), "an interpreter means it is not static"


def test_version(plugin: Path) -> None:
    supported = list(SUPPORTED_VERSIONS)
    for version in ("0.4.0", "1.1.0", "9.9.9"):
        text = json.dumps({"cniVersion": version}).encode()
        assert run(plugin, "VERSION", text) == (0, {"cniVersion": version, "supportedVersions": supported})
    assert run(plugin, "VERSION", b"") == (0, {"cniVersion": "1.1.0", "supportedVersions": supported})


def test_limits_agree_with_the_agents() -> None:
    source = (CNI / "waggle-cni.c").read_text()
    megabytes = re.search(r"#define MAX_REQUEST \((\d+)u << 20\)", source)
    assert megabytes is not None
    assert int(megabytes[1]) << 20 == MAX_REQUEST_BYTES


def test_no_command(plugin: Path) -> None:
    for command in (None, ""):
        status, document = run(plugin, command, b"{}")
        assert (status, document["code"]) == (1, 4)
        assert "CNI_COMMAND" in document["msg"]


def test_no_agent(plugin: Path, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    for command, code in (("ADD", 11), ("DEL", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)):
        status, document = run(plugin, command, conf(path))
        assert (status, document["code"], document["cniVersion"]) == (1, code, "1.0.0")
        assert str(path) in document["msg"]
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))  # an agent that ended: the file is there, nobody listens
    assert run(plugin, "ADD", conf(path))[1]["code"] == 11
    path.unlink()
    path.write_text("no socket")
    assert run(plugin, "ADD", conf(path))[1]["code"] == 11


@pytest.mark.parametrize("value", [5, None, "", "relative.sock", "/" + "x" * 108, "/run/a\x00b", {}, "/\ud800"])
def test_socket_path_that_is_none(plugin: Path, value: object) -> None:
    text = json.dumps({"cniVersion": "1.0.0", "apiSocket": value}).encode()
    status, document = run(plugin, "ADD", text)
    assert (status, document["code"]) == (1, 7)
    assert "apiSocket" in document["msg"]


@pytest.mark.parametrize("value", [5, None, [], "9" * 100])
def test_version_that_is_none(plugin: Path, value: object) -> None:
    status, document = run(plugin, "ADD", json.dumps({"cniVersion": value}).encode())
    assert (status, document["code"], document["cniVersion"]) == (1, 6, "1.1.0")


def test_error_is_valid_json_whatever_is_in_it(plugin: Path, tmp_path: Path) -> None:
    for name in ('a"b', "a\\b", "a\nb", "ä", "\x7f", "\x01"):
        _, document = run(plugin, "ADD", conf(tmp_path / name))
        assert document["code"] == 11
    status, document = run(plugin, "VERSION", b'{"cniVersion": "\xff\xfe\\u0001\\""}')
    assert (status, document["cniVersion"]) == (0, '\xff\xfe\x01"')


# -- JSON


def strict(text: bytes) -> dict[str, Any] | None:
    """What the plugin must accept: a JSON object as Python reads it, without Python's extensions."""
    if text.startswith(b"\xef\xbb\xbf"):
        return None
    try:
        document = json.loads(text.decode("utf-8"), parse_constant=lambda _: math.nan / 0)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"}",
        b"{}}",
        b"[]",
        b'"x"',
        b"null",
        b"",
        b" ",
        b'{"a":1,}',
        b'{"a" 1}',
        b"{'a':1}",
        b'{"a":01}',
        b'{"a":1.}',
        b'{"a":.5}',
        b'{"a":1e}',
        b'{"a":+1}',
        b'{"a":-}',
        b'{"a":NaN}',
        b'{"a":tru}',
        b'{"a":"\\x"}',
        b'{"a":"\\u12g4"}',
        b'{"a":"\n"}',
        b'{"a":"',
        b'{"a":"\\',
        b'{"a":"\\u00',
        b'{"a":[1,]}',
        b'{"a":[}',
        b"{} x",
        b"\x00{}",
        b"{}\x00",
        b"[" * 100000,
        b'{"a":' * 100000,
        b"\xff" * 64,
    ],
)
def test_undecodable_configuration(plugin: Path, text: bytes) -> None:
    for command in ("ADD", *(["VERSION"] if text else [])):
        status, document = run(plugin, command, text)
        assert (status, document["code"]) == (1, 6)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=120, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8) | st.just("cniVersion"), _json, max_size=5),
    st.booleans(),
    st.text("0123456789.ä\u2028\U0001f41d", max_size=12),
)
def test_valid_documents_are_read(plugin: Path, document: dict[str, Any], ascii_only: bool, version: str) -> None:
    text = json.dumps({**document, "cniVersion": version}, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    status, answer = run(plugin, "VERSION", text)
    assert status == 0
    assert answer["cniVersion"].encode("latin-1").decode() == version


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=40)
    | st.text('{}[]":,\\u0aeE+-.1 tfn\n', max_size=24).map(lambda s: ("{" + s + "}").encode())
    | st.tuples(_json, st.integers(0, 200), st.binary(max_size=2)).map(
        lambda t: (lambda raw: raw[: t[1]] + t[2] + raw[t[1] + 1 :])(json.dumps({"a": t[0]}).encode())
    )
)
def test_same_verdict_as_another_json_reader(plugin: Path, text: bytes) -> None:
    try:
        text.decode()
    except UnicodeDecodeError:
        return  # bytes are passed on as they are: the agent refuses them
    if not text:
        return
    expected = strict(text)
    if expected is not None and not isinstance(expected.get("cniVersion", ""), str):
        expected = None
    status, answer = run(plugin, "VERSION", text)
    assert (status == 0) == (expected is not None), answer


# -- what it sends, and answers that are none


@contextmanager
def server(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """One connection at a time, each given to `serve` and closed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(4)

        def work() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        serve(connection)
                    except (BrokenPipeError, ConnectionResetError):
                        continue  # the plugin has gone: what it printed is what the test looks at

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            path.unlink()


def receive(connection: socket.socket) -> tuple[bytes, bytes]:
    """(head, body) of one HTTP request."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    assert length is not None
    while len(body) < int(length[1]):
        body += connection.recv(1 << 20)
    return head, body


def test_request(plugin: Path, tmp_path: Path) -> None:
    requests: list[tuple[bytes, bytes]] = []

    def serve(connection: socket.socket) -> None:
        requests.append(receive(connection))
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\nServer: x\r\n\r\n{"ips": []}')

    path = tmp_path / "a.sock"
    text = conf(path, padding="x" * 1_000_000)
    with server(path, serve):
        answer = run(plugin, "ADD", text, CNI_ARGS="a=b;c=d\ne", CNI_PATH="/opt/cni/bin", HOME="/root")
    assert answer == (0, {"ips": []})
    ((head, body),) = requests
    assert head.startswith(b"POST /cni HTTP/1.1\r\n")
    assert body.startswith(b"CNI_COMMAND=ADD\0")
    environment, configuration = split_body(body)
    assert environment == {**ENVIRONMENT, "CNI_COMMAND": "ADD", "CNI_ARGS": "a=b;c=d\ne"}
    assert configuration == text, "the configuration is handed over byte for byte"


def test_configuration_that_is_too_large(plugin: Path, tmp_path: Path) -> None:
    status, document = run(plugin, "ADD", conf(tmp_path / "a.sock", padding="x" * (4 << 20)))
    assert (status, document["code"]) == (1, 5)


def test_error_of_the_agent_is_passed_on(plugin: Path, tmp_path: Path) -> None:
    error = b'{"cniVersion":"1.0.0","code":101,"msg":"no free address"}'

    def serve(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(b"HTTP/1.1 500 x\r\nContent-Length: %d\r\n\r\n" % len(error) + error)

    with server(tmp_path / "a.sock", serve):
        status, document = run(plugin, "ADD", conf(tmp_path / "a.sock"))
    assert (status, document) == (1, json.loads(error))


def test_empty_answer_is_nothing_on_standard_output(plugin: Path, tmp_path: Path) -> None:
    def serve(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with server(tmp_path / "a.sock", serve):
        done = subprocess.run(
            [plugin], input=conf(tmp_path / "a.sock"), env={"CNI_COMMAND": "DEL"}, capture_output=True, check=False
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_answer_in_many_pieces(plugin: Path, tmp_path: Path) -> None:
    body = json.dumps({"ips": ["x" * 100_000]}).encode()

    def serve(connection: socket.socket) -> None:
        receive(connection)
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        for start in (0, 5, 20, 1000, 50_000):
            end = {0: 5, 5: 20, 20: 1000, 1000: 50_000}.get(start, len(answer))
            connection.sendall(answer[start:end])
            time.sleep(0.01)

    with server(tmp_path / "a.sock", serve):
        assert run(plugin, "ADD", conf(tmp_path / "a.sock")) == (0, json.loads(body))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nNot Found",
        b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"\x00" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    ],
)
def test_answer_that_is_none(plugin: Path, tmp_path: Path, answer: bytes) -> None:
    def serve(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(answer)

    with server(tmp_path / "a.sock", serve):
        for command, code in (("ADD", 11), ("STATUS", 50)):
            status, document = run(plugin, command, conf(tmp_path / "a.sock"))
            assert (status, document["code"]) == (1, code)


def test_agent_that_hangs_up_before_it_has_read_everything(plugin: Path, tmp_path: Path) -> None:
    refusal = b'{"cniVersion":"1.0.0","code":7,"msg":"too large"}'

    def serve(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 413 x\r\nContent-Length: %d\r\n\r\n" % len(refusal) + refusal)

    with server(tmp_path / "a.sock", serve):
        status, document = run(plugin, "ADD", conf(tmp_path / "a.sock", padding="x" * (3 << 20)))
    assert (status, document["code"] in (7, 11)) == (1, True)
