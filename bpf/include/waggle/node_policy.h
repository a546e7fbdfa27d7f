/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which policies the node's own traffic has. New ones are tried before they are confirmed, and it is the programs that end a
 * trial: the agent may be gone by then, because of them.
 */
#ifndef WAGGLE_NODE_POLICY_H
#define WAGGLE_NODE_POLICY_H

#include <linux/bpf.h>
#include "addr.h"

/* Sets of wag_policy; 0: none, everything passes. */
struct wag_node_policy {
	__u64 ingress;        /* confirmed */
	__u64 egress;
	__u64 trial_ingress;  /* in force instead, for now */
	__u64 trial_egress;
	__u64 trial_until_ns; /* CLOCK_BOOTTIME; 0: there is no trial */
};

/* Key 0. The agent writes. A word at a time, with `trial_until_ns` last where a trial begins and first where it ends. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_node_policy);
	__uint(max_entries, 1);
} wag_node_policy SEC(".maps");

WAG_INLINE struct wag_node_policy *wag_node_policy_find(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&wag_node_policy, &zero);
}

WAG_INLINE bool wag_node_policy_tried(const struct wag_node_policy *own)
{
	return own->trial_until_ns && bpf_ktime_get_boot_ns() < own->trial_until_ns;
}

#endif
