/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Flows of isolated pods: who has opened them, and may still. */
#ifndef WAGGLE_CONNS_H
#define WAGGLE_CONNS_H

#include <linux/bpf.h>
#include <linux/in.h>
#include "access.h"
#include "addr.h"
#include "config.h"
#include "nat_table.h"
#include "packet.h"

struct wag_conn {
	__u64 seen_ns;  /* CLOCK_MONOTONIC, coarse to one second */
	__u32 revision; /* that it was judged by */
	__u16 opened;   /* by whom: 1 the smaller end, 2 the greater one */
	__u16 may;      /* which of them still may, by that revision; none: the flow is cut */
	__u32 pattern;  /* of the name that it was allowed by; 0: by none. As long as policies accept that, however old */
	__u32 pad;
};

/*
 * Key: flow of an isolated pod, with the smaller end as source. Programs write and evict (LRU): what is evicted is judged
 * again, and begins anew by the next packet that policies allow. Flows that are cut stay: what the other end has still to say
 * does not open them.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct wag_tuple);
	__type(value, struct wag_conn);
	__uint(max_entries, 131072);
} wag_conns SEC(".maps");

/* The key of a flow, and which end its source is: 1 or 2. */
WAG_INLINE __u32 wag_conn_key(struct wag_tuple *key, const struct wag_tuple *flow)
{
	bool greater;

	if (flow->src.half[0] != flow->dst.half[0])
		greater = flow->src.half[0] > flow->dst.half[0];
	else if (flow->src.half[1] != flow->dst.half[1])
		greater = flow->src.half[1] > flow->dst.half[1];
	else
		greater = flow->sport > flow->dport;
	if (greater) {
		wag_tuple_reverse(key, flow);
		return 2;
	}
	*key = *flow;
	return 1;
}

WAG_INLINE bool wag_conn_lives(const struct wag_conn *conn, __u8 proto, __u64 now)
{
	__u64 most = (__u64)(proto == IPPROTO_TCP ? wag_tcp_seconds : wag_udp_seconds) * 1000000000ULL;

	return now - conn->seen_ns <= most || (__s64)(now - conn->seen_ns) < 0;
}

#define WAG_CONN_COARSE_NS 1000000000ULL

/* Is it open? Packets of one that is cut do not make it live longer. */
WAG_INLINE bool wag_conn_open(struct wag_conn *conn, __u64 now)
{
	if (!conn || !conn->may)
		return false;
	if (now - conn->seen_ns > WAG_CONN_COARSE_NS)
		conn->seen_ns = now;
	return true;
}

#define WAG_ANSWER_NS (30 * 1000000000ULL) /* so long after a flow was cut a datagram of it may be an answer */

/* Is the packet part of a flow that was cut? Not one that begins a connection itself. */
WAG_INLINE bool wag_conn_cut(const struct wag_conn *conn, const struct wag_packet *packet, __u64 now)
{
	if (!conn || conn->may || wag_begins(packet))
		return false;
	return wag_is_established(packet) || now - conn->seen_ns < WAG_ANSWER_NS;
}

#endif
