/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * NAT: an entry says what a tuple becomes. A translated flow has two: the client's packets (client → frontend becomes
 * client or node → backend) and the replies (backend → client or node becomes frontend → client). Both are one map and
 * are applied by one function; a direction is never told apart.
 */
#ifndef WAGGLE_NAT_H
#define WAGGLE_NAT_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stddef.h>
#include "config.h"
#include "endpoint.h"
#include "event.h"
#include "packet.h"
#include "service.h"

enum wag_nat_flag {
	WAG_NAT_FORWARD = 1, /* client to backend */
	WAG_NAT_CLOSING = 2, /* FIN or RST seen in this direction */
};

struct wag_nat {
	struct wag_tuple to;   /* what the packet becomes */
	__u32 revision;        /* of the Service when its backend was last found valid */
	__u32 flags;           /* enum wag_nat_flag */
	__u64 seen_ns;         /* CLOCK_MONOTONIC, coarse to one second */
};

/* Key: tuple of a packet. Programs write and evict (LRU), the agent reads. Two entries per translated flow. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct wag_tuple);
	__type(value, struct wag_nat);
	__uint(max_entries, 131072);
} wag_nat SEC(".maps");

#define WAG_NAT_TRIES 8
#define WAG_SECOND_NS 1000000000ULL

/* kernel: commit ("bpf: Fix L4 csum update on IPv6 in CHECKSUM_COMPLETE") added the flag, older ones refuse it */
#define WAG_F_IPV6 (1ULL << 7)

WAG_INLINE void wag_nat_touch(struct wag_nat *nat, const struct wag_packet *packet)
{
	__u64 now = bpf_ktime_get_ns();

	if (now - nat->seen_ns > WAG_SECOND_NS)
		nat->seen_ns = now;
	if (packet->tuple.proto == IPPROTO_TCP && (packet->tcp_flags & (WAG_TCP_FIN | WAG_TCP_RST)))
		nat->flags |= WAG_NAT_CLOSING;
}

WAG_INLINE int wag_l4_checksum_offset(__u8 proto)
{
	if (proto == IPPROTO_TCP)
		return offsetof(struct tcphdr, check);
	if (proto == IPPROTO_UDP)
		return offsetof(struct udphdr, check);
	return -1;
}

/*
 * Turns the packet's tuple into `to`, checksums included. SCTP has its CRC over ports, which BPF cannot see whole:
 * only its addresses may change here (no pseudo header there).
 */
static __noinline int wag_rewrite(struct __sk_buff *skb, struct wag_packet *packet, const struct wag_tuple *to)
{
	struct wag_tuple old;
	int check, l4;
	__s64 addr_diff;
	__u64 flags = BPF_F_PSEUDO_HDR;
	__u32 port_diff_from, port_diff_to;
	bool v4;

	if (!packet || !to)
		return -1;
	old = packet->tuple;
	v4 = packet->eth_proto == bpf_htons(ETH_P_IP);
	l4 = packet->l4_off;
	check = wag_l4_checksum_offset(old.proto);
	addr_diff = bpf_csum_diff((void *)&old.src, 32, (void *)&to->src, 32, 0);
	if (addr_diff < 0)
		return -1;
	if (check < 0 && (old.sport != to->sport || old.dport != to->dport))
		return -1;

	if (check >= 0) {
		if (old.proto == IPPROTO_UDP)
			flags |= BPF_F_MARK_MANGLED_0;
		if (bpf_l4_csum_replace(skb, l4 + check, 0, addr_diff, flags))
			return -1;
		flags &= ~(__u64)BPF_F_PSEUDO_HDR;
		port_diff_from = (__u32)old.sport << 16 | old.dport;
		port_diff_to = (__u32)to->sport << 16 | to->dport;
		if (port_diff_from != port_diff_to) {
			if (old.sport != to->sport &&
			    bpf_l4_csum_replace(skb, l4 + check, old.sport, to->sport, flags | 2))
				return -1;
			if (old.dport != to->dport &&
			    bpf_l4_csum_replace(skb, l4 + check, old.dport, to->dport, flags | 2))
				return -1;
			if (bpf_skb_store_bytes(skb, l4, &to->sport, 4, 0))
				return -1;
		}
	}
	if (v4) {
		__be32 pair[2] = { to->src.word[3], to->dst.word[3] };

		if (bpf_l3_csum_replace(skb, WAG_L3_OFF + offsetof(struct iphdr, check), 0, addr_diff, 0) ||
		    bpf_skb_store_bytes(skb, WAG_L3_OFF + offsetof(struct iphdr, saddr), pair, sizeof(pair), 0))
			return -1;
	} else {
		if (bpf_skb_store_bytes(skb, WAG_L3_OFF + offsetof(struct ipv6hdr, saddr), (void *)&to->src, 32, 0))
			return -1;
	}
	packet->tuple = *to;
	return 0;
}

