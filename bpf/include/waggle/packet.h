/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A packet as the programs see it. The parser fills struct wag_packet once; afterwards nobody looks at headers again,
 * except to rewrite them.
 */
#ifndef WAGGLE_PACKET_H
#define WAGGLE_PACKET_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stddef.h>
#include "access.h"
#include "addr.h"
#include "config.h"
#include "endpoint.h"
#include "verdict.h"

/*
 * What identifies a flow, in one direction. Also the layout that checksums are taken over (36 bytes + 4). The ports of an
 * ICMP echo are its identifier and 0: a request has it as source, a reply as destination.
 */
struct wag_tuple {
	struct wag_addr src;
	struct wag_addr dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 pad[3];
};

struct wag_packet {
	struct wag_tuple tuple;
	__u16 l4_off;
	__u16 size;     /* of the IP packet */
	__be16 eth_proto;
	__u8 ttl;
	__u8 tcp_flags; /* byte 13 of the TCP header */
	__u8 has_ports;
	__u8 has_flow;       /* the tuple is that of a flow: it has ports, or it is an ICMP echo */
	__u8 may_fragment;   /* IPv4 without "don't fragment" */
	__u8 is_fragment;    /* of several */
	__u8 later_fragment; /* one without ports of its own */
	__u8 is_icmp;
	__u8 begins;     /* by its header it can be the first packet of a flow; one of UDP always can */
	__u8 translated; /* by wag_nat: hooks further on leave it alone */
	__u8 queued;     /* WAG_TO_POD: not past the queue of the pod's interface */
	__u8 complains;  /* an ICMP error about the packet in wag_policy_work */
	__u8 isolated;   /* its sender is a pod of this node that policies select */
	__u8 pending;    /* its sender is a pod that nobody has told what it may send */
	__u8 admitted;   /* by the policies of both ends */
	__u8 answers;    /* a DNS answer, for a pod whose policies accept names; more in wag_policy_work */
	__u8 audit;      /* it would not have been, were the audited policies enforced: bits of enum wag_direction */
	__u8 own;        /* the node's own: its policies are asked, and no pod's */
	__u8 trial;      /* those that are on trial */
	__u8 hook;      /* enum wag_hook */
	__u8 reason;    /* enum wag_reason, when the verdict is WAG_DROP or WAG_REJECT */
	__u8 answer;    /* enum wag_answer, when the verdict is WAG_REJECT */
	__u16 mtu;      /* WAG_ANSWER_TOO_BIG: the largest IP packet that would have fitted */
	__be32 fragment_id; /* what the fragments of one packet share */
	__u32 out_ifindex;
	__u32 rule;   /* of policy.h: who decided last, in which set */
	__u64 policy;
	/* WAG_TO_WIRE: next hop, as bpf_redirect_neigh wants it */
	struct bpf_redir_neigh next_hop;
};

#define WAG_L3_OFF ((__u16)sizeof(struct ethhdr))

#define WAG_REPLY_TTL 64 /* of what the programs send themselves */
/* skb->pkt_type, include/uapi/linux/if_packet.h */
#define WAG_PACKET_HOST 0
#define WAG_PACKET_OTHERHOST 3

/* What the sender of a rejected packet is told. */
enum wag_answer {
	WAG_ANSWER_UNREACHABLE = 0, /* a reset, where it is TCP; port unreachable */
	WAG_ANSWER_TOO_BIG = 1,     /* fragmentation needed, packet too big */
	WAG_ANSWER_EXPIRED = 2,     /* time exceeded */
};

#define WAG_TCP_FIN 0x01
#define WAG_TCP_SYN 0x02
#define WAG_TCP_RST 0x04
#define WAG_TCP_ACK 0x10

enum wag_parse {
	WAG_PARSE_OK = 0,
	WAG_PARSE_NOT_IP = 1,
	WAG_PARSE_BAD = 2,
};

WAG_INLINE bool wag_pull(wag_ctx *ctx, __u32 size, void **data, void **end)
{
	*data = (void *)(long)ctx->data;
	*end = (void *)(long)ctx->data_end;
	if (*data + size <= *end)
		return true;
#ifndef WAG_XDP
	if (size > ctx->len || bpf_skb_pull_data(ctx, size))
		return false;
	*data = (void *)(long)ctx->data;
	*end = (void *)(long)ctx->data_end;
#endif
	return *data + size <= *end;
}

