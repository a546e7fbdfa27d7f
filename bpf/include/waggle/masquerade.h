/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Masquerade: what pods send out of the cluster gets this node's address, since nobody out there knows a way to a pod.
 * Flows begin here only, with their first packet: what a pod answers to somebody out there who did reach it is left
 * alone. Their packets then find their entries in wag_nat as those of every translated flow do.
 */
#ifndef WAGGLE_MASQUERADE_H
#define WAGGLE_MASQUERADE_H

#include <linux/bpf.h>
#include "config.h"
#include "nat.h"
#include "packet.h"

/* Is there a way to pods from this address? */
WAG_INLINE bool wag_knows_pods(const struct wag_addr *addr)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < WAG_NETWORKS; i++) {
		if (i >= wag_non_masquerade.count)
			break;
		if ((addr->half[0] & wag_non_masquerade.at[i].mask.half[0]) == wag_non_masquerade.at[i].addr.half[0] &&
		    (addr->half[1] & wag_non_masquerade.at[i].mask.half[1]) == wag_non_masquerade.at[i].addr.half[1])
			return true;
	}
	return false;
}

/*
 * Of a packet from a local pod to somewhere else: does a flow begin that needs the node's address? A pod whose own
 * address is none of those networks' can be reached from everywhere.
 */
WAG_INLINE bool wag_leaves_cluster(const struct wag_packet *packet)
{
	const struct wag_addr *to = &packet->tuple.dst;

	if (!wag_masquerade || !packet->begins || packet->later_fragment)
		return false;
	if (wag_addr_stays_on_link(to))
		return false;
	return !wag_knows_pods(to) && wag_knows_pods(&packet->tuple.src);
}

/* The packet, and its flow, get the node's address. Returns enum wag_verdict. */
WAG_INLINE enum wag_verdict wag_masquerade_begin(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_scratch *scratch = wag_scratch_get();
	int reason;

	if (!scratch)
		return WAG_DROP;
	scratch->to = packet->tuple;
	if (!wag_node_address(&scratch->to.src, packet))
		return wag_drop(packet, WAG_REASON_NO_NODE_IP);
	reason = wag_nat_create(ctx, packet, scratch, 0);
	if (reason)
		return wag_drop(packet, reason);
	wag_endpoint_mark_nat(wag_endpoint_find(&packet->tuple.src));
	wag_endpoint_mark_nat(wag_endpoint_find(&scratch->to.src));
	wag_count(WAG_COUNTER_MASQUERADE);
	if (wag_events == WAG_EVENTS_OF_ALL)
		wag_direct_record(packet);
	return wag_translate(ctx, packet, &scratch->to);
}

/*
 * Somebody out of the cluster sends a datagram to a pod's own address: what the pod answers must not be masqueraded, so
 * that its flow gets an entry that changes nothing. Of other protocols the first packet shows who began.
 */
WAG_INLINE void wag_masquerade_spare(wag_ctx *ctx, struct wag_packet *packet, struct wag_endpoint *pod)
{
	struct wag_scratch *scratch = wag_scratch_get();
	struct wag_nat *nat;

	if (!scratch)
		return;
	wag_tuple_reverse(&scratch->to, &packet->tuple);
	nat = bpf_map_lookup_elem(&wag_nat, &scratch->to);
	if (nat) {
		if (nat->flags & WAG_NAT_ALONE)
			nat->seen_ns = bpf_ktime_get_ns();
		return;
	}
	wag_nat_create_alone(scratch, &scratch->to, 0, 0, BPF_NOEXIST);
	wag_endpoint_mark_nat(pod);
}

/* Does that need to be? */
WAG_INLINE bool wag_comes_from_outside(const struct wag_packet *packet)
{
	return wag_masquerade && packet->tuple.proto == IPPROTO_UDP && packet->has_ports &&
	       !wag_knows_pods(&packet->tuple.src) && wag_knows_pods(&packet->tuple.dst);
}

#endif
