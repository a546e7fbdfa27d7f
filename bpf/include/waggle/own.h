/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The node's own traffic: to and from its addresses by its uplinks, without what belongs to a Service or a pod, and without
 * multicast. It is judged as that of pods is, by NodePolicies; a node without any pays for one look at wag_node_policy.
 */
#ifndef WAGGLE_OWN_H
#define WAGGLE_OWN_H

#include <linux/bpf.h>
#include <linux/in.h>
#include "direct.h"
#include "endpoint.h"
#include "icmp.h"
#include "packet.h"
#include "policy.h"

/* An address of the node's, of this packet: nothing but the node has link-local ones by its uplinks. */
WAG_INLINE bool wag_is_own_end(const struct wag_addr *addr, const struct wag_endpoint *endpoint)
{
	return wag_endpoint_is(endpoint, WAG_ENDPOINT_NODE) || wag_addr_is_link_local6(addr);
}

/* The node asks for its address, or is told. By these its policies would end the node's being anywhere. */
WAG_INLINE bool wag_is_dhcp(const struct wag_packet *packet)
{
	bool sent = packet->hook == WAG_HOOK_NODE_EGRESS;
	__u16 ours = bpf_ntohs(sent ? packet->tuple.sport : packet->tuple.dport);
	__u16 theirs = bpf_ntohs(sent ? packet->tuple.dport : packet->tuple.sport);

	return packet->tuple.proto == IPPROTO_UDP && packet->has_ports &&
	       ((ours == 68 && theirs == 67) || (ours == 546 && theirs == 547));
}

/* Errors say something about a flow, and the stack looks whether there is one. */
WAG_INLINE bool wag_is_complaint(wag_ctx *ctx, const struct wag_packet *packet)
{
	__u8 type;

	return packet->is_icmp && !packet->later_fragment && !wag_load(ctx, packet->l4_off, &type, 1) &&
	       wag_icmp_is_error(packet, type);
}

/* Is it in the middle of a connection that a socket of the node has? */
WAG_INLINE bool wag_is_connected(wag_ctx *ctx, struct wag_packet *packet, struct wag_policy_work *work)
{
	if (packet->tuple.proto != IPPROTO_TCP || !packet->has_ports || !wag_is_established(packet))
		return false;
	if (packet->hook == WAG_HOOK_NODE_INGRESS)
		return wag_socket_takes(ctx, &packet->tuple, WAG_NETNS_ID_NODE, 1);
	wag_tuple_reverse(&work->back, &packet->tuple);
	return wag_socket_takes(ctx, &work->back, WAG_NETNS_ID_NODE, 1);
}

/* As wag_policy_admit, for wag_own_admits alone. A global function, as wag_parse is. */
__noinline int wag_own_admit(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_policy_work *work = wag_policy_work_get();
	int reason;
	__u32 end;

	if (!packet || !work)
		return WAG_REASON_NONE;
	work->flow = packet->tuple;
	end = wag_conn_key(&work->key, &work->flow);
	packet->audit = 0;
	work->now = bpf_ktime_get_coarse_ns();
	reason = wag_policy_go_on(ctx, packet, work, end);
	if (!reason)
		wag_policy_audits(packet);
	/* what was there when the trial began goes on until it is confirmed: no socket that it keeps from connecting is connected */
	if (reason && packet->trial && wag_is_connected(ctx, packet, work))
		return WAG_REASON_NONE;
	return reason;
}

/* May the packet, which is the node's own, pass? */
WAG_INLINE enum wag_verdict wag_own_admits(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_node_policy *own = wag_node_policy_find();
	bool tried;
	int reason;

	if (!own || !(own->ingress | own->egress | own->trial_until_ns))
		return WAG_PASS;
	tried = wag_node_policy_tried(own);
	if (tried ? !(own->trial_ingress | own->trial_egress) : !(own->ingress | own->egress))
		return WAG_PASS;
	if (wag_is_left_to_conntrack(packet) || wag_is_dhcp(packet) || wag_is_complaint(ctx, packet))
		return WAG_PASS;
	packet->own = 1;
	packet->trial = tried;
	reason = wag_own_admit(ctx, packet);
	return reason ? wag_drop(packet, reason) : WAG_PASS;
}

#endif
