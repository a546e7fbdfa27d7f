/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Direct server return. The node that a client's packet comes to chooses the backend and sends the packet there as it is,
 * inside another one (RFC 2003, RFC 2473) whose destination is the backend itself. The backend's node takes it out,
 * translates it, and answers the client directly. It sees the address that was asked in every packet, so that nothing has
 * to be agreed on beforehand, several Services before one backend do not collide, and either node may forget the flow.
 */
#ifndef WAGGLE_TUNNEL_H
#define WAGGLE_TUNNEL_H

#include <linux/bpf.h>
#include "access.h"
#include "nat.h"
#include "packet.h"

/* Bytes of the header outside. */
WAG_INLINE __u16 wag_tunnel_size(const struct wag_packet *packet)
{
	return packet->eth_proto == bpf_htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* Room for the header outside, behind the Ethernet header. */
WAG_INLINE long wag_tunnel_grow(wag_ctx *ctx, bool v4)
{
#ifdef WAG_XDP
	int size = v4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	struct ethhdr eth;

	return wag_load(ctx, 0, &eth, sizeof(eth)) || bpf_xdp_adjust_head(ctx, -size) ||
	       wag_store(ctx, 0, &eth, sizeof(eth));
#else
	if (v4)
		return bpf_skb_adjust_room(ctx, sizeof(struct iphdr), BPF_ADJ_ROOM_MAC,
					   BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4);
	return bpf_skb_adjust_room(ctx, sizeof(struct ipv6hdr), BPF_ADJ_ROOM_MAC,
				   BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6);
#endif
}

/* Sends the packet, as it is, to the backend scratch->to.dst. Returns enum wag_verdict. */
static __noinline int wag_tunnel_send(wag_ctx *ctx, struct wag_packet *packet, struct wag_scratch *scratch)
{
	struct wag_tuple *outer;
	int verdict;
	bool v4;

	if (!packet || !scratch)
		return WAG_DROP;
	v4 = packet->eth_proto == bpf_htons(ETH_P_IP);
	outer = &scratch->answer;
	*outer = scratch->to;
	outer->proto = v4 ? IPPROTO_IPIP : IPPROTO_IPV6;
	if (!wag_node_address(&outer->src, packet))
		return wag_drop(packet, WAG_REASON_NO_NODE_IP);
	verdict = wag_to_wire(ctx, packet, outer, wag_tunnel_size(packet));
	if (verdict != WAG_TO_WIRE)
#ifdef WAG_XDP
		return verdict;
#else
		return verdict == WAG_PASS ? wag_drop(packet, WAG_REASON_NO_ROUTE) : verdict;
#endif
	if (wag_tunnel_grow(ctx, v4) || wag_write_ip(ctx, v4, outer->proto, packet->size, &outer->src, &outer->dst))
		return wag_drop(packet, WAG_REASON_REWRITE);
	packet->translated = 1;
	return WAG_TO_WIRE;
}

#endif
