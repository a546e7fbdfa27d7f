/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What judging a packet needs besides, and has no room for on the stack. */
#ifndef WAGGLE_POLICY_WORK_H
#define WAGGLE_POLICY_WORK_H

#include <linux/bpf.h>
#include "addr.h"
#include "conns.h"
#include "names.h"
#include "packet.h"
#include "policy_tables.h"

#define WAG_POLICY_ASK_NAMES 4 /* besides enum wag_policy_flag: names may say something else */

/* What names are asked, where no other rule has allowed a flow. */
struct wag_name_query {
	__u64 set;
	__u64 peer;    /* WAG_NAME_CLASS, or that and WAG_NAME_STRICT */
	__u32 place;
	__u16 admin;   /* where the tiers ended without names */
	__u16 baseline;
	struct wag_policy_key key;
	__u32 low;
	__u32 high;
	__u32 middle;
	__u32 now;
	__u32 verdict; /* without names */
	__u32 pad;
};

/* What does not fit on the stack. */
struct wag_policy_work {
	struct wag_tuple flow; /* as it is judged */
	__u64 now;             /* CLOCK_MONOTONIC_COARSE, read once for a packet */
	__u32 revision;        /* of wag_policy_state, before anything else was looked at */
	__u32 slot;            /* in wag_open_flows; WAG_OPEN_FLOWS: none */
	struct wag_tuple back; /* the same, turned round */
	struct wag_tuple key;  /* of wag_conns */
	struct wag_tuple inner; /* what an ICMP error is about */
	struct wag_conn conn;
	struct wag_name_key name; /* what is judged, where names may decide */
	struct wag_name_query query;
	__u32 had;     /* pattern by which a flow that is judged again was allowed */
	__u32 pattern; /* pattern by which it is now */
	__u64 asker;   /* egress policies of the pod that a DNS answer is for */
	__u32 asker_ifindex;
	__u32 pad;
	/* by whom the packet would have been dropped that `audit` tells of */
	__u64 audit_policy[2]; /* by direction, ingress first */
	__u32 audit_rule[2];
};

/* Key 0. Programs alone, each for the time it runs, as wag_scratch. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_policy_work);
	__uint(max_entries, 1);
} wag_policy_work SEC(".maps");

WAG_INLINE struct wag_policy_work *wag_policy_work_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&wag_policy_work, &zero);
}

#endif
