/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ICMP errors about translated flows. An error carries the start of the packet that caused it, as that packet was after
 * its translation; whoever sent it knows it only as it was before. The answer to the packet inside has an entry in
 * wag_nat, and what that becomes, turned round, is the packet as its sender knows it (RFC 5508 section 4). Without this,
 * path MTU discovery ends at every translated flow.
 */
#ifndef WAGGLE_ICMP_H
#define WAGGLE_ICMP_H

#include <linux/bpf.h>
#include "nat.h"
#include "packet.h"
#include "policy.h"

#define WAG_ICMP_HEADER 8 /* of an error, before the packet inside */

/* linux/icmp.h needs the C library */
enum wag_icmp_type {
	WAG_ICMP_UNREACHABLE = 3,
	WAG_ICMP_TIME_EXCEEDED = 11,
	WAG_ICMP_PARAMETER = 12,
	WAG_ICMP6_UNREACHABLE = 1,
	WAG_ICMP6_PARAMETER = 4, /* between: too big, time exceeded */
};

/* The packet inside an error. */
struct wag_icmp_inner {
	struct wag_tuple tuple;
	__u32 l3_off;
	__u32 l4_off;
	__u32 port_off; /* of both ports, or of the identifier of an echo */
};

WAG_INLINE bool wag_icmp_is_error(const struct wag_packet *packet, __u8 type)
{
	if (packet->eth_proto == bpf_htons(ETH_P_IP))
		return packet->tuple.proto == IPPROTO_ICMP &&
		       (type == WAG_ICMP_UNREACHABLE || type == WAG_ICMP_TIME_EXCEEDED || type == WAG_ICMP_PARAMETER);
	return packet->tuple.proto == IPPROTO_ICMPV6 && type >= WAG_ICMP6_UNREACHABLE && type <= WAG_ICMP6_PARAMETER;
}

/* False: no error, or about something that is never translated. */
WAG_INLINE bool wag_icmp_read(wag_ctx *ctx, const struct wag_packet *packet, struct wag_icmp_inner *inner)
{
	struct ipv6hdr ip6;
	struct iphdr ip;
	__be16 ports[2];
	__u8 type;

	if (packet->later_fragment || wag_load(ctx, packet->l4_off, &type, 1) ||
	    !wag_icmp_is_error(packet, type))
		return false;
	inner->l3_off = packet->l4_off + WAG_ICMP_HEADER;
	if (packet->eth_proto == bpf_htons(ETH_P_IP)) {
		if (wag_load(ctx, inner->l3_off, &ip, sizeof(ip)) || ip.version != 4 ||
		    (ip.frag_off & bpf_htons(0x1fff)))
			return false;
		wag_addr_set4(&inner->tuple.src, ip.saddr);
		wag_addr_set4(&inner->tuple.dst, ip.daddr);
		inner->tuple.proto = ip.protocol;
		inner->l4_off = inner->l3_off + ip.ihl * 4;
	} else {
		if (wag_load(ctx, inner->l3_off, &ip6, sizeof(ip6)) || ip6.version != 6)
			return false;
		__builtin_memcpy(&inner->tuple.src, &ip6.saddr, sizeof(inner->tuple.src));
		__builtin_memcpy(&inner->tuple.dst, &ip6.daddr, sizeof(inner->tuple.dst));
		inner->tuple.proto = ip6.nexthdr;
		inner->l4_off = inner->l3_off + sizeof(ip6);
	}
	if (inner->tuple.proto == IPPROTO_ICMP || inner->tuple.proto == IPPROTO_ICMPV6) {
		/* only an echo request can have been translated to where something complains of it */
		if (wag_load(ctx, inner->l4_off, &type, 1) || !wag_is_echo_request(&inner->tuple, type) ||
		    wag_load(ctx, inner->l4_off + WAG_ICMP_ID, ports, 2))
			return false;
		inner->port_off = inner->l4_off + WAG_ICMP_ID;
		inner->tuple.sport = ports[0];
		return true;
	}
	if (!wag_service_has_protocol(inner->tuple.proto) || wag_load(ctx, inner->l4_off, ports, sizeof(ports)))
		return false;
	inner->port_off = inner->l4_off;
	inner->tuple.sport = ports[0];
	inner->tuple.dport = ports[1];
	return true;
}

/* Source and destination at `off` of an IP header become those of `pair`; `diff` is what bpf_csum_diff says of that. */
WAG_INLINE int wag_icmp_addresses(wag_ctx *ctx, bool v4, __u32 off, const struct wag_addr *pair, __s64 diff)
{
	__be32 pair4[2] = { pair[0].word[3], pair[1].word[3] };

	if (!v4)
		return wag_store(ctx, off + offsetof(struct ipv6hdr, saddr), pair, 32);
	return wag_fix_l3(ctx, off + offsetof(struct iphdr, check), diff) ||
	       wag_store(ctx, off + offsetof(struct iphdr, saddr), pair4, sizeof(pair4));
}

/*
 * Writes the packet inside as `now`, and the addresses outside as `outer`. The transport checksum inside stays: it is
 * often cut off, and nobody checks it.
 */
