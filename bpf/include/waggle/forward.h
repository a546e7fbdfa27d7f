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
#include "packet.h"

#define WAG_AF_INET 2
#define WAG_AF_INET6 10

/* Lowers the TTL in place and, for a pod, writes its MAC addresses. */
WAG_INLINE int wag_hop(struct __sk_buff *skb, struct wag_packet *packet, const struct wag_endpoint *pod)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
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
	}
	if (pod) {
		__builtin_memcpy(eth->h_dest, pod->pod_mac, 6);
		__builtin_memcpy(eth->h_source, pod->host_mac, 6);
	}
	return 0;
}

WAG_INLINE enum wag_verdict wag_to_pod(struct __sk_buff *skb, struct wag_packet *packet, const struct wag_endpoint *pod)
{
	if (packet->ttl <= 1)
		return WAG_PASS; /* the stack answers with time exceeded */
	packet->out_ifindex = pod->ifindex;
	if (wag_hop(skb, packet, pod))
		return wag_drop(packet, WAG_REASON_REWRITE);
	return WAG_TO_POD;
}

WAG_INLINE enum wag_verdict wag_to_wire(struct __sk_buff *skb, struct wag_packet *packet)
{
	struct bpf_fib_lookup fib = {};
	long found;

	if (packet->ttl <= 1)
		return WAG_PASS;
	fib.ifindex = skb->ingress_ifindex;
	fib.l4_protocol = packet->tuple.proto;
	fib.sport = packet->tuple.sport;
	fib.dport = packet->tuple.dport;
	if (packet->eth_proto == bpf_htons(ETH_P_IP)) {
		fib.family = WAG_AF_INET;
		fib.ipv4_src = packet->tuple.src.word[3];
		fib.ipv4_dst = packet->tuple.dst.word[3];
	} else {
		fib.family = WAG_AF_INET6;
		__builtin_memcpy(fib.ipv6_src, &packet->tuple.src, sizeof(fib.ipv6_src));
		__builtin_memcpy(fib.ipv6_dst, &packet->tuple.dst, sizeof(fib.ipv6_dst));
	}
	found = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return WAG_PASS; /* local, unreachable, too big, …: the stack does it, or says why not */
	packet->out_ifindex = fib.ifindex;
	packet->next_hop.nh_family = fib.family;
	__builtin_memcpy(packet->next_hop.ipv6_nh, fib.ipv6_dst, sizeof(fib.ipv6_dst));
	if (wag_hop(skb, packet, NULL))
		return wag_drop(packet, WAG_REASON_REWRITE);
	return WAG_TO_WIRE;
}

/* Where a packet with final addresses goes. */
WAG_INLINE enum wag_verdict wag_deliver(struct __sk_buff *skb, struct wag_packet *packet)
{
	struct wag_endpoint *endpoint = wag_endpoint_find(&packet->tuple.dst);

	if (wag_endpoint_is(endpoint, WAG_ENDPOINT_POD))
		return wag_to_pod(skb, packet, endpoint);
	if (wag_endpoint_is(endpoint, WAG_ENDPOINT_NODE))
		return WAG_PASS;
	return wag_to_wire(skb, packet);
}

static __noinline int wag_report_drop(struct __sk_buff *skb, struct wag_packet *packet)
{
	struct wag_event event = {};

	if (!packet)
		return 0;
	wag_count_drop(packet->reason, packet->hook & (WAG_HOOK_MAX - 1));
	event.time_ns = bpf_ktime_get_ns();
	event.src = packet->tuple.src;
	event.dst = packet->tuple.dst;
	event.sport = packet->tuple.sport;
	event.dport = packet->tuple.dport;
	event.proto = packet->tuple.proto;
	event.kind = WAG_EVENT_DROP;
	event.hook = packet->hook;
	event.reason = packet->reason;
	event.ifindex = skb->ifindex;
	wag_emit(&event);
	return 0;
}

WAG_INLINE int wag_finish(struct __sk_buff *skb, struct wag_packet *packet, enum wag_verdict verdict)
{
	switch (verdict) {
	case WAG_TO_POD:
		return bpf_redirect_peer(packet->out_ifindex, 0);
	case WAG_TO_WIRE:
		if (packet->translated)
			skb->mark = WAG_MARK;
		return bpf_redirect_neigh(packet->out_ifindex, &packet->next_hop, sizeof(packet->next_hop), 0);
	case WAG_DROP:
		wag_report_drop(skb, packet);
		return TC_ACT_SHOT;
	default:
		return TC_ACT_OK;
	}
}

#endif
