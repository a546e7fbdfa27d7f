/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The table of translated flows. */
#ifndef WAGGLE_NAT_TABLE_H
#define WAGGLE_NAT_TABLE_H

#include <linux/bpf.h>
#include "addr.h"
#include "packet.h"

enum wag_nat_flag {
	WAG_NAT_FORWARD = 1, /* client to backend */
	WAG_NAT_CLOSING = 2, /* FIN seen in this direction */
	WAG_NAT_TUNNEL = 4,  /* client to backend: sent inside another packet; replies: the other direction came so */
	WAG_NAT_ALONE = 8,   /* there is no entry for the other direction */
	WAG_NAT_ANSWERED = 16,  /* replies: there was one */
	WAG_NAT_RESET = 64,     /* RST seen in this direction, and nothing since */
	WAG_NAT_CONFIRMED = 32, /* client to backend: the client went on after an answer; alone: after the first packet */
};

struct wag_nat {
	struct wag_tuple to;   /* what the packet becomes */
	__u32 revision;        /* of the Service when its backend was last found valid; 0: a direct flow */
	__u32 flags;           /* enum wag_nat_flag */
	__u64 seen_ns;         /* CLOCK_MONOTONIC, coarse to one second */
	__u64 number;          /* of the flow, in the order they began */
};

/* A flow that has begun. */
struct wag_nat_young {
	struct wag_tuple key; /* the client's packets */
	__u64 number;
};

/*
 * Key: tuple of a packet. Programs write, and take out what is over (sweep.h); the agent reads. Two entries per translated
 * flow. Memory is taken as flows come.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_tuple);
	__type(value, struct wag_nat);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_nat SEC(".maps");

/*
 * Key: number of a flow modulo the size. Programs alone. The last flows that began: whoever comes after so many others
 * takes the place of one, and with it, unless it was confirmed, its entries. So a flood of beginnings
 * cannot fill the table.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_nat_young);
	__uint(max_entries, 16384);
} wag_nat_young SEC(".maps");

struct wag_nat_count {
	__u64 begun;
	__u64 displaced; /* by others, before they were confirmed */
};

/* Key 0. Programs count, the agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_nat_count);
	__uint(max_entries, 1);
} wag_nat_counts SEC(".maps");

WAG_INLINE void wag_tuple_reverse(struct wag_tuple *out, const struct wag_tuple *in)
{
	out->src = in->dst;
	out->dst = in->src;
	out->sport = in->dport;
	out->dport = in->sport;
	out->proto = in->proto;
	__builtin_memset(out->pad, 0, sizeof(out->pad));
}

WAG_INLINE bool wag_tuple_equal(const struct wag_tuple *a, const struct wag_tuple *b)
{
	return wag_addr_equal(&a->src, &b->src) && wag_addr_equal(&a->dst, &b->dst) && a->sport == b->sport &&
	       a->dport == b->dport && a->proto == b->proto;
}

/* The other half of a flow's entry `nat`, whose own key is `key`: NULL where it is gone, or another flow's by now. */
WAG_INLINE struct wag_nat *wag_nat_other(const struct wag_tuple *key, const struct wag_nat *nat, struct wag_tuple *half)
{
	struct wag_nat *other;
	struct wag_tuple back;

	if (nat->flags & WAG_NAT_ALONE)
		return NULL;
	wag_tuple_reverse(half, &nat->to);
	other = bpf_map_lookup_elem(&wag_nat, half);
	if (!other)
		return NULL;
	wag_tuple_reverse(&back, &other->to);
	return wag_tuple_equal(&back, key) ? other : NULL;
}

#endif
