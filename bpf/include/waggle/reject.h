/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rejecting: the packet becomes its own answer and goes back where it came from. TCP is reset (RFC 9293 section
 * 3.10.7.1), SCTP aborted (RFC 9260 section 8.4), as its sockets only note a "port unreachable" and go on trying;
 * everything else gets that (RFC 792, RFC 4443); what does not fit, or has come too far, gets the error for that. Resets
 * and aborts are never answered, nor is what was not sent to one receiver.
 */
#ifndef WAGGLE_REJECT_H
#define WAGGLE_REJECT_H

#include <linux/bpf.h>
#include "forward.h"
#include "packet.h"
#include "sctp.h"

#define WAG_QUOTE_MAX 128 /* bytes of the rejected packet that an ICMP error can hold: headers and a little more */

/* IP header of an answer, from the address that was asked; `size` of what follows it. */
WAG_INLINE int wag_reply_ip(wag_ctx *ctx, const struct wag_packet *packet, __u8 proto, __u16 size)
{
	return wag_write_ip(ctx, packet->eth_proto == bpf_htons(ETH_P_IP), proto, size, &packet->tuple.dst,
			    &packet->tuple.src);
}

/* Sum of the pseudo header of an answer. Of no family the order of the addresses matters. */
WAG_INLINE __s64 wag_reply_pseudo(const struct wag_packet *packet, __u8 proto, __u32 size)
{
	struct {
		__be32 size;
		__be32 proto;
	} rest = { bpf_htonl(size), bpf_htonl(proto) };
	__s64 sum = bpf_csum_diff(NULL, 0, (void *)&rest, sizeof(rest), 0);

	if (packet->eth_proto == bpf_htons(ETH_P_IP)) {
		__be32 pair[2] = { packet->tuple.src.word[3], packet->tuple.dst.word[3] };

		return bpf_csum_diff(NULL, 0, pair, sizeof(pair), sum);
	}
	return bpf_csum_diff(NULL, 0, (void *)&packet->tuple.src, 32, sum);
}

WAG_INLINE int wag_reply_eth(wag_ctx *ctx)
{
	__u8 macs[12], swapped[12];

	if (bpf_skb_load_bytes(ctx, 0, macs, sizeof(macs)))
		return -1;
	__builtin_memcpy(swapped, macs + 6, 6);
	__builtin_memcpy(swapped + 6, macs, 6);
	return bpf_skb_store_bytes(ctx, 0, swapped, sizeof(swapped), 0);
}