WAG_INLINE void wag_tuple_reverse(struct wag_tuple *out, const struct wag_tuple *in)
{
	out->src = in->dst;
	out->dst = in->src;
	out->sport = in->dport;
	out->dport = in->sport;
	out->proto = in->proto;
	__builtin_memset(out->pad, 0, sizeof(out->pad));
}

/* Does a socket of the node itself have the port that SNAT would use towards this backend? */
static __noinline int wag_port_is_local(struct __sk_buff *skb, const struct wag_tuple *to)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 size;

	if (!to)
		return 0;
	if (wag_addr_is4(&to->src)) {
		tuple.ipv4.saddr = to->dst.word[3];
		tuple.ipv4.daddr = to->src.word[3];
		tuple.ipv4.sport = to->dport;
		tuple.ipv4.dport = to->sport;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &to->dst, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &to->src, 16);
		tuple.ipv6.sport = to->dport;
		tuple.ipv6.dport = to->sport;
		size = sizeof(tuple.ipv6);
	}
	if (to->proto == IPPROTO_TCP)
		sk = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (to->proto == IPPROTO_UDP)
		sk = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		return 0;
	if (!sk)
		return 0;
	bpf_sk_release(sk);
	return 1;
}

/*
 * Writes the two entries of a new flow. `to` holds client (or node) → backend; its source port is changed when another
 * flow to the same backend has it already, which also keeps apart several Services in front of one backend.
 */
static __noinline int wag_nat_create(struct __sk_buff *skb, struct wag_packet *packet, struct wag_tuple *to,
				     __u32 revision)
{
	struct wag_nat entry = {}; /* first of the replies, then of the client's packets */
	struct wag_tuple key;
	struct wag_nat *other;
	__u32 span;
	bool snat;
	int i, error = -1;

	if (!packet || !to)
		return WAG_REASON_NAT_PORTS;
	wag_tuple_reverse(&entry.to, &packet->tuple);
	entry.seen_ns = bpf_ktime_get_ns();
	span = (__u32)wag_snat_max - wag_snat_min + 1;
	snat = !wag_addr_equal(&to->src, &packet->tuple.src);

	for (i = 0; i < WAG_NAT_TRIES; i++) {
		if (snat && wag_port_is_local(skb, to)) {
			to->sport = bpf_htons(wag_snat_min + bpf_get_prandom_u32() % span);
			continue;
		}
		wag_tuple_reverse(&key, to);
		error = bpf_map_update_elem(&wag_nat, &key, &entry, BPF_NOEXIST);
		if (!error)
			break;
		other = bpf_map_lookup_elem(&wag_nat, &key);
		if (!other) {
			/* full: an LRU that cannot evict; or a race with eviction, and the next turn settles it */
			continue;
		}
		if (wag_addr_equal(&other->to.src, &entry.to.src) && wag_addr_equal(&other->to.dst, &entry.to.dst) &&
		    other->to.sport == entry.to.sport && other->to.dport == entry.to.dport) {
			/* left over from the same flow */
			error = bpf_map_update_elem(&wag_nat, &key, &entry, BPF_ANY);
			break;
		}
		if (to->proto == IPPROTO_SCTP)
			return WAG_REASON_NAT_PORTS;
		to->sport = bpf_htons(wag_snat_min + bpf_get_prandom_u32() % span);
	}
	if (error)
		return i == WAG_NAT_TRIES ? WAG_REASON_NAT_PORTS : WAG_REASON_NAT_FULL;

	entry.to = *to;
	entry.revision = revision;
	entry.flags = WAG_NAT_FORWARD;
	if (bpf_map_update_elem(&wag_nat, &packet->tuple, &entry, BPF_ANY)) {
		bpf_map_delete_elem(&wag_nat, &key);
		return WAG_REASON_NAT_FULL;
	}
	return WAG_REASON_NONE;
}

/* May the flow go on to the backend it has? `service` is the frontend it came in by, as it is now. */
WAG_INLINE bool wag_nat_valid(struct wag_nat *nat, const struct wag_packet *packet, const struct wag_service *service)
{
	if (packet->tuple.proto == IPPROTO_TCP) {
		/* established flows keep their backend; the port may be used again after the flow has closed */
		bool syn = (packet->tcp_flags & (WAG_TCP_SYN | WAG_TCP_ACK)) == WAG_TCP_SYN;

		if (!syn)
			return true;
		if (nat->flags & WAG_NAT_CLOSING)
			return false;
	}
	if (nat->revision == service->revision)
		return true;
	if (!wag_backend_serves(service, &nat->to.dst, nat->to.dport))
		return false;
	nat->revision = service->revision;
	return true;
}

