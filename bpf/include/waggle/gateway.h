/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a pod sees as its gateway (sources/cni_interface.py) is an address that nobody has. The pod's kernel is given its MAC
 * with the interface; a machine behind a tap device in the pod's namespace is not, and asks. Whoever asks from an address of
 * the pod is told the MAC of the interface's host side, by ARP or neighbour discovery, in the packet itself, turned round.
 */
#ifndef WAGGLE_GATEWAY_H
#define WAGGLE_GATEWAY_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ipv6.h>
#include <stddef.h>
#include "access.h"
#include "endpoint.h"
#include "packet.h"

#define WAG_GATEWAY4 bpf_htonl(0xa9fe0101)            /* 169.254.1.1 */
#define WAG_GATEWAY6_HIGH bpf_cpu_to_be64(0xfe80ULL << 48) /* fe80::1 */
#define WAG_GATEWAY6_LOW bpf_cpu_to_be64(1)

struct wag_arp {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_size;
	__u8 protocol_size;
	__be16 operation;
	__u8 sender_mac[6];
	__be32 sender;
	__u8 target_mac[6];
	__be32 target;
} __attribute__((packed));

enum wag_arp_operation {
	WAG_ARP_REQUEST = 1,
	WAG_ARP_REPLY = 2,
};

/* A solicitation or advertisement of neighbour discovery, with one link-layer address (RFC 4861 section 4.3, 4.4). */
struct wag_neighbour {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be32 flags;
	struct wag_addr target;
	__u8 option;
	__u8 option_size;
	__u8 mac[6];
};

enum wag_neighbour_type {
	WAG_SOLICITATION = 135,
	WAG_ADVERTISEMENT = 136,
	WAG_SOURCE_MAC = 1, /* options */
	WAG_TARGET_MAC = 2,
};

#define WAG_NEIGHBOUR_FLAGS bpf_htonl(0xe0000000) /* router, solicited, override */

/* The pod whose address asks, by the interface that it asks on. */
WAG_INLINE const struct wag_endpoint *wag_asks_gateway(wag_ctx *ctx, const struct wag_addr *sender)
{
	const struct wag_endpoint *pod = wag_endpoint_find(sender);

	return wag_endpoint_is(pod, WAG_ENDPOINT_POD) && pod->ifindex == ctx->ifindex ? pod : NULL;
}

WAG_INLINE long wag_gateway_eth(wag_ctx *ctx, const __u8 *to, const __u8 *from)
{
	__u8 macs[12];

	__builtin_memcpy(macs, to, 6);
	__builtin_memcpy(macs + 6, from, 6);
	return bpf_skb_store_bytes(ctx, 0, macs, sizeof(macs), 0);
}

WAG_INLINE bool wag_gateway_arp(wag_ctx *ctx)
{
	const struct wag_endpoint *pod;
	struct wag_addr sender;
	struct wag_arp arp;

	if (wag_load(ctx, sizeof(struct ethhdr), &arp, sizeof(arp)) || arp.operation != bpf_htons(WAG_ARP_REQUEST) ||
	    arp.protocol != bpf_htons(ETH_P_IP) || arp.target != WAG_GATEWAY4)
		return false;
	wag_addr_set4(&sender, arp.sender);
	pod = wag_asks_gateway(ctx, &sender);
	if (!pod)
		return false;
	arp.operation = bpf_htons(WAG_ARP_REPLY);
	arp.target = arp.sender;
	arp.sender = WAG_GATEWAY4;
	__builtin_memcpy(arp.target_mac, arp.sender_mac, 6);
	__builtin_memcpy(arp.sender_mac, pod->host_mac, 6);
	return !wag_store_summed(ctx, sizeof(struct ethhdr), &arp, sizeof(arp)) &&
	       !wag_gateway_eth(ctx, arp.target_mac, arp.sender_mac);
}

WAG_INLINE bool wag_gateway_discovery(wag_ctx *ctx, const struct wag_packet *packet)
{
	struct {
		struct wag_addr source;
		struct wag_addr destination;
		__be32 size;
		__be32 protocol;
	} pseudo = {};
	struct wag_neighbour message;
	const struct wag_endpoint *pod;
	__u8 mac[6];

	if (packet->size != sizeof(struct ipv6hdr) + sizeof(message) ||
	    wag_load(ctx, packet->l4_off, &message, sizeof(message)) || message.type != WAG_SOLICITATION ||
	    message.option != WAG_SOURCE_MAC || message.target.half[0] != WAG_GATEWAY6_HIGH ||
	    message.target.half[1] != WAG_GATEWAY6_LOW)
		return false;
	pod = wag_asks_gateway(ctx, &packet->tuple.src);
	if (!pod)
		return false;
	__builtin_memcpy(mac, message.mac, 6);
	message.type = WAG_ADVERTISEMENT;
	message.check = 0;
	message.flags = WAG_NEIGHBOUR_FLAGS;
	message.option = WAG_TARGET_MAC;
	__builtin_memcpy(message.mac, pod->host_mac, 6);
	pseudo.source = message.target;
	pseudo.destination = packet->tuple.src;
	pseudo.size = bpf_htonl(sizeof(message));
	pseudo.protocol = bpf_htonl(IPPROTO_ICMPV6);
	message.check = wag_csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&message, sizeof(message),
						    bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0)));
	return !wag_store_summed(ctx, packet->l4_off, &message, sizeof(message)) &&
	       !wag_store_summed(ctx, WAG_L3_OFF + offsetof(struct ipv6hdr, saddr), &pseudo.source,
				 2 * sizeof(struct wag_addr)) &&
	       !wag_gateway_eth(ctx, mac, message.mac);
}

/* Of a packet that is none of the programs' business: does it ask for the gateway, and is it the answer now? */
static __noinline int wag_gateway_answers(wag_ctx *ctx, struct wag_packet *packet)
{
	if (!packet)
		return false;
	if (packet->eth_proto == bpf_htons(ETH_P_ARP))
		return wag_gateway_arp(ctx);
	return packet->eth_proto == bpf_htons(ETH_P_IPV6) && packet->is_icmp && wag_gateway_discovery(ctx, packet);
}

#endif