WAG_INLINE bool wag_is_echo_request(const struct wag_tuple *tuple, __u8 type)
{
	return type == (tuple->proto == IPPROTO_ICMP ? 8 : 128);
}

WAG_INLINE bool wag_is_echo_reply(const struct wag_tuple *tuple, __u8 type)
{
	return type == (tuple->proto == IPPROTO_ICMP ? 0 : 129);
}

/*
 * Does a pod send it for the stack to forward? What is for the link, for another machine on it, or for this node, ends
 * there.
 */
WAG_INLINE bool wag_asks_router(wag_ctx *ctx, const struct wag_packet *packet)
{
#ifdef WAG_XDP
	return false;
#else
	return packet->hook == WAG_HOOK_POD_EGRESS && ctx->pkt_type == WAG_PACKET_HOST &&
	       !wag_addr_stays_on_link(&packet->tuple.dst) &&
	       !wag_endpoint_is(wag_endpoint_find(&packet->tuple.dst), WAG_ENDPOINT_NODE);
#endif
}

/*
 * Neighbour discovery, which is to IPv6 what ARP is to IPv4: between two ends of one link, and void when a router has seen
 * it (RFC 4861). Pods have such links where another plugin made them. What only looks like it is a packet as any other:
 * the stack forwards it.
 */
WAG_INLINE bool wag_is_discovery(wag_ctx *ctx, const struct wag_packet *packet, __u8 type)
{
	return packet->tuple.proto == IPPROTO_ICMPV6 && packet->ttl == 255 && type >= 133 && type <= 137 &&
	       !wag_asks_router(ctx, packet);
}

#define WAG_SCTP_INIT 1
#define WAG_SCTP_ABORT 6
#define WAG_SCTP_SHUTDOWN_COMPLETE 14

/* Ports (and TCP flags) at packet->l4_off. A transport header cut short in a first fragment is malformed. */
WAG_INLINE enum wag_parse wag_parse_l4(wag_ctx *ctx, struct wag_packet *packet)
{
	__u32 off = packet->l4_off;
	struct wag_tuple *tuple = &packet->tuple;
	__u8 head[16];

	switch (tuple->proto) {
	case IPPROTO_TCP:
		if (wag_load(ctx, off, head, 14))
			return WAG_PARSE_BAD;
		packet->tcp_flags = head[13];
		packet->begins = (head[13] & (WAG_TCP_SYN | WAG_TCP_ACK | WAG_TCP_RST)) == WAG_TCP_SYN;
		break;
	case IPPROTO_SCTP:
		if (wag_load(ctx, off, head, 12))
			return WAG_PARSE_BAD;
		packet->begins = !wag_load(ctx, off + 12, head + 12, 1) && head[12] == WAG_SCTP_INIT;
		break;
	case IPPROTO_UDP:
		if (wag_load(ctx, off, head, 8))
			return WAG_PARSE_BAD;
		packet->begins = 1;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		packet->is_icmp = 1;
		if (wag_load(ctx, off, head, 8))
			return WAG_PARSE_OK; /* of no use to us; whoever gets it judges it */
		if (wag_is_discovery(ctx, packet, head[0]))
			return WAG_PARSE_NOT_IP;
		if (wag_is_echo_request(tuple, head[0])) {
			tuple->sport = *(__be16 *)&head[4];
			packet->begins = 1;
			packet->has_flow = 1;
		} else if (wag_is_echo_reply(tuple, head[0])) {
			tuple->dport = *(__be16 *)&head[4];
			packet->has_flow = 1;
		}
		return WAG_PARSE_OK;
	default:
		return WAG_PARSE_OK;
	}
	tuple->sport = *(__be16 *)&head[0];
	tuple->dport = *(__be16 *)&head[2];
	packet->has_ports = 1;
	packet->has_flow = 1;
	return WAG_PARSE_OK;
}

