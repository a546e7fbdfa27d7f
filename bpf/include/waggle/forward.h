/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Delivery. Decides where a packet with final addresses goes, and is the only place that turns a verdict into what a
 * tc hook returns. Local pods get the packet straight in their namespace; other destinations leave by the kernel's own
 * routes and neighbours; whatever these cannot answer goes to the host stack, which knows how to say so with ICMP.
 */
#ifndef WAGGLE_FORWARD_H
#define WAGGLE_FORWARD_H

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include "endpoint.h"
#include "event.h"
#include "fragment.h"
#include "learn.h"
#include "packet.h"
#include "policy.h"
#include "report.h"
#include "uplink.h"

#define WAG_AF_INET 2
#define WAG_AF_INET6 10

/* Lowers the TTL in place and writes MAC addresses, where there are any (of 6 bytes). */
WAG_INLINE int wag_hop(wag_ctx *ctx, struct wag_packet *packet, const void *dest, const void *source)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;

	if (data + sizeof(*eth) + sizeof(struct iphdr) > end)
		return -1;
	if (packet->eth_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + sizeof(*eth);
		__u32 check = ip->check;

		check += bpf_htons(0x0100);
		ip->check = (__u16)(check + (check >= 0xffff));
		ip->ttl--;
	} else {
		struct ipv6hdr *ip = data + sizeof(*eth);

		if ((void *)(ip + 1) > end)
			return -1;
		ip->hop_limit--;
		wag_sum_changes(ctx, (__u16)~bpf_htons(1)); /* IPv4 has the sum of its header to make up for it */
	}
	if (dest) {
		__builtin_memcpy(eth->h_dest, dest, 6);
		__builtin_memcpy(eth->h_source, source, 6);
	}
	return 0;
}

WAG_INLINE enum wag_verdict wag_answer(struct wag_packet *packet, enum wag_answer answer, enum wag_reason reason)
{
	packet->answer = answer;
	packet->reason = reason;
	return WAG_REJECT;
}

/* The last hop. The stack says so itself, unless the packet is going to be translated: it knows only what comes of it. */
WAG_INLINE enum wag_verdict wag_expired(struct wag_packet *packet, const struct wag_tuple *to)
{
	return to == &packet->tuple ? WAG_PASS : wag_answer(packet, WAG_ANSWER_EXPIRED, WAG_REASON_EXPIRED);
}

WAG_INLINE enum wag_verdict wag_to_pod(wag_ctx *ctx, struct wag_packet *packet, const struct wag_tuple *to,
				       const struct wag_endpoint *pod)
{
	if (packet->ttl <= 1)
		return wag_expired(packet, to);
	packet->out_ifindex = pod->ifindex;
	packet->queued = !!(pod->flags & WAG_ENDPOINT_QUEUED);
	if (wag_hop(ctx, packet, pod->pod_mac, pod->host_mac))
		return wag_drop(packet, WAG_REASON_REWRITE);
	return WAG_TO_POD;
}

#define WAG_GSO_BY_FRAGS 0xffff /* include/linux/skbuff.h */

/* How large the IP packets are that leave: a GSO packet is cut into segments first. 0: of SCTP, as its sender chose. */
WAG_INLINE __u16 wag_wire_size(wag_ctx *ctx, const struct wag_packet *packet)
{
#ifndef WAG_XDP
	__u8 header = sizeof(struct udphdr) / 4 << 4;

	if (ctx->gso_size == WAG_GSO_BY_FRAGS)
		return 0;
	if (ctx->gso_size) {
		if (packet->tuple.proto == IPPROTO_TCP)
			wag_load(ctx, packet->l4_off + 12, &header, 1);
		return packet->l4_off - WAG_L3_OFF + (header >> 4) * 4 + ctx->gso_size;
	}
#endif
	return packet->size;
}

/* The kernel's route for a packet with the tuple `to`, `extra` bytes larger than it is. Returns BPF_FIB_LKUP_RET_*. */
WAG_INLINE long wag_fib(wag_ctx *ctx, struct wag_packet *packet, const struct wag_tuple *to, __u16 extra,
			struct bpf_fib_lookup *fib)
{
	fib->ifindex = ctx->ingress_ifindex;
#ifndef WAG_XDP
	if (packet->hook == WAG_HOOK_NODE_EGRESS)
		fib->ifindex = ctx->ifindex; /* it came in nowhere */
#endif
	fib->l4_protocol = to->proto;
	fib->sport = to->sport;
	fib->dport = to->dport;
	fib->tot_len = wag_wire_size(ctx, packet) + extra; /* else MTUs of routes do not count */
	if (packet->eth_proto == bpf_htons(ETH_P_IP)) {
		fib->family = WAG_AF_INET;
		fib->ipv4_src = to->src.word[3];
		fib->ipv4_dst = to->dst.word[3];
	} else {
		fib->family = WAG_AF_INET6;
		__builtin_memcpy(fib->ipv6_src, &to->src, sizeof(fib->ipv6_src));
		__builtin_memcpy(fib->ipv6_dst, &to->dst, sizeof(fib->ipv6_dst));
	}
	return bpf_fib_lookup(ctx, fib, sizeof(*fib), 0);
}

/*
 * A packet that is going to be translated and does not fit. Its sender is told about the packet that it sent. The stack
 * could not: it takes what has the node's address for its own, and knows the others only as they were translated. But
 * cutting it up, where that is allowed, is for the stack.
 */
