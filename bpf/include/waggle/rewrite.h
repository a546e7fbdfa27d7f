/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Gives a packet another tuple, checksums included. */
#ifndef WAGGLE_REWRITE_H
#define WAGGLE_REWRITE_H

#include <linux/bpf.h>
#include "access.h"
#include "packet.h"
#include "sctp.h"

#define WAG_ICMP_CHECK 2 /* where the checksum is, in both versions */
#define WAG_ICMP_ID 4    /* where an echo has its identifier */

/* Ports and checksum of TCP and UDP. `addresses`: what bpf_csum_diff says of them. */
WAG_INLINE int wag_rewrite_ports(wag_ctx *ctx, const struct wag_packet *packet, const struct wag_tuple *to, __u32 check,
				 __s64 addresses, __u64 flags)
{
	const struct wag_tuple *old = &packet->tuple;
	__u32 off = packet->l4_off;

	if (wag_fix_l4(ctx, off + check, 0, addresses, flags | BPF_F_PSEUDO_HDR))
		return -1;
	if (old->sport != to->sport && wag_fix_l4(ctx, off + check, old->sport, to->sport, flags | 2))
		return -1;
	if (old->dport != to->dport && wag_fix_l4(ctx, off + check, old->dport, to->dport, flags | 2))
		return -1;
	if (old->sport == to->sport && old->dport == to->dport)
		return 0;
	return wag_store(ctx, off, &to->sport, 4);
}

/* No pseudo header; the checksum of a fragmented packet takes in bytes that are not here. */
WAG_INLINE int wag_rewrite_sctp(wag_ctx *ctx, const struct wag_packet *packet, const struct wag_tuple *to)
{
	const struct wag_tuple *old = &packet->tuple;
	__u32 diff = (__u16)(old->sport ^ to->sport) | (__u32)(__u16)(old->dport ^ to->dport) << 16;

	if (!diff)
		return 0;
	if (packet->is_fragment ||
	    wag_fix_sctp(ctx, packet->l4_off, packet->size - (packet->l4_off - WAG_L3_OFF), diff))
		return -1;
	return wag_store_summed(ctx, packet->l4_off, &to->sport, 4);
}

/* Identifier and checksum of an echo; that of ICMPv6 takes in the addresses. */
WAG_INLINE int wag_rewrite_echo(wag_ctx *ctx, const struct wag_packet *packet, const struct wag_tuple *to,
				__s64 addresses)
{
	__be16 before = packet->tuple.sport | packet->tuple.dport;
	__be16 after = to->sport | to->dport;
	__u32 check = packet->l4_off + WAG_ICMP_CHECK;

	if (to->proto == IPPROTO_ICMPV6 && wag_fix_l4(ctx, check, 0, addresses, BPF_F_PSEUDO_HDR))
		return -1;
	if (before == after)
		return 0;
	return wag_fix_l4(ctx, check, before, after, 2) || wag_store(ctx, packet->l4_off + WAG_ICMP_ID, &after, 2);
}

WAG_INLINE int wag_rewrite_transport(wag_ctx *ctx, const struct wag_packet *packet, const struct wag_tuple *to,
				     __s64 addresses)
{
	if (packet->later_fragment)
		return 0; /* it is all in the first one */
	switch (packet->tuple.proto) {
	case IPPROTO_TCP:
		return wag_rewrite_ports(ctx, packet, to, offsetof(struct tcphdr, check), addresses, 0);
	case IPPROTO_UDP:
		return wag_rewrite_ports(ctx, packet, to, offsetof(struct udphdr, check), addresses,
					 BPF_F_MARK_MANGLED_0);
	case IPPROTO_SCTP:
		return wag_rewrite_sctp(ctx, packet, to);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return wag_rewrite_echo(ctx, packet, to, addresses);
	default:
		return -1;
	}
}

#ifndef WAG_XDP

struct wag_tcp_mss {
	__u8 kind; /* 2 */
	__u8 size; /* 4 */
	__be16 value;
};

/*
 * What a backend says it can take, in its answer to a SYN, less what the header around the client's packets needs. Only
 * where it is the first option, as everybody has it; without, path MTU discovery finds out.
 */
static __noinline int wag_lower_mss(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_tcp_mss mss;
	__be16 lower;
	__u32 off;

	if (!packet)
		return 0;
	off = packet->l4_off + sizeof(struct tcphdr);
	if (wag_load(ctx, off, &mss, sizeof(mss)) || mss.kind != 2 || mss.size != sizeof(mss))
		return 0;
	lower = packet->eth_proto == bpf_htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	if (bpf_ntohs(mss.value) <= 536 + lower)
		return 0;
	lower = bpf_htons(bpf_ntohs(mss.value) - lower);
	return wag_fix_l4(ctx, packet->l4_off + offsetof(struct tcphdr, check), mss.value, lower, 2) ||
	       wag_store(ctx, off + offsetof(struct wag_tcp_mss, value), &lower, sizeof(lower));
}

#endif

/* Turns the packet's tuple into `to`. */
static __noinline int wag_rewrite(wag_ctx *ctx, struct wag_packet *packet, const struct wag_tuple *to)
{
	__s64 addresses;
	__be32 pair[2];

	if (!packet || !to)
		return -1;
	addresses = bpf_csum_diff((void *)&packet->tuple.src, 32, (void *)&to->src, 32, 0);
	if (addresses < 0 || wag_rewrite_transport(ctx, packet, to, addresses))
		return -1;
	if (packet->eth_proto == bpf_htons(ETH_P_IP)) {
		pair[0] = to->src.word[3];
		pair[1] = to->dst.word[3];
		if (wag_fix_l3(ctx, WAG_L3_OFF + offsetof(struct iphdr, check), addresses) ||
		    wag_store(ctx, WAG_L3_OFF + offsetof(struct iphdr, saddr), pair, sizeof(pair)))
			return -1;
	} else {
		if (wag_store(ctx, WAG_L3_OFF + offsetof(struct ipv6hdr, saddr), &to->src, 32))
			return -1;
		/* wag_fix_l4 believes that the sum of an IP header has changed by as much, as that of IPv4 does */
		wag_sum_changes(ctx, addresses);
	}
	packet->tuple = *to;
	return 0;
}

#endif
