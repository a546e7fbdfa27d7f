"""`waggle agent` and `waggle cleanup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from waggle.cli.output import Output, OutputFormat, console, print_json
from waggle.config import AgentConfig, load_config

_HELP = {name: f.metadata["help"] for name, f in AgentConfig.__dataclass_fields__.items()}


def agent(
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same settings as these flags.", readable=False)
    ] = None,
    node_name: Annotated[str | None, typer.Option(help=_HELP["node_name"])] = None,
    manifests: Annotated[Path | None, typer.Option(help=_HELP["manifests"], metavar="DIR", readable=False)] = None,
    kubeconfig: Annotated[Path | None, typer.Option(help=_HELP["kubeconfig"], metavar="FILE", readable=False)] = None,
    kubernetes_netns: Annotated[
        Path | None, typer.Option(help=_HELP["kubernetes_netns"], metavar="PATH", readable=False)
    ] = None,
    pod_cidr: Annotated[
        list[str] | None, typer.Option(help=_HELP["pod_cidr"] + " Repeat or separate by commas.")
    ] = None,
    node_ip: Annotated[list[str] | None, typer.Option(help=_HELP["node_ip"] + " Repeat or separate by commas.")] = None,
    devices: Annotated[list[str] | None, typer.Option(help=_HELP["devices"] + " Repeat or separate by commas.")] = None,
    nodeport_addresses: Annotated[
        list[str] | None, typer.Option(help=_HELP["nodeport_addresses"] + " Repeat or separate by commas.")
    ] = None,
    routing: Annotated[str | None, typer.Option(help=_HELP["routing"])] = None,
    vxlan_port: Annotated[int | None, typer.Option(help=_HELP["vxlan_port"])] = None,
    vxlan_vni: Annotated[int | None, typer.Option(help=_HELP["vxlan_vni"])] = None,
    service_cidr: Annotated[
        list[str] | None, typer.Option(help=_HELP["service_cidr"] + " Repeat or separate by commas.")
    ] = None,
    masquerade: Annotated[bool | None, typer.Option("--masquerade/--no-masquerade", help=_HELP["masquerade"])] = None,
    non_masquerade: Annotated[
        list[str] | None, typer.Option(help=_HELP["non_masquerade"] + " Repeat or separate by commas.")
    ] = None,
    balancing: Annotated[str | None, typer.Option(help=_HELP["balancing"])] = None,
    forwarding: Annotated[str | None, typer.Option(help=_HELP["forwarding"])] = None,
    xdp: Annotated[str | None, typer.Option(help=_HELP["xdp"])] = None,
    drift_check: Annotated[int | None, typer.Option(help=_HELP["drift_check"])] = None,
    beside_kube_proxy: Annotated[
        bool | None, typer.Option("--beside-kube-proxy/--no-beside-kube-proxy", help=_HELP["beside_kube_proxy"])
    ] = None,
    cgroup_root: Annotated[Path | None, typer.Option(help=_HELP["cgroup_root"], metavar="DIR", readable=False)] = None,
    bpf_root: Annotated[Path | None, typer.Option(help=_HELP["bpf_root"], metavar="DIR", readable=False)] = None,
    state_dir: Annotated[Path | None, typer.Option(help=_HELP["state_dir"], metavar="DIR", readable=False)] = None,
    api_socket: Annotated[Path | None, typer.Option(help=_HELP["api_socket"], metavar="PATH", readable=False)] = None,
    api_group: Annotated[str | None, typer.Option(help=_HELP["api_group"], metavar="GROUP")] = None,
    cni_bin_dir: Annotated[Path | None, typer.Option(help=_HELP["cni_bin_dir"], metavar="DIR", readable=False)] = None,
    cni_conf_dir: Annotated[
        Path | None, typer.Option(help=_HELP["cni_conf_dir"], metavar="DIR", readable=False)
    ] = None,
    podman: Annotated[str | None, typer.Option(help=_HELP["podman"])] = None,
    dns_address: Annotated[
        list[str] | None, typer.Option(help=_HELP["dns_address"] + " Repeat or separate by commas.")
    ] = None,
    cluster_domain: Annotated[str | None, typer.Option(help=_HELP["cluster_domain"])] = None,
    metrics_address: Annotated[str | None, typer.Option(help=_HELP["metrics_address"], metavar="HOST:PORT")] = None,
    flow_events: Annotated[str | None, typer.Option(help=_HELP["flow_events"])] = None,
    event_rate: Annotated[int | None, typer.Option(help=_HELP["event_rate"])] = None,
    flow_history: Annotated[int | None, typer.Option(help=_HELP["flow_history"], metavar="BYTES")] = None,
    flow_log: Annotated[Path | None, typer.Option(help=_HELP["flow_log"], metavar="FILE", readable=False)] = None,
    flow_log_size: Annotated[int | None, typer.Option(help=_HELP["flow_log_size"], metavar="BYTES")] = None,
    max_services: Annotated[int | None, typer.Option(help=_HELP["max_services"])] = None,
    max_backends: Annotated[int | None, typer.Option(help=_HELP["max_backends"])] = None,
    max_nat: Annotated[int | None, typer.Option(help=_HELP["max_nat"])] = None,
    policy_established: Annotated[str | None, typer.Option(help=_HELP["policy_established"])] = None,
    max_policy_flows: Annotated[int | None, typer.Option(help=_HELP["max_policy_flows"])] = None,
    max_policy_names: Annotated[int | None, typer.Option(help=_HELP["max_policy_names"])] = None,
    nat_tcp_timeout: Annotated[int | None, typer.Option(help=_HELP["nat_tcp_timeout"])] = None,
    nat_udp_timeout: Annotated[int | None, typer.Option(help=_HELP["nat_udp_timeout"])] = None,
    log_level: Annotated[str | None, typer.Option(help=_HELP["log_level"])] = None,
) -> None:
    """Run the agent of this node.

    It loads the data path, keeps it as Kubernetes or a directory of manifests say, and answers CNI requests. Ending it
    leaves the data path at work; `waggle cleanup` removes everything.
    """
    from waggle.agent.daemon import run_agent  # imported here: other commands start without it

    flags = {
        "node_name": node_name,
        "manifests": manifests,
        "kubeconfig": kubeconfig,
        "kubernetes_netns": kubernetes_netns,
        "pod_cidr": _flat(pod_cidr),
        "node_ip": _flat(node_ip),
        "devices": _flat(devices),
        "nodeport_addresses": _flat(nodeport_addresses),
        "routing": routing,
        "vxlan_port": vxlan_port,
        "vxlan_vni": vxlan_vni,
        "service_cidr": _flat(service_cidr),
        "masquerade": masquerade,
        "non_masquerade": _flat(non_masquerade),
        "balancing": balancing,
        "forwarding": forwarding,
        "xdp": xdp,
        "drift_check": drift_check,
        "beside_kube_proxy": beside_kube_proxy,
        "cgroup_root": cgroup_root,
        "bpf_root": bpf_root,
        "state_dir": state_dir,
        "api_socket": api_socket,
        "api_group": api_group,
        "cni_bin_dir": cni_bin_dir,
        "cni_conf_dir": cni_conf_dir,
        "podman": podman,
        "dns_address": _flat(dns_address),
        "cluster_domain": cluster_domain,
        "metrics_address": metrics_address,
        "flow_events": flow_events,
        "event_rate": event_rate,
        "flow_history": flow_history,
        "flow_log": flow_log,
        "flow_log_size": flow_log_size,
        "max_services": max_services,
        "max_backends": max_backends,
        "max_nat": max_nat,
        "policy_established": policy_established,
        "max_policy_flows": max_policy_flows,
        "max_policy_names": max_policy_names,
        "nat_tcp_timeout": nat_tcp_timeout,
        "nat_udp_timeout": nat_udp_timeout,
        "log_level": log_level,
    }
    run_agent(load_config(config, flags))


def cleanup(
    bpf_root: Annotated[
        Path, typer.Option(envvar="WAGGLE_BPF_ROOT", help=_HELP["bpf_root"], metavar="DIR", readable=False)
    ] = Path("/sys/fs/bpf/waggle"),
    state_dir: Annotated[Path, typer.Option(help=_HELP["state_dir"], metavar="DIR", readable=False)] = Path(
        "/var/lib/waggle"
    ),
    api_socket: Annotated[
        Path, typer.Option(envvar="WAGGLE_API_SOCKET", help=_HELP["api_socket"], metavar="PATH", readable=False)
    ] = Path("/run/waggle/agent.sock"),
    cni_bin_dir: Annotated[Path, typer.Option(help="Directory of CNI plugins.", metavar="DIR", readable=False)] = Path(
        "/opt/cni/bin"
    ),
    cni_conf_dir: Annotated[
        Path, typer.Option(help="Directory of networks that container runtimes read.", metavar="DIR", readable=False)
    ] = Path("/etc/cni/net.d"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Remove everything waggle ever put on this node, and print what.

    The network's CNI configuration and plugin, programs and links, pinned maps, the process that answers health ports,
    pods' interfaces, routes, address reservations, the socket. Refuses while an agent runs.
    """
    from waggle.reconcile.cleanup import clean_node
    from waggle.sources.cni_install import installed

    cni = installed(cni_bin_dir, cni_conf_dir, api_socket)
    removed = clean_node(bpf_root, state_dir, api_socket, cni, dry_run=dry_run)
    if output is OutputFormat.JSON:
        print_json({"dryRun": dry_run, "removed": [{"kind": kind, "name": name} for kind, name in removed]})
        return
    for kind, name in removed:
        console().print(f"{'would remove' if dry_run else 'removed'} {kind} {name}")
    if not removed:
        console().print("nothing of waggle is on this node")


def _flat(values: list[str] | None) -> tuple[str, ...] | None:
    if not values:
        return None
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())
