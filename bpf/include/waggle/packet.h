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
#include "addr.h"
#include "verdict.h"

/* What identifies a flow, in one direction. Also the layout that checksums are taken over (36 bytes + 4). */
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
	__u8 later_fragment;
	__u8 is_icmp;
	__u8 translated; /* by wag_nat: hooks further on leave it alone */
	__u8 hook;      /* enum wag_hook */
	__u8 reason;    /* enum wag_reason, when the verdict is WAG_DROP */
	__u32 out_ifindex;
	/* WAG_TO_WIRE: next hop, as bpf_redirect_neigh wants it */
	struct bpf_redir_neigh next_hop;
};

#define WAG_L3_OFF ((__u16)sizeof(struct ethhdr))
/* skb->mark of packets that are translated and on their way out: wag_node_egress must not look at them again. */
#define WAG_MARK 0x77616767

#define WAG_TCP_FIN 0x01
#define WAG_TCP_SYN 0x02
#define WAG_TCP_RST 0x04
#define WAG_TCP_ACK 0x10

enum wag_parse {
	WAG_PARSE_OK = 0,
	WAG_PARSE_NOT_IP = 1,
	WAG_PARSE_BAD = 2,
};

WAG_INLINE bool wag_pull(struct __sk_buff *skb, __u32 size, void **data, void **end)
{
	*data = (void *)(long)skb->data;
	*end = (void *)(long)skb->data_end;
	if (*data + size <= *end)
		return true;
	if (size > skb->len || bpf_skb_pull_data(skb, size))
		return false;
	*data = (void *)(long)skb->data;
	*end = (void *)(long)skb->data_end;
	return *data + size <= *end;
}

/* Ports (and TCP flags) at packet->l4_off. A transport header cut short in a first fragment is malformed. */
WAG_INLINE enum wag_parse wag_parse_l4(struct __sk_buff *skb, struct wag_packet *packet)
{
	__u32 off = packet->l4_off;
	struct wag_tuple *tuple = &packet->tuple;
	__u8 head[16];

	switch (tuple->proto) {
	case IPPROTO_TCP:
		if (bpf_skb_load_bytes(skb, off, head, 14))
			return WAG_PARSE_BAD;
		packet->tcp_flags = head[13];
		break;
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		if (bpf_skb_load_bytes(skb, off, head, 8))
			return WAG_PARSE_BAD;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		packet->is_icmp = 1;
		return WAG_PARSE_OK;
	default:
		return WAG_PARSE_OK;
	}
	tuple->sport = *(__be16 *)&head[0];
	tuple->dport = *(__be16 *)&head[2];
	packet->has_ports = 1;
	return WAG_PARSE_OK;
}

WAG_INLINE enum wag_parse wag_parse_ip4(struct __sk_buff *skb, struct wag_packet *packet)
{
	void *data, *end;
	struct iphdr *ip;
	__u32 ihl;

	if (!wag_pull(skb, WAG_L3_OFF + sizeof(*ip), &data, &end))
		return WAG_PARSE_BAD;
	ip = data + WAG_L3_OFF;
	ihl = ip->ihl * 4;
	packet->size = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || ihl < sizeof(*ip) || packet->size < ihl)
		return WAG_PARSE_BAD;
	wag_addr_set4(&packet->tuple.src, ip->saddr);
	wag_addr_set4(&packet->tuple.dst, ip->daddr);
	packet->tuple.proto = ip->protocol;
	packet->ttl = ip->ttl;
	packet->l4_off = WAG_L3_OFF + ihl;
	if (ip->frag_off & bpf_htons(0x1fff)) {
		packet->later_fragment = 1;
		return WAG_PARSE_OK;
	}
	return wag_parse_l4(skb, packet);
}

struct wag_ip6_ext {
	__u8 next;
	__u8 len;
	__be16 frag_off; /* fragment header only */
};

#define WAG_IP6_EXT_MAX 6

WAG_INLINE enum wag_parse wag_parse_ip6(struct __sk_buff *skb, struct wag_packet *packet)
{
	void *data, *end;
	struct ipv6hdr *ip;
	__u32 off = WAG_L3_OFF + sizeof(*ip);
	__u8 next;
	int i;

	if (!wag_pull(skb, WAG_L3_OFF + sizeof(*ip), &data, &end))
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
		if (bpf_skb_load_bytes(skb, off, &ext, sizeof(ext)))
			return WAG_PARSE_BAD;
		if (next == IPPROTO_FRAGMENT) {
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
	return wag_parse_l4(skb, packet);
}

WAG_INLINE enum wag_parse wag_parse(struct __sk_buff *skb, struct wag_packet *packet, enum wag_hook hook)
{
	__builtin_memset(packet, 0, sizeof(*packet));
	packet->hook = hook;
	packet->eth_proto = skb->protocol;
	if (packet->eth_proto == bpf_htons(ETH_P_IP))
		return wag_parse_ip4(skb, packet);
	if (packet->eth_proto == bpf_htons(ETH_P_IPV6))
		return wag_parse_ip6(skb, packet);
	return WAG_PARSE_NOT_IP;
}

WAG_INLINE enum wag_verdict wag_drop(struct wag_packet *packet, enum wag_reason reason)
{
	packet->reason = reason;
	return WAG_DROP;
}

#endif