/* A function of its own, so that its key is not on the stack of everything else. */
static __noinline int wag_translation_record(struct wag_packet *packet, struct wag_tuple *to)
{
	struct wag_flow_key flow = {};

	if (!packet || !to)
		return 0;
	flow.src = packet->tuple.src;
	flow.frontend = packet->tuple.dst;
	flow.backend = to->dst;
	flow.fport = packet->tuple.dport;
	flow.bport = to->dport;
	flow.proto = to->proto;
	flow.hook = packet->hook;
	return wag_flow_record(&flow);
}

/*
 * Client → Service: finds or makes the flow's translation and applies it. The new source is the client, or this node
 * when `snat` says that replies would otherwise not come back here.
 */
static __noinline int wag_service_translate(struct __sk_buff *skb, struct wag_packet *packet,
					    struct wag_service *service, __u32 is_node_ingress)
{
	struct wag_endpoint *local, *client;
	struct wag_backend *backend;
	struct wag_tuple to = {};
	struct wag_nat *nat;
	int reason;

	if (!packet || !service)
		return WAG_REASON_STALE_BACKEND;
	nat = bpf_map_lookup_elem(&wag_nat, &packet->tuple);
	if (nat && (nat->flags & WAG_NAT_FORWARD) && wag_nat_valid(nat, packet, service)) {
		wag_nat_touch(nat, packet);
		to = nat->to;
		packet->translated = 1;
		return wag_rewrite(skb, packet, &to) ? WAG_REASON_REWRITE : WAG_REASON_NONE;
	}
	if (!service->count)
		return WAG_REASON_NO_BACKEND;
	backend = wag_backend_pick(service);
	if (!backend)
		return WAG_REASON_STALE_BACKEND;

	to = packet->tuple;
	to.dst = backend->addr;
	to.dport = backend->port;
	local = wag_endpoint_find(&backend->addr);
	client = wag_endpoint_find(&packet->tuple.src);
	/*
	 * Replies must come back through here: a remote backend would answer an outside client directly, and a pod that
	 * was sent to itself would not answer at all.
	 */
	if ((is_node_ingress && !local) || wag_addr_equal(&to.src, &to.dst)) {
		bool v4 = packet->eth_proto == bpf_htons(ETH_P_IP);
		__u64 low = v4 ? wag_node_ip4.half[1] : wag_node_ip6.half[1];
		__u64 high = v4 ? wag_node_ip4.half[0] : wag_node_ip6.half[0];

		if (!low && !high)
			return WAG_REASON_NO_NODE_IP;
		to.src.half[0] = high;
		to.src.half[1] = low;
		client = wag_endpoint_find(&to.src);
	}
	reason = wag_nat_create(skb, packet, &to, service->revision);
	if (reason)
		return reason;
	/* Both ends must look at wag_nat: the one that answers, and the one that the answers go to. */
	wag_endpoint_mark_nat(local);
	wag_endpoint_mark_nat(client);
	wag_count(WAG_COUNTER_PACKET_LB);
	if (wag_events)
		wag_translation_record(packet, &to);
	packet->translated = 1;
	return wag_rewrite(skb, packet, &to) ? WAG_REASON_REWRITE : WAG_REASON_NONE;
}

/*
 * A packet that is not for a Service, from or to an address with translated flows: applies the flow's translation if it
 * has one. If it has none, but its replies would be taken for those of a translated flow (the same ends met through a
 * Service and now meet directly, or a port of SNAT is now a port of the node's own), it gets a source port of its own.
 * Only the first packet can: an established flow is left as it is. Returns 1: translated, 0: untouched, -1: failed.
 */
static __noinline int wag_nat_pass(struct __sk_buff *skb, struct wag_packet *packet)
{
	struct wag_tuple to;
	struct wag_nat *nat;

	if (!packet || skb->mark == WAG_MARK)
		return 0;
	nat = bpf_map_lookup_elem(&wag_nat, &packet->tuple);
	if (nat) {
		wag_nat_touch(nat, packet);
		to = nat->to;
	} else {
		if (packet->tuple.proto == IPPROTO_TCP &&
		    (packet->tcp_flags & (WAG_TCP_SYN | WAG_TCP_ACK)) != WAG_TCP_SYN)
			return 0;
		wag_tuple_reverse(&to, &packet->tuple);
		nat = bpf_map_lookup_elem(&wag_nat, &to);
		if (!nat || (nat->flags & WAG_NAT_FORWARD))
			return 0;
		to = packet->tuple;
		if (wag_nat_create(skb, packet, &to, 0))
			return 0; /* no port: as good as before */
	}
	if (wag_rewrite(skb, packet, &to))
		return -1;
	packet->translated = 1;
	return 1;
}

#endif
