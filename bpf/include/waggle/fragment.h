/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Fragments. Only the first one carries ports; those after it are found by what they share with it. A later fragment that
 * comes before the first has no ports: it is delivered by its address, and lost where that is a Service's.
 */
#ifndef WAGGLE_FRAGMENT_H
#define WAGGLE_FRAGMENT_H

#include <linux/bpf.h>
#include <linux/in.h>
#include "packet.h"

struct wag_fragment_key {
	struct wag_addr src;
	struct wag_addr dst;
	__u32 id; /* as it is in the header */
	__u8 proto;
	__u8 pad[3];
};

struct wag_fragment {
	__be16 sport;
	__be16 dport;
};

/* Key: datagram in pieces. Programs write and evict (LRU). Lives as long as the pieces are on their way. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct wag_fragment_key);
	__type(value, struct wag_fragment);
	__uint(max_entries, 4096);
} wag_fragments SEC(".maps");

/* `key` is zeroed. */
WAG_INLINE void wag_fragment_key_set(struct wag_fragment_key *key, const struct wag_tuple *tuple, __u32 id)
{
	key->src = tuple->src;
	key->dst = tuple->dst;
	key->id = id;
	key->proto = tuple->proto;
}

/* Remembers the ports of a first fragment; gives those of its first fragment to a later one. */
static __noinline int wag_fragment_join(struct wag_packet *packet)
{
	struct wag_fragment_key key = {};
	struct wag_fragment ports = {};
	struct wag_fragment *first;

	if (!packet)
		return 0;
	wag_fragment_key_set(&key, &packet->tuple, packet->fragment_id);
	if (!packet->later_fragment) {
		if (!packet->has_flow)
			return 0;
		ports.sport = packet->tuple.sport;
		ports.dport = packet->tuple.dport;
		bpf_map_update_elem(&wag_fragments, &key, &ports, BPF_ANY);
		return 0;
	}
	first = bpf_map_lookup_elem(&wag_fragments, &key);
	if (!first)
		return 0;
	packet->tuple.sport = first->sport;
	packet->tuple.dport = first->dport;
	packet->has_ports = packet->tuple.proto != IPPROTO_ICMP && packet->tuple.proto != IPPROTO_ICMPV6;
	packet->has_flow = 1;
	return 0;
}

/*
 * Fills `packet`. Returns enum wag_parse. A global function: the verifier walks it once, on its own, and goes on in its
 * callers with one state instead of one for every combination of headers (wag_node_ingress: 163,911 instructions before).
 */
__noinline int wag_parse(wag_ctx *ctx, struct wag_packet *packet, __u32 hook)
{
	int parsed;

	if (!packet)
		return WAG_PARSE_BAD;
	parsed = wag_parse_headers(ctx, packet, hook);
	if (parsed == WAG_PARSE_OK && packet->is_fragment)
		wag_fragment_join(packet);
	return parsed;
}

#endif
