// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The two programs on an uplink. wag_node_ingress delivers to local pods, serves NodePorts (with SNAT when the backend
 * is elsewhere) and turns back replies. wag_node_egress turns back replies that the node's own processes give as
 * backends, and translates what they send to Services and no socket hook has seen. Both ask the node's policies about what
 * is its own.
 */
#define WAG_OWN
#include <linux/bpf.h>
#include "waggle/dsr.h"
#include "waggle/echo.h"
#include "waggle/forward.h"
#include "waggle/icmp.h"
#include "waggle/masquerade.h"
#include "waggle/nat.h"
#include "waggle/own.h"
#include "waggle/reject.h"
#include "waggle/translate.h"

/* No pod and no Service has it. */
WAG_INLINE enum wag_verdict wag_to_node(wag_ctx *ctx, struct wag_packet *packet, const struct wag_endpoint *to)
{
	return wag_is_own_end(&packet->tuple.dst, to) ? wag_own_admits(ctx, packet) : wag_beside_frontends(ctx, packet);
}

WAG_INLINE enum wag_verdict wag_from_wire(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_endpoint *to = wag_endpoint_find(&packet->tuple.dst);
	struct wag_service *service;
	enum wag_reason reason;
	int verdict;

	if (packet->is_icmp) {
		verdict = wag_icmp_pass(ctx, packet);
		if (verdict != WAG_NEXT)
			return verdict;
	}
	if (to && wag_is_tunnelled(packet)) {
		verdict = wag_tunnel_receive(ctx, packet);
		if (verdict != WAG_NEXT)
			return verdict;
	}
	if (to && to->nat_used && packet->has_flow && wag_nat_reply(packet)) {
		verdict = wag_nat_pass(ctx, packet);
		if (verdict != WAG_NEXT)
			return verdict;
	}
	if (wag_endpoint_is(to, WAG_ENDPOINT_POD)) {
		verdict = to->nat_used && packet->has_flow ? wag_nat_pass(ctx, packet) : WAG_NEXT;
		if (verdict != WAG_NEXT)
			return verdict;
		reason = wag_admits(ctx, packet, &packet->tuple, to);
		if (reason)
			return wag_drop(packet, reason);
		if (wag_is_left_to_conntrack(packet))
			return WAG_PASS;
		if (wag_comes_from_outside(packet))
			wag_masquerade_spare(ctx, packet, to);
		return wag_to_pod(ctx, packet, &packet->tuple, to);
	}
	if (!packet->has_ports)
		return wag_to_node(ctx, packet, to);
	service = wag_frontend_find(&packet->tuple.dst, packet->tuple.dport, packet->tuple.proto, to);
	if (service) {
		service = wag_service_external(service, &packet->tuple.dst, packet->tuple.dport, packet->tuple.proto);
		return wag_service_translate(ctx, packet, service);
	}
	/* the Service is gone, its established flows are not */
	verdict = (to ? to->nat_used : wag_is_established(packet)) ? wag_nat_pass(ctx, packet) : WAG_NEXT;
	if (verdict != WAG_NEXT)
		return verdict;
	return wag_to_node(ctx, packet, to);
}

SEC("tc")
int wag_node_ingress(struct __sk_buff *skb)
{
	struct wag_packet packet = {};
	enum wag_verdict verdict;

	/* seen only because the interface is promiscuous: another machine's to handle */
	if (skb->pkt_type == WAG_PACKET_OTHERHOST)
		return wag_finish(skb, &packet, WAG_PASS);
	/* what is malformed is for the stack to judge: only what is understood is taken from it */
	verdict = wag_parse(skb, &packet, WAG_HOOK_NODE_INGRESS) == WAG_PARSE_OK ? wag_from_wire(skb, &packet) : WAG_PASS;
	return verdict == WAG_REJECT ? wag_reject(skb, &packet) : wag_finish(skb, &packet, verdict);
}

/*
 * What a process of the node sends, and no socket hook has seen: SCTP, whose connect asks none, raw sockets, ping. Cluster
 * addresses alone are served here: to look for others, every packet of the node would pay. Ports of Services are among
 * those that look undefined: only then is there anything to look up.
 */
WAG_INLINE enum wag_verdict wag_unhooked(wag_ctx *ctx, struct wag_packet *packet)
{
	enum wag_verdict verdict = wag_beside_frontends(ctx, packet);
	struct wag_service *service;

	if (packet->reason != WAG_REASON_NO_PORT || !packet->has_ports)
		return verdict;
	service = wag_service_find(&packet->tuple.dst, packet->tuple.dport, packet->tuple.proto);
	if (!service)
		return verdict;
	packet->reason = WAG_REASON_NONE;
	return wag_service_translate(ctx, packet, service);
}

SEC("tc")
int wag_node_egress(struct __sk_buff *skb)
{
	struct wag_packet packet = {};
	struct wag_endpoint *from;
	enum wag_verdict verdict = WAG_NEXT;

	if (wag_parse(skb, &packet, WAG_HOOK_NODE_EGRESS) == WAG_PARSE_OK) {
		from = wag_endpoint_find(&packet.tuple.src);
		if (wag_endpoint_is(from, WAG_ENDPOINT_NODE)) {
			verdict = skb->mark == WAG_MARK ? WAG_NEXT : wag_unhooked(skb, &packet);
			if (verdict == WAG_NEXT && from->nat_used)
				verdict = wag_turn_back(skb, &packet);
			if (verdict == WAG_REJECT)
				return wag_reject(skb, &packet);
		}
		if (verdict == WAG_NEXT && !wag_is_marked(skb) && wag_is_own_end(&packet.tuple.src, from) &&
		    (!wag_addr_stays_on_link(&packet.tuple.dst) || wag_addr_is_link_local6(&packet.tuple.dst)))
			verdict = wag_own_admits(skb, &packet);
	}
	return wag_finish(skb, &packet, verdict);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