WAG_INLINE enum wag_parse wag_parse_ip4(wag_ctx *ctx, struct wag_packet *packet)
{
	void *data, *end;
	struct iphdr *ip;
	__u32 ihl;

	if (!wag_pull(ctx, WAG_L3_OFF + sizeof(*ip), &data, &end))
		return WAG_PARSE_BAD;
	ip = data + WAG_L3_OFF;
	ihl = ip->ihl * 4;
	packet->size = bpf_ntohs(ip->tot_len);
#ifndef WAG_XDP
	if (!ip->tot_len)
		packet->size = ctx->len - WAG_L3_OFF; /* more than 64 KiB, by GRO */
#endif
	if (ip->version != 4 || ihl < sizeof(*ip) || packet->size < ihl)
		return WAG_PARSE_BAD;
	wag_addr_set4(&packet->tuple.src, ip->saddr);
	wag_addr_set4(&packet->tuple.dst, ip->daddr);
	packet->tuple.proto = ip->protocol;
	packet->ttl = ip->ttl;
	packet->l4_off = WAG_L3_OFF + ihl;
	packet->may_fragment = !(ip->frag_off & bpf_htons(0x4000));
	if (ip->frag_off & bpf_htons(0x3fff)) { /* more fragments, or an offset */
		packet->is_fragment = 1;
		packet->fragment_id = ip->id;
	}
	if (ip->frag_off & bpf_htons(0x1fff)) {
		packet->later_fragment = 1;
		return WAG_PARSE_OK;
	}
	return wag_parse_l4(ctx, packet);
}

struct wag_ip6_ext {
	__u8 next;
	__u8 len;
	__be16 frag_off; /* fragment header only */
	__be32 id;       /* fragment header only */
};

#define WAG_IP6_EXT_MAX 6

WAG_INLINE enum wag_parse wag_parse_ip6(wag_ctx *ctx, struct wag_packet *packet)
{
	void *data, *end;
	struct ipv6hdr *ip;
	__u32 off = WAG_L3_OFF + sizeof(*ip);
	__u8 next;
	int i;

	if (!wag_pull(ctx, WAG_L3_OFF + sizeof(*ip), &data, &end))
		return WAG_PARSE_BAD;
	ip = data + WAG_L3_OFF;
	if (ip->version != 6)
		return WAG_PARSE_BAD;
	packet->size = bpf_ntohs(ip->payload_len) + sizeof(*ip);
	__builtin_memcpy(&packet->tuple.src, &ip->saddr, sizeof(packet->tuple.src));
	__builtin_memcpy(&packet->tuple.dst, &ip->daddr, sizeof(packet->tuple.dst));
	packet->ttl = ip->hop_limit;
	next = ip->nexthdr;

	for (i = 0; i < WAG_IP6_EXT_MAX; i++) {
		struct wag_ip6_ext ext;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			break;
		if (wag_load(ctx, off, &ext, sizeof(ext)))
			return WAG_PARSE_BAD;
		if (next == IPPROTO_FRAGMENT) {
			packet->is_fragment = 1;
			packet->fragment_id = ext.id;
			if (ext.frag_off & bpf_htons(0xfff8))
				packet->later_fragment = 1;
			off += 8;
		} else {
			off += (ext.len + 1) * 8;
		}
		next = ext.next;
	}
	packet->tuple.proto = next;
	packet->l4_off = off;
	if (packet->later_fragment)
		return WAG_PARSE_OK;
	return wag_parse_l4(ctx, packet);
}

#ifndef WAG_XDP
#define WAG_VLAN_NUMBER 0x0fff

/*
 * Takes off a tag without a number: the stack takes such a packet for one without a tag, and so do we. Another tag below
 * it, which the stack would take off too, is no packet that anybody sends.
 */
WAG_INLINE bool wag_untag(wag_ctx *ctx)
{
	if (!ctx->vlan_present || ctx->vlan_tci & WAG_VLAN_NUMBER)
		return true;
	if (bpf_skb_vlan_pop(ctx))
		return false;
	return !ctx->vlan_present || ctx->vlan_tci & WAG_VLAN_NUMBER;
}
#endif

