"""What the plugin hands over, checked: every wrong input has its code of the specification and says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waggle.errors import CniError
from waggle.model.interface import Bandwidth, HostPort, Limit
from waggle.sources.cni_request import SUPPORTED_VERSIONS, parse_request, split_body, version_asked

POD = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "0f3a-b_c.d",
    "CNI_IFNAME": "eth0",
    "CNI_NETNS": "/run/netns/x",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
}
CONF = {"cniVersion": "1.1.0", "name": "pods", "type": "waggle-cni"}


def parse(conf: Any = None, raw: bytes | None = None, **environment: str | None) -> Any:
    merged = {name: value for name, value in {**POD, **environment}.items() if value is not None}
    return parse_request(merged, raw if raw is not None else json.dumps(CONF if conf is None else conf).encode())


def failure(conf: Any = None, raw: bytes | None = None, **environment: str | None) -> tuple[int, str]:
    with pytest.raises(CniError) as caught:
        parse(conf, raw, **environment)
    return caught.value.code, str(caught.value)


def test_add() -> None:
    request = parse({**CONF, "prevResult": None, "runtimeConfig": {"aliases": [1]}, "args": {"x": 1}, "dns": {}})
    assert (request.command, request.version, request.network) == ("ADD", "1.1.0", "pods")
    assert (request.container_id, request.ifname, request.netns) == ("0f3a-b_c.d", "eth0", "/run/netns/x")
    assert (request.namespace, request.pod_name) == ("shop", "web-0")


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        # as CRI-O and Podman send it, and as containerd does
        ({"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}, HostPort("TCP", 8080, 80)),
        ({"HostPort": 8081, "ContainerPort": 8080, "Protocol": "tcp", "HostIP": ""}, HostPort("TCP", 8081, 8080)),
        ({"HostPort": 1, "ContainerPort": 2, "Protocol": "udp", "HostIP": "::1"}, HostPort("UDP", 1, 2, "::1")),
        ({"hostPort": 53, "containerPort": 53, "protocol": "udp"}, HostPort("UDP", 53, 53)),
        ({"hostPort": 9, "containerPort": 9, "protocol": "SCTP", "hostIP": "::1"}, HostPort("SCTP", 9, 9, "::1")),
        ({"hostPort": 1, "containerPort": 2, "hostIP": "127.0.0.1"}, HostPort("TCP", 1, 2, "127.0.0.1")),
        ({"hostPort": 1, "containerPort": 2, "protocol": "", "hostIP": None}, HostPort("TCP", 1, 2)),
        ({"hostPort": 1, "containerPort": 2, "hostIP": "FD00::0:1"}, HostPort("TCP", 1, 2, "fd00::1")),
        # containerd 1: its keys are the names of Go's fields
        (
            {"HostPort": 8088, "ContainerPort": 8080, "Protocol": "tcp", "HostIP": "::"},
            HostPort("TCP", 8088, 8080, "::"),
        ),
        ({"hostPort": 0, "containerPort": 80, "protocol": "tcp"}, None),
        ({"containerPort": 80}, None),
    ],
)
def test_port_mappings(mapping: dict[str, Any], expected: HostPort | None) -> None:
    config = {**CONF, "runtimeConfig": {"portMappings": [mapping, mapping]}}
    assert parse(config).host_ports == ((expected,) if expected else ())
    assert parse(config, CNI_COMMAND="DEL").host_ports == ()


def test_labels_and_uid() -> None:
    labels = [{"key": "app", "value": "web"}, {"key": "tier", "value": ""}, {"key": "app", "value": "api"}]
    config = {**CONF, "args": {"cni": {"labels": labels}}}
    assert parse(config).labels == {"app": "api", "tier": ""}
    assert parse(config, CNI_COMMAND="DEL").labels == {}
    assert parse(CNI_ARGS="K8S_POD_UID=0-1").uid == "0-1"
    for nothing in ({}, {"cni": {}}, {"cni": {"labels": None}}, {"labels": [1]}, {"cni": [1]}, 7):
        assert parse({**CONF, "args": nothing}).labels == {}


@pytest.mark.parametrize(
    "labels", ["x", {"a": "b"}, ["x"], [{"key": "a"}], [{"key": "", "value": ""}], [{"key": "a", "value": 1}]]
)
def test_labels_of_another_form(labels: Any) -> None:
    code, text = failure({**CONF, "args": {"cni": {"labels": labels}}})
    assert code == 7 and "args.cni.labels" in text


@pytest.mark.parametrize("mappings", [None, []])
def test_no_port_mappings(mappings: Any) -> None:
    assert parse({**CONF, "runtimeConfig": {"portMappings": mappings}}).host_ports == ()


@pytest.mark.parametrize(
    ("mappings", "words"),
    [
        ({"hostPort": 1}, "portMappings: not a list of objects"),
        ([1], "portMappings: not a list of objects"),
        ([{"hostPort": 70000, "containerPort": 1}], "portMappings[0].hostPort: '70000' is not a port"),
        ([{"hostPort": -1, "containerPort": 1}], "portMappings[0].hostPort: '-1' is not a port"),
        ([{"HostPort": 70000, "ContainerPort": 1}], "portMappings[0].hostPort: '70000' is not a port"),
        ([{"hostPort": "80", "containerPort": 1}], "portMappings[0].hostPort: '80' is not a port"),
        ([{"hostPort": True, "containerPort": 1}], "portMappings[0].hostPort: 'True' is not a port"),
        ([{"hostPort": 1}], "portMappings[0].containerPort: missing"),
        ([{"hostPort": 1, "containerPort": 1, "protocol": "icmp"}], "is none of tcp, udp, sctp"),
        (
            [{"hostPort": 1, "containerPort": 1, "hostIP": "host"}],
            "portMappings[0].hostIP: 'host' is not an IP address",
        ),
    ],
)
def test_port_mappings_that_cannot_be(mappings: Any, words: str) -> None:
    config = {**CONF, "runtimeConfig": {"portMappings": mappings}}
    code, message = failure(config)
    assert code == 7
    assert message.startswith("runtimeConfig.") and words in message
    parse(config, CNI_COMMAND="DEL")  # a pod must be removable whatever it was asked for


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, Bandwidth()),
        ({}, Bandwidth()),
        ({"ingressRate": 0, "egressRate": None}, Bandwidth()),
        ({"ingressRate": 8_000_000, "ingressBurst": 1_600_000}, Bandwidth(to_pod=Limit(1_000_000, 200_000))),
        ({"EgressRate": 80_000_000, "EgressBurst": (1 << 32) - 1}, Bandwidth(from_pod=Limit(10_000_000, 500_000))),
        ({"egressRate": 8_000, "egressBurst": 8}, Bandwidth(from_pod=Limit(1_000, 16 << 10))),
    ],
)
def test_bandwidth(wanted: Any, expected: Bandwidth) -> None:
    """As containerd's annotations give it, and as everybody else."""
    config = {**CONF, "runtimeConfig": {"bandwidth": wanted}}
    assert parse(config).bandwidth == expected
    assert parse(config, CNI_COMMAND="DEL").bandwidth == Bandwidth()


