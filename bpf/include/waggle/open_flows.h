/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The flows that a CPU knows to be open, without a look at what all CPUs know. */
#ifndef WAGGLE_OPEN_FLOWS_H
#define WAGGLE_OPEN_FLOWS_H

#include <linux/bpf.h>
#include "addr.h"
#include "conns.h"
#include "names.h"
#include "packet.h"
#include "policy_tables.h"
#include "policy_work.h"

/* A flow that was open when it was last looked up in wag_conns, as it was judged. */
struct wag_open_flow {
	struct wag_tuple flow;
	__u64 seen_ns; /* CLOCK_MONOTONIC, coarse: when that was; 0: never */
	__u32 revision; /* of wag_policy_state before that */
	__u32 pad;
};

#define WAG_OPEN_FLOWS 256 /* few enough to stay in the nearest cache, where a CPU asks for them with every packet */

struct wag_open_flows {
	struct wag_open_flow flow[WAG_OPEN_FLOWS];
};

/*
 * Key 0; in it, some bits of the flow. Programs alone. What this CPU need not look up in wag_conns for a second: a long hash and
 * three cache lines that are seldom near. One value, since every other one would be a place of its own in memory.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_open_flows);
	__uint(max_entries, 1);
} wag_open_flows SEC(".maps");

/* Where the flow that is judged may be remembered as open. */
WAG_INLINE __u32 wag_open_flow_slot(const struct wag_packet *packet, const struct wag_tuple *to)
{
	const struct wag_tuple *from = &packet->tuple;
	__u64 hash = from->src.half[0] ^ from->src.half[1];

	hash = (hash ^ (__u64)from->sport << 16 ^ to->dport) * 0x9e3779b97f4a7c15ULL;
	hash = (hash ^ to->dst.half[0] ^ to->dst.half[1]) * 0x9e3779b97f4a7c15ULL;
	return hash >> 32 & (WAG_OPEN_FLOWS - 1);
}

WAG_INLINE struct wag_open_flow *wag_open_flow_at(__u32 slot)
{
	__u32 zero = 0;
	struct wag_open_flows *open = bpf_map_lookup_elem(&wag_open_flows, &zero);

	return open ? &open->flow[slot & (WAG_OPEN_FLOWS - 1)] : NULL;
}

/* Was it open within the last second, and has nothing changed since? */
WAG_INLINE bool wag_open_flow_is(const struct wag_open_flow *open, const struct wag_packet *packet,
				 const struct wag_tuple *to, __u32 revision, __u64 now)
{
	return open->revision == revision && now - open->seen_ns < WAG_CONN_COARSE_NS &&
	       wag_addr_equal(&open->flow.src, &packet->tuple.src) && wag_addr_equal(&open->flow.dst, &to->dst) &&
	       open->flow.sport == packet->tuple.sport && open->flow.dport == to->dport &&
	       open->flow.proto == packet->tuple.proto;
}

/* Servers' answers are read, and what is said to them may change whose the flow is; errors are about other flows. */
WAG_INLINE bool wag_open_flow_counts(const struct wag_packet *packet, const struct wag_tuple *to)
{
	return packet->has_ports && packet->tuple.sport != bpf_htons(WAG_DNS_PORT) &&
	       to->dport != bpf_htons(WAG_DNS_PORT);
}

/*
 * Is it a flow that was open within the last second, with nothing changed since? Notes where it has its place, and what is as new as
 * its judgement will be.
 */
WAG_INLINE bool wag_open_flow_find(const struct wag_packet *packet, const struct wag_tuple *to,
				   struct wag_policy_work *work)
{
	struct wag_policy_state *state;
	struct wag_open_flow *open;
	__u32 zero = 0;

	work->slot = WAG_OPEN_FLOWS;
	state = bpf_map_lookup_elem(&wag_policy_state, &zero);
	if (!state || !wag_open_flow_counts(packet, to))
		return false;
	work->revision = state->revision;
	barrier(); /* what is read from now on is at least as new */
	work->slot = wag_open_flow_slot(packet, to);
	open = wag_open_flow_at(work->slot);
	return open && wag_open_flow_is(open, packet, to, work->revision, work->now);
}

/* It is open, as it was judged. */
WAG_INLINE void wag_open_flow_note(const struct wag_policy_work *work)
{
	struct wag_open_flow *open = work->slot < WAG_OPEN_FLOWS ? wag_open_flow_at(work->slot) : NULL;

	if (!open)
		return;
	open->flow = work->flow;
	open->seen_ns = work->now;
	open->revision = work->revision;
}

#endif
