/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What lives on this node: its pods, by address, and the node's own addresses. One lookup says how to deliver.
 */
#ifndef WAGGLE_ENDPOINT_H
#define WAGGLE_ENDPOINT_H

#include <linux/bpf.h>
#include "addr.h"

enum wag_endpoint_flag {
	WAG_ENDPOINT_POD = 1,
	WAG_ENDPOINT_NODE = 2,
	WAG_ENDPOINT_NODEPORT = 4, /* an address of the node that serves NodePorts */
	WAG_ENDPOINT_QUEUED = 8,   /* a pod whose traffic is limited: by the queue of its host side */
};

struct wag_endpoint {
	__u32 ifindex; /* pod: its interface on the host side */
	__u32 flags;   /* enum wag_endpoint_flag */
	__u8 pod_mac[6];
	__u8 host_mac[6];
	__u32 nat_used; /* written by programs alone: some flow of this address is in wag_nat */
	__s32 netns;    /* id of the namespace of its sockets, as seen from the node's; WAG_NETNS_ID_NODE, WAG_NETNS_ID_UNKNOWN */
	__u32 pad;
	__u64 ingress_policy; /* pod: its set of policies, by wag_policy_assign alone; WAG_POLICY_NONE, WAG_POLICY_PENDING */
	__u64 egress_policy;
};

enum wag_netns_id {
	WAG_NETNS_ID_NODE = -1, /* BPF_F_CURRENT_NETNS: the programs run there */
	WAG_NETNS_ID_UNKNOWN = -2,
};

/* Key: address of a local pod or of the node. The agent writes (nat_used: programs). Local pods × families. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_addr);
	__type(value, struct wag_endpoint);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_endpoints SEC(".maps");

WAG_INLINE struct wag_endpoint *wag_endpoint_find(const struct wag_addr *addr)
{
	return bpf_map_lookup_elem(&wag_endpoints, addr);
}

WAG_INLINE bool wag_endpoint_is(const struct wag_endpoint *endpoint, __u32 flag)
{
	return endpoint && (endpoint->flags & flag);
}

/* From now on packets from and to this address are looked up in wag_nat. */
WAG_INLINE void wag_endpoint_mark_nat(struct wag_endpoint *endpoint)
{
	if (endpoint && !endpoint->nat_used)
		endpoint->nat_used = 1;
}

#endif