WAG_INLINE int wag_icmp_write(wag_ctx *ctx, const struct wag_packet *packet, const struct wag_icmp_inner *inner,
			      const struct wag_tuple *now, const struct wag_addr *outer)
{
	bool v4 = packet->eth_proto == bpf_htons(ETH_P_IP);
	__u32 check = packet->l4_off + WAG_ICMP_CHECK;
	bool echo = inner->port_off != inner->l4_off;
	__s64 inside, outside, ports;

	inside = bpf_csum_diff((void *)&inner->tuple.src, 32, (void *)&now->src, 32, 0);
	outside = bpf_csum_diff((void *)&packet->tuple.src, 32, (void *)outer, 32, 0);
	ports = bpf_csum_diff((void *)&inner->tuple.sport, 4, (void *)&now->sport, 4, 0);
	if (wag_fix_l4(ctx, check, 0, ports, 0))
		return -1;
	if (echo ? wag_store(ctx, inner->port_off, &now->sport, 2) : wag_store(ctx, inner->port_off, &now->sport, 4))
		return -1;
	/* the sum of an ICMPv6 message takes in all addresses; IPv4 headers have sums of their own, which makes up for it */
	if (!v4 && (wag_fix_l4(ctx, check, 0, inside, 0) || wag_fix_l4(ctx, check, 0, outside, 0)))
		return -1;
	return wag_icmp_addresses(ctx, v4, inner->l3_off, &now->src, inside) ||
	       wag_icmp_addresses(ctx, v4, WAG_L3_OFF, outer, outside);
}

/* Policies will be asked about the packet inside: its source as its sender knows it, its destination as it got there. */
WAG_INLINE void wag_icmp_keep(struct wag_packet *packet, const struct wag_tuple *inner)
{
	struct wag_policy_work *work = wag_policy_work_get();

	if (!work)
		return;
	work->inner = *inner;
	packet->complains = 1;
}

/*
 * Is it an error about a translated flow? Then scratch->entry.to is the packet inside as its sender knows it, and
 * scratch->to leads there. What policies are to be asked about is kept for all errors. A global function, as wag_parse is.
 */
__noinline int wag_icmp_find(wag_ctx *ctx, struct wag_packet *packet, struct wag_scratch *scratch)
{
	struct wag_icmp_inner inner = {};
	struct wag_nat *nat;

	if (!packet || !scratch || !wag_icmp_read(ctx, packet, &inner))
		return false;
	wag_tuple_reverse(&scratch->answer, &inner.tuple);
	nat = bpf_map_lookup_elem(&wag_nat, &scratch->answer);
	if (!nat) {
		wag_icmp_keep(packet, &inner.tuple);
		return false;
	}
	wag_tuple_reverse(&scratch->entry.to, &nat->to);
	scratch->to = packet->tuple;
	scratch->to.dst = scratch->entry.to.src;
	scratch->answer = scratch->entry.to;
	scratch->answer.dst = inner.tuple.dst;
	scratch->answer.dport = inner.tuple.dport;
	wag_icmp_keep(packet, &scratch->answer);
	return true;
}

/* The error becomes one about the packet that was sent. Returns enum wag_verdict. */
static __noinline int wag_icmp_turn(wag_ctx *ctx, struct wag_packet *packet, struct wag_scratch *scratch)
{
	struct wag_icmp_inner inner = {};
	struct wag_addr outer[2];
	struct wag_tuple *sent;

	if (!packet || !scratch || !wag_icmp_read(ctx, packet, &inner))
		return WAG_NEXT;
	sent = &scratch->entry.to;
	/* where the backend itself is the one that complains, it is shown as what was asked */
	outer[0] = wag_addr_equal(&packet->tuple.src, &inner.tuple.dst) ? sent->dst : packet->tuple.src;
	outer[1] = sent->src;
	if (wag_icmp_write(ctx, packet, &inner, sent, outer))
		return wag_drop(packet, WAG_REASON_REWRITE);
	packet->tuple.src = outer[0];
	packet->tuple.dst = outer[1];
	packet->translated = 1;
	if (wag_is_routed(packet))
		return WAG_PASS;
	/* the flow is one that policies allowed */
	return wag_way(ctx, packet, &packet->tuple, wag_endpoint_find(&packet->tuple.dst));
}

/*
 * Turns back an error about a translated flow, and sends it on its way where the hook is one that does. WAG_NEXT:
 * something else, untouched. In parts, so that policies are asked with little on the stack.
 */
static __noinline int wag_icmp_pass(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_scratch *scratch = wag_scratch_get();
	int reason;

	if (!packet || !scratch || wag_is_marked(ctx) || !wag_icmp_find(ctx, packet, scratch))
		return WAG_NEXT;
	reason = wag_admits(ctx, packet, &scratch->to, wag_endpoint_find(&scratch->to.dst));
	return reason ? wag_drop(packet, reason) : wag_icmp_turn(ctx, packet, scratch);
}

/* What programs do that see only what the host stack sends: replies, and errors, of translated flows. */
WAG_INLINE enum wag_verdict wag_turn_back(wag_ctx *ctx, struct wag_packet *packet)
{
	int verdict = WAG_NEXT;

	if (packet->is_icmp)
		verdict = wag_icmp_pass(ctx, packet);
	if (verdict == WAG_NEXT && packet->has_flow)
		verdict = wag_nat_pass(ctx, packet);
	return verdict;
}

#endif
