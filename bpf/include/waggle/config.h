/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the agent fixes when it loads the programs. The verifier prunes the code of everything that is off. The text
 * of each tag is the documentation: the Python side and docs/reference are generated from it.
 */
#ifndef WAGGLE_CONFIG_H
#define WAGGLE_CONFIG_H

#include "addr.h"

#define WAG_CONFIG(type, name, text) \
	const volatile type name __attribute__((btf_decl_tag("config: " text)))

#define WAG_NETWORKS 16

struct wag_network {
	struct wag_addr addr;
	struct wag_addr mask;
};

struct wag_networks {
	__u32 count;
	__u32 pad;
	struct wag_network at[WAG_NETWORKS];
};

WAG_CONFIG(struct wag_addr, wag_node_ip4, "IPv4 address of this node: source of SNAT; all zero when it has none");
WAG_CONFIG(struct wag_addr, wag_node_ip6, "IPv6 address of this node: source of SNAT; all zero when it has none");
WAG_CONFIG(__u64, wag_host_cookie, "cookie of the node's network namespace: its sockets may use 127.0.0.1:nodePort");
WAG_CONFIG(__u8, wag_loopback_nodeport, "1: the node's own sockets reach NodePorts by loopback addresses");
WAG_CONFIG(__u8, wag_events, "flows that are aggregated and emitted as events: 0 none, 1 those to Services, 2 all of pods");
WAG_CONFIG(__u64, wag_event_gap_ns, "mean time between two events of one kind that a CPU emits, in nanoseconds; they may come in bursts");
WAG_CONFIG(__u16, wag_snat_min, "lowest source port that SNAT picks");
WAG_CONFIG(__u16, wag_snat_max, "highest source port that SNAT picks");
WAG_CONFIG(__u32, wag_young_flows, "so many flows may have begun and not be confirmed: the size of wag_nat_young");
WAG_CONFIG(__u32, wag_tcp_seconds, "how long a translated TCP connection lives without a packet, in seconds");
WAG_CONFIG(__u32, wag_udp_seconds, "how long a translated UDP flow lives without a packet, in seconds");
WAG_CONFIG(__u32, wag_sweep_seconds, "time between two sweeps over the NAT table, in seconds");
WAG_CONFIG(__u8, wag_masquerade, "1: what pods send out of the cluster gets the node's address");
WAG_CONFIG(struct wag_networks, wag_non_masquerade, "networks that know a way to pods: nothing sent there is masqueraded");
WAG_CONFIG(__u8, wag_beside_proxy, "1: established flows that the NAT table does not know are another proxy's");
WAG_CONFIG(__u32, wag_names_share, "so many addresses of names one pod may add to wag_names in a minute");
WAG_CONFIG(__u64, wag_event_ns, "shortest time between two events of one flow, in nanoseconds");

#endif
