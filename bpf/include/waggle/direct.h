/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Flows that are not translated, and so have no entry anywhere: the sockets at their ends tell of them. Asked for when a
 * translated flow looks for a source port.
 */
#ifndef WAGGLE_DIRECT_H
#define WAGGLE_DIRECT_H

#include <linux/bpf.h>
#include <linux/in.h>
#include "access.h"
#include "endpoint.h"
#include "packet.h"

/*
 * Is there a socket in the namespace that would take a packet with this tuple? `connected`: only one that is connected to
 * its sender counts, and none that would take a packet from anybody.
 */
static __noinline int wag_socket_takes(wag_ctx *ctx, const struct wag_tuple *packet, int netns, int connected)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__be16 peer;
	__u32 size;

	if (!packet || netns < WAG_NETNS_ID_NODE)
		return 0;
	if (wag_addr_is4(&packet->src)) {
		tuple.ipv4.saddr = packet->src.word[3];
		tuple.ipv4.daddr = packet->dst.word[3];
		tuple.ipv4.sport = packet->sport;
		tuple.ipv4.dport = packet->dport;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &packet->src, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &packet->dst, 16);
		tuple.ipv6.sport = packet->sport;
		tuple.ipv6.dport = packet->dport;
		size = sizeof(tuple.ipv6);
	}
	/* one instruction may not read both kinds of socket: the barriers keep the compiler from joining the branches */
	if (packet->proto == IPPROTO_TCP) {
		sk = bpf_skc_lookup_tcp(ctx, &tuple, size, (__s64)netns, 0);
		if (!sk)
			return 0;
		peer = sk->dst_port;
		barrier_var(peer);
	} else if (packet->proto == IPPROTO_UDP) {
		sk = bpf_sk_lookup_udp(ctx, &tuple, size, (__s64)netns, 0);
		if (!sk)
			return 0;
		peer = sk->dst_port;
	} else {
		return 0;
	}
	bpf_sk_release(sk);
	return !connected || peer == packet->sport;
}

/*
 * Would the answers to `to`, which are turned back, be missing from a flow that is not translated? Such flows have no
 * entry: their sockets are asked, those of the client's namespace and, for a connection that begins (`first`), those of
 * the backend's. Of the node itself every socket with that port counts, whoever it talks to.
 */
WAG_INLINE bool wag_flow_is_direct(wag_ctx *ctx, struct wag_tuple *to, struct wag_tuple *answer, bool first)
{
	struct wag_endpoint *end;

	end = wag_endpoint_find(&to->src);
	if (end && wag_socket_takes(ctx, answer, end->netns, !(end->flags & WAG_ENDPOINT_NODE)))
		return true;
	if (!first)
		return false;
	end = wag_endpoint_find(&to->dst);
	return end && wag_socket_takes(ctx, to, end->netns, 1);
}

#endif