WAG_INLINE enum wag_parse wag_parse_headers(wag_ctx *ctx, struct wag_packet *packet, enum wag_hook hook)
{
	__builtin_memset(packet, 0, sizeof(*packet));
	packet->hook = hook;
#ifndef WAG_XDP
	if (!wag_untag(ctx))
		return WAG_PARSE_BAD;
	packet->eth_proto = ctx->protocol;
	if (ctx->vlan_present) /* of a VLAN: its own interface sees it */
		return WAG_PARSE_NOT_IP;
#else
	if (wag_load(ctx, offsetof(struct ethhdr, h_proto), &packet->eth_proto, sizeof(packet->eth_proto)))
		return WAG_PARSE_NOT_IP;
#endif
	if (packet->eth_proto == bpf_htons(ETH_P_IP))
		return wag_parse_ip4(ctx, packet);
	if (packet->eth_proto == bpf_htons(ETH_P_IPV6))
		return wag_parse_ip6(ctx, packet);
	return WAG_PARSE_NOT_IP;
}

WAG_INLINE enum wag_verdict wag_drop(struct wag_packet *packet, enum wag_reason reason)
{
	packet->reason = reason;
	return WAG_DROP;
}

/* A packet in the middle of a connection: those of TCP and SCTP are never taken from their backend. */
WAG_INLINE bool wag_is_established(const struct wag_packet *packet)
{
	if (packet->tuple.proto == IPPROTO_SCTP)
		return !packet->begins;
	return packet->tuple.proto == IPPROTO_TCP &&
	       (packet->tcp_flags & (WAG_TCP_SYN | WAG_TCP_ACK)) != WAG_TCP_SYN;
}

/* Does it say itself that a connection begins? */
WAG_INLINE bool wag_begins(const struct wag_packet *packet)
{
	return (packet->tuple.proto == IPPROTO_TCP || packet->tuple.proto == IPPROTO_SCTP) && !wag_is_established(packet);
}

/*
 * Is a packet that no flow of ours has for the stack, because conntrack may know better? Not until waggle has taken over
 * what another proxy began. One that begins a TCP connection is ours.
 */
WAG_INLINE bool wag_is_left_to_conntrack(const struct wag_packet *packet)
{
	return wag_beside_proxy && packet->has_flow && (wag_is_established(packet) || packet->tuple.proto == IPPROTO_UDP);
}

/* Has the host stack chosen the packet's way already, before this hook? */
WAG_INLINE bool wag_is_routed(const struct wag_packet *packet)
{
	return packet->hook == WAG_HOOK_POD_INGRESS || packet->hook == WAG_HOOK_NODE_EGRESS;
}

/* The verdict over a packet that a Service does not serve. */
WAG_INLINE enum wag_verdict wag_refuse(struct wag_packet *packet, enum wag_reason reason)
{
	packet->reason = reason;
	return wag_reason_rejects(reason) ? WAG_REJECT : WAG_DROP;
}

/* This node's address of the packet's family. False, and zeros, where it has none. */
WAG_INLINE bool wag_node_address(struct wag_addr *addr, const struct wag_packet *packet)
{
	bool v4 = packet->eth_proto == bpf_htons(ETH_P_IP);

	addr->half[0] = v4 ? wag_node_ip4.half[0] : wag_node_ip6.half[0];
	addr->half[1] = v4 ? wag_node_ip4.half[1] : wag_node_ip6.half[1];
	return addr->half[0] || addr->half[1];
}

/* Writes the IP header of a packet of our own, behind the Ethernet header; `size` of what follows it. Checksum included. */
WAG_INLINE int wag_write_ip(wag_ctx *ctx, bool v4, __u8 proto, __u16 size, const struct wag_addr *src,
			    const struct wag_addr *dst)
{
	if (v4) {
		struct iphdr ip = {
			.version = 4,
			.ihl = 5,
			.tot_len = bpf_htons(sizeof(ip) + size),
			.frag_off = bpf_htons(0x4000),
			.ttl = WAG_REPLY_TTL,
			.protocol = proto,
			.saddr = src->word[3],
			.daddr = dst->word[3],
		};

		ip.check = wag_csum_fold(bpf_csum_diff(NULL, 0, (void *)&ip, sizeof(ip), 0));
		return wag_store_summed(ctx, WAG_L3_OFF, &ip, sizeof(ip));
	}
	struct ipv6hdr ip6 = {
		.version = 6,
		.payload_len = bpf_htons(size),
		.nexthdr = proto,
		.hop_limit = WAG_REPLY_TTL,
	};

	__builtin_memcpy(&ip6.saddr, src, 16);
	__builtin_memcpy(&ip6.daddr, dst, 16);
	return wag_store_summed(ctx, WAG_L3_OFF, &ip6, sizeof(ip6));
}

#endif