@pytest.mark.parametrize("wanted", [[1], {"ingressRate": "1M"}, {"egressRate": -1}, {"egressRate": 1.5}])
def test_bandwidth_that_cannot_be(wanted: Any) -> None:
    code, message = failure({**CONF, "runtimeConfig": {"bandwidth": wanted}})
    assert code == 7 and message.startswith("runtimeConfig.bandwidth")


@pytest.mark.parametrize("value", [None, "", "add", "ADD ", "ADD\nDEL", "\x00"])
def test_command(value: str | None) -> None:
    code, message = failure(CNI_COMMAND=value)
    assert code == 4
    assert "CNI_COMMAND" in message


@pytest.mark.parametrize(
    "value", [None, "", "a/b", "../../etc", "-a", ".a", "a b", "a\n", "a\nb", "a\x00b", "ä", "a" * 2000]
)
def test_container_id(value: str | None) -> None:
    for command in ("ADD", "DEL", "CHECK"):
        code, message = failure({**CONF, "prevResult": {}}, CNI_COMMAND=command, CNI_CONTAINERID=value)
        assert code == 4
        assert message.startswith("CNI_CONTAINERID: ")
        assert len(message) < 200 and "\n" not in message


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        ".",
        "..",
        "lo",
        "a/b",
        "a:b",
        "a b",
        "a\tb",
        "eth0\n",
        "e\u2028h",
        "sixteen-bytes-xx",
        "e%d",
        "ääääääää",
    ],
)
def test_interface_name(value: str | None) -> None:
    code, message = failure(CNI_IFNAME=value)
    assert code == 4
    assert message.startswith("CNI_IFNAME: ")


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_netns(value: str | None) -> None:
    code, message = failure(CNI_NETNS=value)
    assert code == 4
    assert message.startswith("CNI_NETNS: ")


