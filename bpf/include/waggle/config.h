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

WAG_CONFIG(struct wag_addr, wag_node_ip4, "IPv4 address of this node: source of SNAT; all zero when it has none");
WAG_CONFIG(struct wag_addr, wag_node_ip6, "IPv6 address of this node: source of SNAT; all zero when it has none");
WAG_CONFIG(__u64, wag_host_cookie, "cookie of the node's network namespace: its sockets may use 127.0.0.1:nodePort");
WAG_CONFIG(__u8, wag_events, "1: Service translations are aggregated per flow and emitted as events");
WAG_CONFIG(__u16, wag_snat_min, "lowest source port that SNAT picks when the client's own is taken");
WAG_CONFIG(__u16, wag_snat_max, "highest source port that SNAT picks");
WAG_CONFIG(__u64, wag_event_ns, "shortest time between two events of one flow, in nanoseconds");

#endif
