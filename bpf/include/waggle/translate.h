/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Packets to Services: which backend, from which source. */
#ifndef WAGGLE_TRANSLATE_H
#define WAGGLE_TRANSLATE_H

#include <linux/bpf.h>
#include "affinity.h"
#include "endpoint.h"
#include "event.h"
#include "nat.h"
#include "packet.h"
#include "ranges.h"
#include "service.h"
#include "tunnel.h"

/* A function of its own, so that its key is not on the stack of everything else. */
static __noinline int wag_translation_record(struct wag_packet *packet, struct wag_tuple *to)
{
	struct wag_flow_key flow = {};

	if (!packet || !to)
		return 0;
	flow.src = packet->tuple.src;
	flow.frontend = packet->tuple.dst;
	flow.backend = to->dst;
	flow.fport = packet->tuple.dport;
	flow.bport = to->dport;
	flow.proto = to->proto;
	flow.hook = packet->hook;
	return wag_flow_record(&flow, packet->hook, packet->tuple.sport);
}

/* Does what comes in by this hook come from outside of the node? */
WAG_INLINE bool wag_from_outside(const struct wag_packet *packet)
{
	return packet->hook == WAG_HOOK_NODE_INGRESS || packet->hook == WAG_HOOK_XDP;
}

WAG_INLINE __u64 wag_mix(__u64 hash, __u64 value)
{
	hash = (hash ^ value) * 0x9e3779b97f4a7c15ULL;
	return hash ^ (hash >> 32);
}

/*
 * The number that chooses a new flow's backend: the same on every node where the Service wants that, of the flow, or of
 * its client alone where that stays with its backend.
 */
WAG_INLINE __u32 wag_flow_number(const struct wag_service *service, const struct wag_tuple *tuple)
{
	__u64 hash;

	if (!(service->flags & WAG_SERVICE_BY_HASH))
		return bpf_get_prandom_u32();
	hash = wag_mix(wag_mix(0, tuple->src.half[0]), tuple->src.half[1]);
	if (!service->affinity_s) {
		hash = wag_mix(wag_mix(hash, tuple->dst.half[0]), tuple->dst.half[1]);
		hash = wag_mix(hash, (__u64)tuple->proto << 32 | (__u64)tuple->sport << 16 | tuple->dport);
	}
	return (__u32)wag_mix(hash, hash >> 29);
}

/* A flow that another node will answer: which one, and that is all there is to know. Returns enum wag_reason. */
WAG_INLINE int wag_tunnel_begin(struct wag_packet *packet, struct wag_service *service, struct wag_scratch *scratch)
{
	/* as in wag_nat_create: of UDP answers may still come from where it went before */
	if (packet->tuple.proto == IPPROTO_TCP)
		wag_nat_forget(&packet->tuple, -1ULL);
	/* where a hash chooses, the next packet finds the same backend without an entry */
	if (wag_nat_create_alone(scratch, &packet->tuple, service->revision, WAG_NAT_TUNNEL, BPF_ANY))
		return service->flags & WAG_SERVICE_BY_HASH ? WAG_REASON_NONE : WAG_REASON_NAT_FULL;
	wag_endpoint_mark_nat(wag_endpoint_find(&packet->tuple.dst));
	wag_count(WAG_COUNTER_PACKET_LB);
	if (wag_events)
		wag_translation_record(packet, &scratch->to);
	return WAG_REASON_NONE;
}

/* A flow to a Service begins: chooses its backend and its source, into scratch->to. Returns enum wag_reason. */
static __noinline int wag_service_begin(wag_ctx *ctx, struct wag_packet *packet, struct wag_service *service,
					struct wag_scratch *scratch)
{
	struct wag_endpoint *local, *client;
	struct wag_backend backend = {};
	struct wag_tuple *to;
	int reason;

	if (!packet || !service || !scratch)
		return WAG_REASON_STALE_BACKEND;
	if (packet->later_fragment)
		return WAG_REASON_FRAGMENT;
	if (!wag_service_admits(service, &packet->tuple.src))
		return WAG_REASON_SOURCE_RANGE;
	if (!service->count)
		return wag_service_empty(service);
	if (!wag_backend_choose(service, &packet->tuple.src, wag_flow_number(service, &packet->tuple), &backend))
		return WAG_REASON_STALE_BACKEND;

	to = &scratch->to;
	*to = packet->tuple;
	to->dst = backend.addr;
	to->dport = backend.port;
	local = wag_endpoint_find(&backend.addr);
	client = wag_endpoint_find(&packet->tuple.src);
	reason = wag_admits(ctx, packet, to, local); /* before there is an entry that nothing may use */
	if (reason)
		return reason;
	/*
	 * Replies must come back through here: a remote backend would answer an outside client directly, and a pod that
	 * was sent to itself would not answer at all. Backends on this node answer through here anyhow, so that the
	 * client keeps its address with them whatever the traffic policy.
	 */
	if (wag_from_outside(packet) && !local && (service->flags & WAG_SERVICE_DSR))
		return wag_tunnel_begin(packet, service, scratch);
	if ((wag_from_outside(packet) && !local && !(service->flags & WAG_SERVICE_KEEP_CLIENT)) ||
	    wag_addr_equal(&to->src, &to->dst)) {
		if (!wag_node_address(&to->src, packet))
			return WAG_REASON_NO_NODE_IP;
		client = wag_endpoint_find(&to->src);
	}
	reason = wag_nat_create(ctx, packet, scratch, service->revision);
	if (reason)
		return reason;
	/*
	 * Both ends must look at wag_nat: the one that answers, and the one that the answers go to. And the address that
	 * was asked, if it is the node's: its flows outlive the Service.
	 */
	wag_endpoint_mark_nat(local);
	wag_endpoint_mark_nat(client);
	wag_endpoint_mark_nat(wag_endpoint_find(&packet->tuple.dst));
	wag_count(WAG_COUNTER_PACKET_LB);
	if (wag_events)
		wag_translation_record(packet, to);
	return WAG_REASON_NONE;
}

/*
 * Client → Service: finds or makes the flow's translation and applies it. The new source is the client, or this node
 * when replies would otherwise not come back here. Returns enum wag_verdict.
 */
static __noinline int wag_service_translate(wag_ctx *ctx, struct wag_packet *packet, struct wag_service *service)
{
	struct wag_scratch *scratch = wag_scratch_get();
	struct wag_nat *nat;
	int reason;

	if (!packet || !service || !scratch)
		return WAG_DROP;
	nat = bpf_map_lookup_elem(&wag_nat, &packet->tuple);
	if (nat && (nat->flags & WAG_NAT_FORWARD) && wag_nat_valid(nat, packet, service) &&
	    (nat->flags & WAG_NAT_TUNNEL || wag_nat_is_fresh(nat) || wag_nat_mend(packet, &nat->to))) {
		wag_nat_touch(nat, packet);
		scratch->to = nat->to;
		scratch->entry.flags = nat->flags;
	} else if (wag_beside_proxy && !nat && wag_is_established(packet)) {
		return WAG_PASS; /* begun before these programs were here: conntrack has it until it is taken over */
	} else {
		reason = wag_service_begin(ctx, packet, service, scratch);
		if (reason)
			return wag_refuse(packet, reason);
	}
	if (scratch->entry.flags & WAG_NAT_TUNNEL)
		return wag_tunnel_send(ctx, packet, scratch);
	return wag_translate(ctx, packet, &scratch->to);
}

#endif