WAG_INLINE enum wag_verdict wag_too_big(struct wag_packet *packet, const struct wag_tuple *to, __u16 mtu)
{
	if (packet->may_fragment && wag_addr_equal(&to->src, &packet->tuple.src))
		return WAG_PASS;
	packet->mtu = mtu;
	return wag_answer(packet, WAG_ANSWER_TOO_BIG, WAG_REASON_TOO_BIG);
}

WAG_INLINE enum wag_verdict wag_to_wire(wag_ctx *ctx, struct wag_packet *packet, const struct wag_tuple *to, __u16 extra)
{
	struct bpf_fib_lookup fib = {};
	long found;

	if (wag_addr_stays_on_link(&to->dst))
		return WAG_PASS;
	if (packet->ttl <= 1)
		return wag_expired(packet, to);
	found = wag_fib(ctx, packet, to, extra, &fib);
	if (found == BPF_FIB_LKUP_RET_FRAG_NEEDED && to != &packet->tuple)
		return wag_too_big(packet, to, fib.mtu_result - extra);
#ifdef WAG_XDP
	if (found != BPF_FIB_LKUP_RET_SUCCESS)
		return WAG_PASS; /* tc can wait for a neighbour, the stack knows why there is no route */
	packet->out_ifindex = fib.ifindex;
	if (packet->out_ifindex != ctx->ingress_ifindex && !bpf_map_lookup_elem(&wag_uplinks, &packet->out_ifindex))
		return WAG_PASS;
	if (wag_hop(ctx, packet, fib.dmac, fib.smac))
		return wag_drop(packet, WAG_REASON_REWRITE);
#else
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return WAG_PASS; /* local, unreachable, too big, …: the stack does it, or says why not */
	packet->out_ifindex = fib.ifindex;
	packet->next_hop.nh_family = fib.family;
	__builtin_memcpy(packet->next_hop.ipv6_nh, fib.ipv6_dst, sizeof(fib.ipv6_dst));
	if (wag_hop(ctx, packet, NULL, NULL))
		return wag_drop(packet, WAG_REASON_REWRITE);
#endif
	return WAG_TO_WIRE;
}

/* Where a packet goes whose destination has the entry `endpoint`, and prepares its headers for the way. */
WAG_INLINE enum wag_verdict wag_way(wag_ctx *ctx, struct wag_packet *packet, const struct wag_tuple *to,
				    const struct wag_endpoint *endpoint)
{
#ifdef WAG_XDP
	if (endpoint)
		return WAG_PASS; /* XDP reaches no namespace */
#endif
	if (wag_endpoint_is(endpoint, WAG_ENDPOINT_POD))
		return wag_to_pod(ctx, packet, to, endpoint);
	if (wag_endpoint_is(endpoint, WAG_ENDPOINT_NODE))
		return WAG_PASS;
	return wag_to_wire(ctx, packet, to, 0);
}

/* The same for a packet that has the tuple `to`, or is about to get it, if policies let it go there. */
WAG_INLINE enum wag_verdict wag_route(wag_ctx *ctx, struct wag_packet *packet, struct wag_tuple *to)
{
	struct wag_endpoint *endpoint = wag_endpoint_find(&to->dst);
	enum wag_reason reason = wag_admits(ctx, packet, to, endpoint);

	return reason ? wag_drop(packet, reason) : wag_way(ctx, packet, to, endpoint);
}

#ifndef WAG_XDP

WAG_INLINE int wag_shot(void)
{
	return TC_ACT_SHOT;
}

/* Sends a packet that is an answer now to whom it came from. */
WAG_INLINE int wag_send_back(wag_ctx *ctx, const struct wag_packet *packet)
{
	if (packet->hook == WAG_HOOK_POD_EGRESS)
		return bpf_redirect_peer(ctx->ifindex, 0);
	if (packet->hook == WAG_HOOK_NODE_EGRESS)
		return bpf_redirect(ctx->ifindex, BPF_F_INGRESS); /* to the node itself */
	ctx->mark = WAG_MARK;
	return bpf_redirect(ctx->ifindex, 0);
}

WAG_INLINE int wag_finish(wag_ctx *ctx, struct wag_packet *packet, enum wag_verdict verdict)
{
	bool outside = packet->hook == WAG_HOOK_NODE_EGRESS || packet->queued;

	/* by the wire, by the stack or by its interface, the packet may meet another program */
	if (packet->translated && (verdict != WAG_TO_POD || outside))
		ctx->mark = WAG_MARK;
	if (wag_begins_directly(packet, verdict))
		wag_direct_record(packet);
	if (packet->answers && verdict != WAG_DROP)
		wag_names_learn(ctx, packet); /* before the pod sees it */
	switch (verdict) {
	case WAG_TO_POD: /* into its namespace, which the kernel allows for what comes in alone */
		return outside ? bpf_redirect(packet->out_ifindex, 0) : bpf_redirect_peer(packet->out_ifindex, 0);
	case WAG_TO_WIRE:
		return bpf_redirect_neigh(packet->out_ifindex, &packet->next_hop, sizeof(packet->next_hop), 0);
	case WAG_SEND_BACK:
		return wag_send_back(ctx, packet);
	case WAG_DROP:
		wag_report_drop(ctx, packet, WAG_OUTCOME_DROPPED);
		return wag_shot();
	default:
		return TC_ACT_OK;
	}
}

#endif
#endif
