/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Direct server return on the backend's node: takes packets out that another node has sent here (tunnel.h). */
#ifndef WAGGLE_DSR_H
#define WAGGLE_DSR_H

#include <linux/bpf.h>
#include "access.h"
#include "fragment.h"
#include "nat.h"
#include "packet.h"
#include "ranges.h"
#include "service.h"
#include "tunnel.h"

/* linux/bpf.h has them since v6.3 */
#define WAG_DECAP_L3_IPV4 (1ULL << 7)
#define WAG_DECAP_L3_IPV6 (1ULL << 8)

WAG_INLINE bool wag_is_tunnelled(const struct wag_packet *packet)
{
	return packet->tuple.proto == (packet->eth_proto == bpf_htons(ETH_P_IP) ? IPPROTO_IPIP : IPPROTO_IPV6) &&
	       !packet->is_fragment && packet->l4_off == WAG_L3_OFF + wag_tunnel_size(packet);
}

/* Ports of the packet inside at `off`, or, of a later fragment, those of its first one. */
WAG_INLINE bool wag_tunnel_ports(wag_ctx *ctx, struct wag_tuple *inner, __u32 off, __u16 frag, __u32 id)
{
	struct wag_fragment_key key = {};
	struct wag_fragment *first;
	__be16 ports[2];

	if (!wag_service_has_protocol(inner->proto))
		return false;
	if (!frag) {
		if (wag_load(ctx, off, ports, sizeof(ports)))
			return false;
		inner->sport = ports[0];
		inner->dport = ports[1];
		return true;
	}
	wag_fragment_key_set(&key, inner, id);
	first = bpf_map_lookup_elem(&wag_fragments, &key);
	if (!first)
		return false;
	inner->sport = first->sport;
	inner->dport = first->dport;
	return true;
}

/* The flow of the packet inside; 0: none that a Service could have. */
static __noinline int wag_tunnel_read(wag_ctx *ctx, struct wag_packet *packet, struct wag_tuple *inner)
{
	__u32 off;

	if (!packet || !inner)
		return 0;
	off = packet->l4_off;
	__builtin_memset(inner, 0, sizeof(*inner));
	if (packet->eth_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (wag_load(ctx, off, &ip, sizeof(ip)) || ip.version != 4)
			return 0;
		wag_addr_set4(&inner->src, ip.saddr);
		wag_addr_set4(&inner->dst, ip.daddr);
		inner->proto = ip.protocol;
		return wag_tunnel_ports(ctx, inner, off + ip.ihl * 4, ip.frag_off & bpf_htons(0x1fff), ip.id);
	}
	struct ipv6hdr ip6;
	struct wag_ip6_ext ext = {};

	if (wag_load(ctx, off, &ip6, sizeof(ip6)) || ip6.version != 6)
		return 0;
	__builtin_memcpy(&inner->src, &ip6.saddr, 16);
	__builtin_memcpy(&inner->dst, &ip6.daddr, 16);
	inner->proto = ip6.nexthdr;
	off += sizeof(ip6);
	if (inner->proto == IPPROTO_FRAGMENT) {
		if (wag_load(ctx, off, &ext, sizeof(ext)))
			return 0;
		inner->proto = ext.next;
		off += sizeof(ext);
	}
	return wag_tunnel_ports(ctx, inner, off, ext.frag_off & bpf_htons(0xfff8), ext.id);
}

/* The Service that the packet inside is for. */
WAG_INLINE struct wag_service *wag_tunnel_service(const struct wag_tuple *inner)
{
	struct wag_service *service = wag_service_find(&inner->dst, inner->dport, inner->proto);

	return service ? service : wag_service_find_nodeport(&inner->dst, inner->dport, inner->proto);
}

/* The port that the Service has at this backend, in network byte order; 0: it is none of its backends. */
static __noinline int wag_backend_port(const struct wag_service *service, const struct wag_addr *addr)
{
	struct wag_backend_search search = {};

	if (!service || !addr)
		return 0;
	search.addr = *addr;
	search.offset = service->offset;
	bpf_loop(service->count + service->draining, wag_backend_matches, &search, 0);
	return search.found ? search.port : 0;
}

