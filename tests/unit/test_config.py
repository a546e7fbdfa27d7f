"""Settings: file, flags and defaults; every refusal names the setting."""

from __future__ import annotations

import dataclasses
import inspect
import socket
from pathlib import Path

import pytest

from waggle.cli import agent
from waggle.config import DEFAULT_SOCKET, AgentConfig, load_config, split_host_port
from waggle.errors import ConfigError
from waggle.reconcile.datapath import serves_nodeports

SETTINGS = [f.name for f in dataclasses.fields(AgentConfig)]
PATHS = ["manifests", "kubeconfig", "kubernetes_netns", "cgroup_root", "bpf_root", "state_dir", "api_socket"]
PATHS += ["cni_bin_dir", "cni_conf_dir"]
OPTIONAL_PATHS = ["manifests", "kubeconfig", "kubernetes_netns", "cgroup_root", "cni_bin_dir", "cni_conf_dir"]
LISTS = ["pod_cidr", "node_ip", "devices"]
NUMBERS = ["max_services", "max_backends", "max_policy_flows", "max_policy_names", "max_nat"]


def flag(name: str) -> str:
    return name.replace("_", "-")


@pytest.fixture
def written(tmp_path: Path):
    """Settings as a file says them."""

    def load(text: str, **flags) -> AgentConfig:
        file = tmp_path / "agent.yaml"
        file.write_text(text)
        return load_config(file, flags)

    return load


def refused(file: Path | None = None, **flags) -> str:
    """The words of the refusal, which are one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- where a value comes from -----------------------------------------------------------------------------------------


def test_defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    config = load_config(None, {})
    assert config == AgentConfig(node_name="node-7")
    assert (config.api_socket, config.manifests, config.pod_cidr, config.flow_events) == (
        DEFAULT_SOCKET,
        None,
        (),
        "all",
    )


def test_the_default_node_name_is_in_lower_case_as_kubelets_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Node-7.Example")
    assert load_config(None, {}).node_name == "node-7.example"


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(written):
    text = "node-name: from-file\nlog-level: debug\nmax-nat: 1000\n"
    config = written(text, node_name="from-flag", log_level=None, max_services=500)
    assert (config.node_name, config.log_level, config.max_nat) == ("from-flag", "debug", 1000)
    assert (config.max_services, config.max_backends) == (500, AgentConfig().max_backends)


@pytest.mark.parametrize("not_given", [None, ()])
def test_a_flag_that_is_not_given_leaves_what_the_file_says(written, not_given):
    assert written("devices: [eth0]", devices=not_given).devices == ("eth0",)


def test_flags_may_turn_off_what_the_file_turns_on(written):
    config = written("masquerade: true\nmetrics-address: 0.0.0.0:9970", masquerade=False, metrics_address="")
    assert (config.masquerade, config.metrics_address) == (False, "")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}"])
def test_an_empty_file_says_nothing(written, text: str):
    assert written(text, node_name="a") == AgentConfig(node_name="a")


def test_every_setting_can_be_written_in_the_file(written):
    text = """