static __noinline int wag_reply_reset(wag_ctx *ctx, struct wag_packet *packet)
{
	struct tcphdr tcp, reset = {};
	__u16 l4_off;

	if (!packet || bpf_skb_load_bytes(ctx, packet->l4_off, &tcp, sizeof(tcp)) || tcp.rst)
		return -1;
	reset.source = tcp.dest;
	reset.dest = tcp.source;
	reset.doff = sizeof(reset) / 4;
	reset.rst = 1;
	if (tcp.ack) {
		reset.seq = tcp.ack_seq;
	} else {
		__u32 size = packet->size - (packet->l4_off - WAG_L3_OFF) - tcp.doff * 4;

		reset.ack = 1;
		reset.ack_seq = bpf_htonl(bpf_ntohl(tcp.seq) + size + tcp.syn + tcp.fin);
	}
	reset.check = wag_csum_fold(bpf_csum_diff(NULL, 0, (void *)&reset, sizeof(reset),
						  wag_reply_pseudo(packet, IPPROTO_TCP, sizeof(reset))));
	l4_off = WAG_L3_OFF +
		 (packet->eth_proto == bpf_htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	return bpf_skb_change_tail(ctx, l4_off + sizeof(reset), 0) || wag_reply_eth(ctx) ||
	       wag_reply_ip(ctx, packet, IPPROTO_TCP, sizeof(reset)) ||
	       wag_store_summed(ctx, l4_off, &reset, sizeof(reset));
}

/* The header of a packet and of its first chunk; of an ABORT, all of it. */
struct wag_sctp_head {
	__be16 source;
	__be16 dest;
	__be32 tag;
	__u32 check;
	__u8 chunk;
	__u8 flags; /* of an ABORT 1: the tag is the one that its receiver sent */
	__be16 size;
};

static __noinline int wag_reply_abort(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_sctp_head head, abort = {};
	__u16 l4_off;

	if (!packet || bpf_skb_load_bytes(ctx, packet->l4_off, &head, sizeof(head)) || head.chunk == WAG_SCTP_ABORT ||
	    head.chunk == WAG_SCTP_SHUTDOWN_COMPLETE)
		return -1;
	abort.source = head.dest;
	abort.dest = head.source;
	abort.tag = head.tag;
	abort.chunk = WAG_SCTP_ABORT;
	abort.size = bpf_htons(4);
	if (head.chunk != WAG_SCTP_INIT)
		abort.flags = 1;
	else if (bpf_skb_load_bytes(ctx, packet->l4_off + sizeof(head), &abort.tag, sizeof(abort.tag)))
		return -1;
	if (head.check) /* else it is computed later, if at all, and so is the answer's */
		abort.check = wag_sctp_sum((void *)&abort, sizeof(abort) / 4);
	l4_off = WAG_L3_OFF +
		 (packet->eth_proto == bpf_htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	return bpf_skb_change_tail(ctx, l4_off + sizeof(abort), 0) || wag_reply_eth(ctx) ||
	       wag_reply_ip(ctx, packet, IPPROTO_SCTP, sizeof(abort)) ||
	       wag_store_summed(ctx, l4_off, &abort, sizeof(abort));
}

/*
 * How much of the transport header an error quotes: all that the kernel insists on. A checksum that is yet to be computed
 * is not to be cut off.
 */
WAG_INLINE __u32 wag_quoted(const struct wag_packet *packet)
{
	switch (packet->tuple.proto) {
	case IPPROTO_TCP:
		return sizeof(struct tcphdr);
	case IPPROTO_SCTP:
		return WAG_SCTP_HEADER;
	default:
		return 8;
	}
}

static __noinline int wag_reply_error(wag_ctx *ctx, struct wag_packet *packet)
{
	__u8 message[8 + WAG_QUOTE_MAX] = {}; /* sums need no more than zeros after the end */
	__u32 quoted, head;
	bool v4;

	if (!packet)
		return -1;
	v4 = packet->eth_proto == bpf_htons(ETH_P_IP);
	head = (v4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) + 8;
	quoted = packet->l4_off - WAG_L3_OFF + wag_quoted(packet);
	if (quoted > WAG_QUOTE_MAX)
		quoted = WAG_QUOTE_MAX;
	if (quoted < 8 || bpf_skb_load_bytes(ctx, WAG_L3_OFF, message + 8, quoted))
		return -1;
	switch (packet->answer) {
	case WAG_ANSWER_TOO_BIG:
		message[0] = v4 ? 3 : 2; /* unreachable, fragmentation needed; packet too big */
		message[1] = v4 ? 4 : 0;
		*(__be16 *)(message + 6) = bpf_htons(packet->mtu); /* of 16 bits, or the lower half of 32 */
		break;
	case WAG_ANSWER_EXPIRED:
		message[0] = v4 ? 11 : 3;
		break;
	default:
		message[0] = v4 ? 3 : 1; /* destination unreachable, */
		message[1] = v4 ? 3 : 4; /* port */
	}
	*(__sum16 *)(message + 2) = wag_csum_fold(
		bpf_csum_diff(NULL, 0, (void *)message, sizeof(message),
			      v4 ? 0 : wag_reply_pseudo(packet, IPPROTO_ICMPV6, 8 + quoted)));
	return bpf_skb_change_tail(ctx, WAG_L3_OFF + quoted, 0) ||
	       bpf_skb_adjust_room(ctx, head, BPF_ADJ_ROOM_MAC, 0) || wag_reply_eth(ctx) ||
	       wag_reply_ip(ctx, packet, v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6, 8 + quoted) ||
	       wag_store_summed(ctx, WAG_L3_OFF + head - 8, message, 8);
}

/* Multicast and broadcast are not answered. */
WAG_INLINE bool wag_reply_allowed(const wag_ctx *ctx)
{
	return ctx->pkt_type != 1 && ctx->pkt_type != 2; /* PACKET_BROADCAST, PACKET_MULTICAST */
}

/* What does not get through is answered by who does not let it through; a Service's port, by its address. */
WAG_INLINE void wag_reply_source(struct wag_packet *packet)
{
	struct wag_addr mine;

	if (packet->answer != WAG_ANSWER_UNREACHABLE && wag_node_address(&mine, packet))
		packet->tuple.dst = mine;
}

/* Turns the packet into its answer and sends it back. What the hook returns. */
WAG_INLINE int wag_reject(wag_ctx *ctx, struct wag_packet *packet)
{
	bool refused = packet->answer == WAG_ANSWER_UNREACHABLE;
	int failed;

	wag_report_drop(ctx, packet, WAG_OUTCOME_REJECTED);
	if (!wag_reply_allowed(ctx))
		return wag_shot();
	wag_reply_source(packet);
	if (refused && packet->tuple.proto == IPPROTO_TCP)
		failed = wag_reply_reset(ctx, packet);
	else if (refused && packet->tuple.proto == IPPROTO_SCTP)
		failed = wag_reply_abort(ctx, packet);
	else
		failed = wag_reply_error(ctx, packet);
	if (failed)
		return wag_shot();
	return wag_send_back(ctx, packet);
}

#endif