/* Takes the packet out. */
WAG_INLINE long wag_tunnel_open(wag_ctx *ctx, struct wag_packet *packet)
{
	if (packet->eth_proto == bpf_htons(ETH_P_IP))
		return bpf_skb_adjust_room(ctx, -(int)sizeof(struct iphdr), BPF_ADJ_ROOM_MAC,
					   BPF_F_ADJ_ROOM_FIXED_GSO | WAG_DECAP_L3_IPV4);
	return bpf_skb_adjust_room(ctx, -(int)sizeof(struct ipv6hdr), BPF_ADJ_ROOM_MAC,
				   BPF_F_ADJ_ROOM_FIXED_GSO | WAG_DECAP_L3_IPV6);
}

/* A flow begins on the backend's node, with scratch->to.dst as the backend it was sent to. Returns enum wag_reason. */
WAG_INLINE int wag_tunnel_accept(wag_ctx *ctx, struct wag_packet *packet, struct wag_service *service,
				 struct wag_scratch *scratch)
{
	struct wag_endpoint *client = wag_endpoint_find(&packet->tuple.src);
	struct wag_nat *replies;
	int reason;

	if (!wag_service_admits(service, &packet->tuple.src))
		return WAG_REASON_SOURCE_RANGE;
	scratch->to.dport = wag_backend_port(service, &scratch->to.dst);
	if (packet->later_fragment || !scratch->to.dport)
		return WAG_REASON_STALE_BACKEND;
	if (wag_addr_equal(&scratch->to.src, &scratch->to.dst)) {
		/* a pod that asked another node, and is answered by itself */
		if (!wag_node_address(&scratch->to.src, packet))
			return WAG_REASON_NO_NODE_IP;
		client = wag_endpoint_find(&scratch->to.src);
	}
	reason = wag_admits(ctx, packet, &scratch->to, wag_endpoint_find(&scratch->to.dst));
	if (reason)
		return reason;
	reason = wag_nat_create(ctx, packet, scratch, service->revision);
	if (reason)
		return reason;
	replies = bpf_map_lookup_elem(&wag_nat, &scratch->answer);
	if (replies)
		__sync_fetch_and_or(&replies->flags, WAG_NAT_TUNNEL);
	wag_endpoint_mark_nat(wag_endpoint_find(&scratch->to.dst));
	wag_endpoint_mark_nat(client);
	wag_count(WAG_COUNTER_DSR);
	return WAG_REASON_NONE;
}

/*
 * A packet from another node to a local backend that may have another one inside, which asks for a Service. Nobody else is
 * listened to: with packets inside packets whoever cannot send as somebody else could all the same. Returns enum
 * wag_verdict; WAG_NEXT: nothing of that kind, untouched.
 */
static __noinline int wag_tunnel_receive(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_scratch *scratch = wag_scratch_get();
	struct wag_service *service;
	struct wag_addr backend;
	struct wag_nat *nat;
	int reason;

	if (!packet || !scratch || !wag_ranges_hold(WAG_RANGES_NODES, &packet->tuple.src) ||
	    !wag_tunnel_read(ctx, packet, &scratch->to))
		return WAG_NEXT;
	backend = packet->tuple.dst;
	service = wag_tunnel_service(&scratch->to);
	nat = bpf_map_lookup_elem(&wag_nat, &scratch->to);
	if (nat && (!(nat->flags & WAG_NAT_FORWARD) || !wag_addr_equal(&nat->to.dst, &backend)))
		nat = NULL;
	/*
	 * Whether a Service is forwarded so is the other node's to say: it may learn of a change first, and has flows from
	 * before. What no other node would have sent is somebody else's tunnel.
	 */
	if (!nat && (!service || (!(service->flags & WAG_SERVICE_DSR) && !wag_backend_port(service, &backend))))
		return WAG_NEXT;
	if (wag_tunnel_open(ctx, packet) || wag_parse(ctx, packet, packet->hook) != WAG_PARSE_OK)
		return wag_drop(packet, WAG_REASON_MALFORMED);
	if (nat && (service ? wag_nat_valid(nat, packet, service) : wag_is_established(packet)) &&
	    (wag_nat_is_fresh(nat) || wag_nat_mend(packet, &nat->to))) {
		wag_nat_touch(nat, packet);
		scratch->to = nat->to;
		return wag_translate(ctx, packet, &scratch->to);
	}
	if (!service)
		return wag_drop(packet, WAG_REASON_STALE_BACKEND);
	scratch->to = packet->tuple;
	scratch->to.dst = backend;
	reason = wag_tunnel_accept(ctx, packet, service, scratch);
	if (reason)
		return wag_drop(packet, reason);
	return wag_translate(ctx, packet, &scratch->to);
}

#endif