def test_delete_needs_no_netns_and_no_arguments() -> None:
    assert parse(CNI_COMMAND="DEL", CNI_NETNS=None, CNI_ARGS="garbage").netns == ""


@pytest.mark.parametrize(
    "value",
    [
        "K8S_POD_NAME",
        "=x",
        "a=b;c",
        "K8S_POD_NAME=a\nb",
        "K8S_POD_NAMESPACE=../x",
        "K8S_POD_NAME=" + "x" * 300,
        "IP=10.0.0.9",
    ],
)
def test_arguments(value: str) -> None:
    code, message = failure(CNI_ARGS=value)
    assert code == 4
    assert message.startswith("CNI_ARGS: ")


def test_arguments_may_be_missing() -> None:
    for value in (None, "", ";", "IgnoreUnknown=1;"):
        assert parse(CNI_ARGS=value).pod_name == ""


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"{}x",
        b"\xff{}",
        b'{"cniVersion": "1.1.0",}',
        b"\x00",
        b'{"a": "\n"}',
        b"[" * 100000,
    ],
)
def test_undecodable_configuration(raw: bytes) -> None:
    code, message = failure(raw=raw)
    assert code == 6
    assert "network configuration" in message


@pytest.mark.parametrize("version", [1, None, "", "one", "1.1", "1.1.0\n", "1.1.0.0", ["1.1.0"]])
def test_undecodable_version(version: object) -> None:
    code, message = failure({**CONF, "cniVersion": version})
    assert code == 6
    assert message.startswith("cniVersion: ")


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "1.2.0", "2.0.0", "1.1.0-rc1", "999999999.0.0"])
def test_incompatible_version(version: str) -> None:
    code, message = failure({**CONF, "cniVersion": version})
    assert (code, version in message) == (1, True)


def test_missing_version_means_the_first_one() -> None:
    assert failure({"name": "pods", "type": "waggle-cni"})[0] == 1


@pytest.mark.parametrize(
    ("command", "first"), [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0"), ("ADD", "0.3.0"), ("DEL", "0.3.0")]
)
def test_commands_came_with_versions(command: str, first: str) -> None:
    conf = {**CONF, "prevResult": {}, "cni.dev/valid-attachments": []}
    for version in SUPPORTED_VERSIONS:
        if SUPPORTED_VERSIONS.index(version) >= SUPPORTED_VERSIONS.index(first):
            assert parse({**conf, "cniVersion": version}, CNI_COMMAND=command).version == version
        else:
            assert failure({**conf, "cniVersion": version}, CNI_COMMAND=command)[0] == 1


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "-a"}, "name"),
        ({"name": 5}, "name"),
        ({"type": None}, "type"),
        ({"type": ""}, "type"),
        ({"prevResult": []}, "prevResult"),
        ({"prevResult": "x"}, "prevResult"),
        ({"runtimeConfig": []}, "runtimeConfig"),
        ({"ipam": "host-local"}, "ipam"),
        ({"dns": ["8.8.8.8"]}, "dns"),
    ],
)
def test_invalid_configuration(change: dict[str, Any], subject: str) -> None:
    code, message = failure({**CONF, **change})
    assert code == 7
    assert message.startswith(f"{subject}: ")


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"ipam": {"type": "host-local"}}, "ipam", "host-local"),
        ({"runtimeConfig": {"ips": ["10.0.0.9/24"]}}, "runtimeConfig.ips", "10.0.0.9"),
    ],
)
def test_unsupported_field_names_key_and_value(change: dict[str, Any], key: str, value: str) -> None:
    code, message = failure({**CONF, **change})
    assert code == 2
    assert key in message and value in message


