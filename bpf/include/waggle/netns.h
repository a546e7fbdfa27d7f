/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Network namespaces by cookie: the address a socket will have, before it has one. */
#ifndef WAGGLE_NETNS_H
#define WAGGLE_NETNS_H

#include <linux/bpf.h>
#include "addr.h"

/* A pod's addresses, or the node's own; all zero for a family it has none of. */
struct wag_netns {
	struct wag_addr ip4;
	struct wag_addr ip6;
};

/* Key: cookie of a network namespace. The agent writes. One entry per local pod, and one for the node. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64);
	__type(value, struct wag_netns);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_netns SEC(".maps");

#endif