node-name: node1
manifests: /etc/waggle/manifests
kubeconfig: /etc/waggle/kubeconfig
kubernetes-netns: /run/netns/control
pod-cidr: [10.244.1.0/24, 'fd00:244:1::/64']
node-ip: 192.168.1.10, fd00::10
devices: [eth0, eth1]
nodeport-addresses: [192.168.0.0/16, fd00::/8]
routing: vxlan
vxlan-port: 4789
vxlan-vni: 7
service-cidr: 10.96.0.0/12, fd00:96::/108
masquerade: false
non-masquerade: [10.0.0.0/8, 'fd00::/8']
balancing: maglev
forwarding: dsr
xdp: native
cgroup-root: /sys/fs/cgroup
bpf-root: /sys/fs/bpf/other
state-dir: /srv/waggle
api-socket: /run/other.sock
api-group: waggle
beside-kube-proxy: true
cni-bin-dir: /opt/cni/bin
cni-conf-dir: /etc/cni/net.d
podman: podman --root /srv/containers
dns-address: 169.254.20.10, fd00::53
cluster-domain: k8s.example.org
metrics-address: '[::]:9970'
flow-events: off
event-rate: 50
flow-history: 1048576
flow-log: /var/log/waggle/flows.jsonl
flow-log-size: 1000000
max-services: 16
max-backends: 32
max-nat: 64
max-policy-flows: 1000
max-policy-names: 2000
policy-established: keep
nat-tcp-timeout: 3600
nat-udp-timeout: 60
drift-check: 5
log-level: warning
"""
    config = written(text)
    assert {name for name in SETTINGS if getattr(config, name) == getattr(AgentConfig(), name)} == set()
    assert (config.pod_cidr, config.node_ip) == (("10.244.1.0/24", "fd00:244:1::/64"), ("192.168.1.10", "fd00::10"))
    assert (config.devices, config.max_services, config.flow_events) == (("eth0", "eth1"), 16, "off")


def test_the_file_says_the_same_as_the_flags(written):
    flags = {
        "pod_cidr": ("10.244.1.0/24",),
        "bpf_root": Path("/a"),
        "masquerade": False,
        "max_nat": 99,
        "node_name": "a",
    }
    assert written("pod-cidr: 10.244.1.0/24\nbpf-root: /a\nmasquerade: no\nmax-nat: 99\nnode-name: a") == load_config(
        None, flags
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_documented(name: str):
    (help_text,) = [f.metadata["help"] for f in dataclasses.fields(AgentConfig) if f.name == name]
    assert help_text.endswith(".")


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pod-cdir: 10.0.0.0/8", "unknown setting 'pod-cdir'; did you mean 'pod-cidr'?"),
        ("max_services: 100", "unknown setting 'max_services'; did you mean 'max-services'?"),
        ("Masquerade: true", "unknown setting 'Masquerade'; did you mean 'masquerade'?"),
        ("zzz: 1", "unknown setting 'zzz'"),
        ("17: 1", "unknown setting 17"),
        ("null: 1", "unknown setting None"),
        ("- a\n- b", "must hold a mapping of settings"),
        ("just text", "must hold a mapping of settings"),
        ("0", "must hold a mapping of settings"),
        ("a: b: c", "is not valid YAML"),
        ("a: [1,", "is not valid YAML"),
        ("\tnode-name: a", "is not valid YAML"),
        ("node-name: !!python/object:os.system a", "is not valid YAML"),
        ("node-name: 2024-13-45", "is not valid YAML"),
        ("---\na: 1\n---\nb: 2", "is not valid YAML"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(tmp_path: Path, text: str, words: str):
    file = tmp_path / "agent.yaml"
    file.write_text(text)
    message = refused(file)
    assert message.startswith("config: ") and str(file) in message and words in message


def test_a_name_that_is_like_no_setting_gets_no_suggestion(tmp_path: Path):
    file = tmp_path / "agent.yaml"
    file.write_text("zzz: 1")
    assert "did you mean" not in refused(file)


def test_a_file_that_is_not_there_or_is_no_file(tmp_path: Path):
    assert refused(tmp_path / "missing") == f"config: cannot read {tmp_path}/missing: No such file or directory"
    assert refused(tmp_path) == f"config: cannot read {tmp_path}: Is a directory"


def test_a_file_that_is_no_text(tmp_path: Path):
    file = tmp_path / "agent.yaml"
    file.write_bytes(b"\xff\xfe\x00\x80")
    assert "is not valid YAML" in refused(file)


# -- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_made_absolute(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert getattr(load_config(None, {name: "some/where"}), name) == tmp_path / "some/where"
    assert getattr(load_config(None, {name: Path("/abs")}), name) == Path("/abs")


def test_in_cluster_is_no_path_but_a_word_of_kubeconfig_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {"kubeconfig": "in-cluster", "manifests": "in-cluster"})
    assert str(config.kubeconfig) == "in-cluster"
    assert config.manifests == tmp_path / "in-cluster"


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("value", ["''", "17", "true", "[/a]", "{a: b}"])
def test_a_path_must_be_a_path(written, name: str, value: str):
    with pytest.raises(ConfigError, match=f"^{flag(name)}: must be a path, not "):
        written(f"{flag(name)}: {value}")


@pytest.mark.parametrize("name", PATHS)
def test_null_turns_off_what_is_optional(written, name: str):
    if name in OPTIONAL_PATHS:
        assert getattr(written(f"{flag(name)}: null"), name) is None
        return
    with pytest.raises(ConfigError, match=f"^{flag(name)}: must be a path, not None"):
        written(f"{flag(name)}: null")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[eth0, eth1]", ("eth0", "eth1")),
        ("eth0", ("eth0",)),
        ("eth0,eth1", ("eth0", "eth1")),
        ("' eth0 , , eth1 '", ("eth0", "eth1")),
        ("[]", ()),
        ("''", ()),
        ("[' eth0 ', '']", ("eth0",)),
    ],
)
def test_a_list_may_be_written_as_a_list_or_with_commas(written, value: str, expected: tuple[str, ...]):
    assert written(f"devices: {value}").devices == expected


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("value", ["17", "[1]", "{a: b}", "null", "true", "[[a]]", "1.5"])
def test_a_list_must_hold_strings(written, name: str, value: str):
    with pytest.raises(ConfigError, match=f"^{flag(name)}: must be a list of strings, not "):
        written(f"{flag(name)}: {value}")


@pytest.mark.parametrize("value", ["1", "'true'", "null", "[]", "maybe"])
def test_masquerade_must_be_true_or_false(written, value: str):
    with pytest.raises(ConfigError, match=r"^masquerade: must be true or false, not "):
        written(f"masquerade: {value}")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["'100'", "1.5", "true", "null", "many", "[1]"])
def test_a_number_must_be_a_number(written, name: str, value: str):
    with pytest.raises(ConfigError, match=f"^{flag(name)}: must be a number, not "):
        written(f"{flag(name)}: {value}")


@pytest.mark.parametrize("name", ["node_name", "metrics_address", "log_level"])
@pytest.mark.parametrize("value", ["null", "true", "[a]", "{a: b}", "1.5", "2024-01-01"])
def test_a_string_must_be_a_string(written, name: str, value: str):
    with pytest.raises(ConfigError, match=f"^{flag(name)}: must be a string, not "):
        written(f"{flag(name)}: {value}")


def test_a_node_may_be_called_17(written):
    assert written("node-name: 17").node_name == "17"


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "node-1.example", "17", "a" * 253])
def test_node_names_that_may_be(name: str):
    assert load_config(None, {"node_name": name}).node_name == name


@pytest.mark.parametrize("name", ["my_host", "a b", "a/b", "a" * 254, "a\n", "nöde", "١"])
def test_node_names_that_may_not_be(name: str):
    assert refused(node_name=name).startswith("node-name: ")


@pytest.mark.parametrize("name", ["pod_cidr", "node_ip"])
@pytest.mark.parametrize("value", ["10.0.0", "10.0.0.0/33", "fd00::/129", "web", "10.0.0.1/24", "fe80::1%eth0", "0x1"])
def test_an_address_that_cannot_be_one_is_refused(name: str, value: str):
    message = refused(**{name: (value,)})
    assert message.startswith(f"{flag(name)}: ") and value.split("%")[0] in message


def test_a_host_within_a_range_is_no_range():
    assert "has host bits set" in refused(pod_cidr=("10.244.1.5/24",))


@pytest.mark.parametrize("values", [("10.0.0.1", "10.0.0.2"), ("fd00::1", "10.0.0.1", "fd00::2")])
def test_at_most_one_node_address_per_family(values: tuple[str, ...]):
    assert refused(node_ip=values).startswith("node-ip: more than one value of the same address family: ")


def test_several_pod_ranges_of_one_family_that_do_not_overlap():
    ranges = ("10.244.1.0/24", "10.244.9.0/24", "fd00:1::/64")
    assert load_config(None, {"pod_cidr": ranges}).pod_cidr == ranges
    assert refused(pod_cidr=("10.244.0.0/16", "10.244.9.0/24")) == "pod-cidr: 10.244.0.0/16 and 10.244.9.0/24 overlap"


def test_tunnels():
    assert refused(routing="gre") == "routing: 'gre' is not one of auto, native, vxlan"
    assert refused(vxlan_port=0).startswith("vxlan-port: must lie between 1 and 65535")
    assert refused(vxlan_vni=1 << 24).startswith("vxlan-vni: must lie between 1 and 16777215")


def test_addresses_become_canonical():
    config = load_config(None, {"node_ip": ("FD00:0::1", "10.0.0.1"), "pod_cidr": ("FD00:0:0::/64",)})
    assert (config.node_ip, config.pod_cidr) == (("fd00::1", "10.0.0.1"), ("fd00::/64",))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("value", "fits"), [(15, False), (16, True), (1 << 24, True), ((1 << 24) + 1, False), (-1, False)]
)
def test_table_sizes_have_bounds(name: str, value: int, fits: bool):
    if fits:
        assert getattr(load_config(None, {name: value}), name) == value
    else:
        assert refused(**{name: value}) == f"{flag(name)}: must lie between 16 and 16777216"


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_log_levels(level: str):
    assert load_config(None, {"log_level": level}).log_level == level


@pytest.mark.parametrize("level", ["", "INFO", "trace", "critical"])
def test_log_levels_there_are_not(level: str):
    assert refused(log_level=level) == f"log-level: {level!r} is not one of debug, info, warning, error"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9970", ("127.0.0.1", 9970)),
        ("[::1]:9970", ("::1", 9970)),
        (":9970", ("", 9970)),
        ("localhost:0", ("localhost", 0)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
        ("[::]:9970", ("::", 9970)),
    ],
)
def test_split_host_port(text: str, expected: tuple[str, int]):
    assert split_host_port(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "9970",
        "localhost",
        "localhost:",
        "localhost:http",
        "localhost:65536",
        "localhost:-1",
        "localhost:+1",
        "localhost: 1",
        "localhost:٣",
        "::1",
        "::1:9970",
        "[::1]",
        "[::1:9970",
        "::1]:9970",
    ],
)
def test_what_is_no_host_and_port(text: str):
    with pytest.raises(ConfigError, match=r"^metrics-address: .* is not HOST:PORT"):
        split_host_port(text)
    assert refused(metrics_address=text).startswith("metrics-address: ")


def test_the_empty_metrics_address_turns_it_off():
    assert load_config(None, {"metrics_address": ""}).metrics_address == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("10.96.0.1/16",), "has host bits set"),
        (("none", "10.96.0.0/16"), "'none' stands alone"),
        (("primary",), "primary"),
    ],
)
def test_service_ranges_are_networks_or_none(values: tuple[str, ...], words: str):
    text = refused(service_cidr=values)
    assert text.startswith("service-cidr: ") and words in text
    assert load_config(None, {"service_cidr": ("none",)}).service_cidr == ("none",)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("192.168.1.10/24",), "has host bits set"),
        (("primary", "10.0.0.0/8"), "'primary' stands alone"),
        (("eth0",), "eth0"),
    ],
)
def test_addresses_that_serve_node_ports_are_networks_or_primary(values: tuple[str, ...], words: str):
    text = refused(nodeport_addresses=values)
    assert text.startswith("nodeport-addresses: ") and words in text
    assert load_config(None, {"nodeport_addresses": ("primary",)}).nodeport_addresses == ("primary",)


@pytest.mark.parametrize(
    ("address", "allowed", "serves"),
    [
        ("10.0.0.1", (), True),
        ("127.0.0.1", (), True),
        ("10.0.0.1", ("10.0.0.0/8",), True),
        ("10.0.0.1", ("fd00::/8",), False),
        ("fd00::1", ("10.0.0.0/8", "fd00::/8"), True),
        ("127.0.0.1", ("10.0.0.0/8",), False),
        ("127.0.0.1", ("127.0.0.0/8",), True),
        ("10.0.0.1", ("primary",), True),
        ("10.0.0.2", ("primary",), False),
    ],
)
def test_which_addresses_serve_node_ports(address: str, allowed: tuple[str, ...], serves: bool):
    assert serves_nodeports(address, allowed, ("10.0.0.1", "")) is serves


def test_every_setting_is_a_flag_of_the_agent():
    assert set(SETTINGS) <= set(inspect.signature(agent.agent).parameters)


def test_dns_addresses() -> None:
    def of(**more: object) -> tuple[str, ...]:
        return load_config(None, more).dns_addresses

    assert of() == of(cni_conf_dir="/c", kubeconfig="/k") == of(cni_conf_dir="/c", dns_address=("none",)) == ()
    assert of(cni_conf_dir="/c") == ("169.254.53.53", "fd77:6167:676c::53")
    assert of(kubeconfig="/k", dns_address=("FD00::53",)) == ("fd00::53",)
    for bad in (("none", "10.0.0.1"), ("127.0.0.1",), ("224.0.0.1",), ("::",), ("fe80::1",), ("10.0.0.1", "10.0.0.2")):
        assert refused(dns_address=bad).startswith("dns-address: ")
    for bad in ("", "x_y", "-a", "a..b", "UPPER"):
        assert refused(cluster_domain=bad).startswith("cluster-domain: ")


@pytest.mark.parametrize(("setting", "off"), [("podman", "off"), ("flow-events", "off")])
def test_off_is_a_word_here_and_no_truth_value(written, setting: str, off: str):
    """YAML 1.1 reads it as false."""
    assert getattr(written(f"{setting}: off"), setting.replace("-", "_")) == off


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("flow-events: some", "flow-events: 'some' is not one of off, services, all"),
        ("flow-events: true", "flow-events: must be a string"),
        ("event-rate: 0", "event-rate: must lie between 1 and 1000000"),
        ("flow-history: -1", "flow-history: must lie between 0 and"),
        ("flow-log-size: 100", "flow-log-size: must be at least 65536 bytes"),
    ],
)
def test_settings_of_events(written, setting: str, words: str):
    with pytest.raises(ConfigError, match=f"^{words}"):
        written(setting)