def test_empty_ipam_is_fine() -> None:
    assert parse({**CONF, "ipam": {}}).network == "pods"


def test_check_needs_prev_result() -> None:
    assert failure(CNI_COMMAND="CHECK")[0] == 7


def test_garbage_collection_needs_no_container() -> None:
    conf = {**CONF, "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0", "more": 1}]}
    request = parse(conf, CNI_COMMAND="GC", CNI_CONTAINERID=None, CNI_IFNAME=None, CNI_NETNS=None)
    assert request.valid_attachments == {("a", "eth0")}


@pytest.mark.parametrize("value", ["x", {}, 5, [1], [{}], [{"containerID": "a"}], [{"containerID": 1, "ifname": "e"}]])
def test_garbage_collection_never_guesses_the_list(value: object) -> None:
    assert failure({**CONF, "cni.dev/valid-attachments": value}, CNI_COMMAND="GC")[0] == 7


def test_garbage_collection_with_an_empty_list() -> None:
    for value in ([], None):
        assert parse({**CONF, "cni.dev/valid-attachments": value}, CNI_COMMAND="GC").valid_attachments == frozenset()
    assert failure(CNI_COMMAND="GC")[0] == 7, "no list at all"


# -- the body


def test_body() -> None:
    environment, conf = split_body(b'CNI_COMMAND=ADD\0CNI_ARGS=a=b;c=d\0\0{"a": "\0"}')
    assert environment == {"CNI_COMMAND": "ADD", "CNI_ARGS": "a=b;c=d"}
    assert conf == b'{"a": "\0"}'


def test_first_of_two_variables_counts() -> None:
    assert split_body(b"CNI_IFNAME=a\0CNI_IFNAME=b\0\0")[0] == {"CNI_IFNAME": "a"}


@pytest.mark.parametrize("body", [b"", b"CNI_COMMAND=ADD", b"CNI_COMMAND=ADD\0", b"x\0\0", b"CNI_IFNAME=\xff\0\0{}"])
def test_broken_body(body: bytes) -> None:
    with pytest.raises(CniError) as caught:
        split_body(body)
    assert caught.value.code == 4


@given(st.binary(max_size=300))
def test_any_bytes_give_a_request_or_a_coded_error(body: bytes) -> None:
    version_asked(body)
    try:
        parse_request(*split_body(body))
    except CniError as error:
        assert error.code in (1, 2, 4, 6, 7)


@given(
    st.dictionaries(st.sampled_from(sorted(POD)), st.text(max_size=20)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*CONF, "prevResult", "ipam", "dns", "runtimeConfig"]), inner, max_size=4)
        ),
        max_leaves=8,
    ),
)
def test_any_document_gives_a_request_or_a_coded_error(environment: dict[str, str], document: Any) -> None:
    for command in ("ADD", "DEL", "CHECK", "GC", "STATUS"):
        merged = {**POD, **environment, "CNI_COMMAND": command}
        conf = {**CONF, **document} if isinstance(document, dict) else document
        try:
            parse_request(merged, json.dumps(conf).encode())
        except CniError as error:
            assert error.code in (1, 2, 4, 6, 7)


def test_error_is_answered_in_the_version_asked_for() -> None:
    assert version_asked(b'{"cniVersion": "0.2.0"}') == "0.2.0"
    for raw in (b"", b"{", b"[]", b'{"cniVersion": 5}', b'{"cniVersion": "x"}'):
        assert version_asked(raw) == "1.1.0"
