/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Packets to an address of a Service where no frontend takes them: refused, dropped, or, for ICMP echo, answered by the
 * packet itself, turned round.
 */
#ifndef WAGGLE_ECHO_H
#define WAGGLE_ECHO_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stddef.h>
#include "packet.h"
#include "reject.h"
#include "vip.h"

/* linux/icmp.h needs the C library */
enum wag_echo_type {
	WAG_ECHO_REQUEST = 8,
	WAG_ECHO_REPLY = 0,
	WAG_ECHO6_REQUEST = 128,
	WAG_ECHO6_REPLY = 129,
};

WAG_INLINE bool wag_speaks_icmp(const struct wag_packet *packet)
{
	return packet->tuple.proto == (packet->eth_proto == bpf_htons(ETH_P_IP) ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

/* A later fragment of an echo does not say that it is one: its first one does (fragment.h). */
WAG_INLINE bool wag_is_echo(wag_ctx *ctx, const struct wag_packet *packet)
{
	__u8 type;

	if (packet->later_fragment)
		return packet->has_flow && !packet->tuple.dport;
	if (bpf_skb_load_bytes(ctx, packet->l4_off, &type, 1))
		return false;
	return type == (packet->eth_proto == bpf_htons(ETH_P_IP) ? WAG_ECHO_REQUEST : WAG_ECHO6_REQUEST);
}

/* Request to reply. The type is the high byte of the first word that the checksum is over. */
WAG_INLINE int wag_echo_turn_type(wag_ctx *ctx, const struct wag_packet *packet, __u8 from, __u8 to)
{
	if (packet->later_fragment)
		return 0;
	return bpf_l4_csum_replace(ctx, packet->l4_off + 2, bpf_htons(from << 8), bpf_htons(to << 8), 2) ||
	       bpf_skb_store_bytes(ctx, packet->l4_off, &to, 1, 0);
}

/* Addresses only change places, which no checksum notices. */
WAG_INLINE int wag_echo_turn_round(wag_ctx *ctx, const struct wag_packet *packet)
{
	__u8 ttl = WAG_REPLY_TTL;

	if (packet->eth_proto == bpf_htons(ETH_P_IP)) {
		__be32 pair[2] = { packet->tuple.dst.word[3], packet->tuple.src.word[3] };

		return wag_echo_turn_type(ctx, packet, WAG_ECHO_REQUEST, WAG_ECHO_REPLY) ||
		       bpf_l3_csum_replace(ctx, WAG_L3_OFF + offsetof(struct iphdr, check),
					   bpf_htons(packet->ttl << 8), bpf_htons(ttl << 8), 2) ||
		       bpf_skb_store_bytes(ctx, WAG_L3_OFF + offsetof(struct iphdr, ttl), &ttl, 1, 0) ||
		       bpf_skb_store_bytes(ctx, WAG_L3_OFF + offsetof(struct iphdr, saddr), pair, sizeof(pair), 0) ||
		       wag_reply_eth(ctx);
	}
	struct wag_addr pair[2] = { packet->tuple.dst, packet->tuple.src };

	return wag_echo_turn_type(ctx, packet, WAG_ECHO6_REQUEST, WAG_ECHO6_REPLY) ||
	       wag_store_summed(ctx, WAG_L3_OFF + offsetof(struct ipv6hdr, hop_limit), &ttl, 1) ||
	       bpf_skb_store_bytes(ctx, WAG_L3_OFF + offsetof(struct ipv6hdr, saddr), pair, sizeof(pair), 0) ||
	       wag_reply_eth(ctx);
}

/*
 * The verdict over a packet that no frontend takes, as enum wag_verdict. WAG_NEXT: its address has nothing to do with
 * Services. What is no machine's own is answered for everybody who asks here, load balancer and external addresses
 * included. A global function, as wag_parse is.
 */
__noinline int wag_vip_verdict(wag_ctx *ctx, struct wag_packet *packet)
{
	int reason;

	if (!packet)
		return WAG_NEXT;
	if (wag_speaks_icmp(packet) && wag_vip_find(&packet->tuple.dst) && wag_reply_allowed(ctx) &&
	    wag_is_echo(ctx, packet))
		return wag_echo_turn_round(ctx, packet) ? wag_drop(packet, WAG_REASON_REWRITE) : WAG_SEND_BACK;
	reason = wag_vip_refusal(&packet->tuple.dst);
	if (!reason)
		return WAG_NEXT;
	/* errors are about whole packets, and never about errors (RFC 1122 section 3.2.2) */
	if (wag_speaks_icmp(packet) || packet->later_fragment)
		return wag_drop(packet, reason);
	return wag_refuse(packet, reason);
}

/* As above; the middle of a connection is not asked about: most packets that have nothing to do with Services are that. */
WAG_INLINE enum wag_verdict wag_beside_frontends(wag_ctx *ctx, struct wag_packet *packet)
{
	return wag_is_established(packet) ? WAG_NEXT : wag_vip_verdict(ctx, packet);
}

#endif
