// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The two programs on a pod's host-side interface. wag_pod_egress sees what the pod sends: it load-balances what the
 * socket did not translate, turns replies of translated flows back, masquerades, and delivers. wag_pod_ingress sees what the host
 * stack sends to the pod and only has replies to turn back.
 */
#include <linux/bpf.h>
#include "waggle/echo.h"
#include "waggle/forward.h"
#include "waggle/gateway.h"
#include "waggle/icmp.h"
#include "waggle/masquerade.h"
#include "waggle/nat.h"
#include "waggle/policy.h"
#include "waggle/reject.h"
#include "waggle/translate.h"

/*
 * No frontend takes the packet, and no local pod: it is the node's own; or for a Service's address all the same; or it
 * leaves, masqueraded where it leaves the cluster.
 */
WAG_INLINE enum wag_verdict wag_beyond_services(wag_ctx *ctx, struct wag_packet *packet, const struct wag_endpoint *to)
{
	enum wag_reason reason;
	int verdict;

	verdict = to ? WAG_NEXT : wag_beside_frontends(ctx, packet);
	if (verdict != WAG_NEXT)
		return verdict;
	reason = wag_admits(ctx, packet, &packet->tuple, to);
	if (reason)
		return wag_drop(packet, reason);
	if (to)
		return WAG_PASS;
	if (packet->has_flow && wag_leaves_cluster(packet))
		return wag_masquerade_begin(ctx, packet);
	return wag_to_wire(ctx, packet, &packet->tuple, 0);
}

WAG_INLINE bool wag_mac_equal(const void *a, const void *b)
{
	const __u16 *x = a, *y = b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2];
}

/*
 * Is it what this pod may send: from its address and its interface? Where another link-local address is used, nothing is
 * forwarded; the stack may have a use for it.
 */
WAG_INLINE bool wag_is_own(wag_ctx *ctx, const struct wag_endpoint *from)
{
	void *data = (void *)(long)ctx->data;
	struct ethhdr *eth = data;

	if (!wag_endpoint_is(from, WAG_ENDPOINT_POD) || from->ifindex != ctx->ifindex)
		return false;
	return data + sizeof(*eth) <= (void *)(long)ctx->data_end && wag_mac_equal(eth->h_source, from->pod_mac);
}

WAG_INLINE enum wag_verdict wag_stranger(struct wag_packet *packet)
{
	const struct wag_addr *src = &packet->tuple.src;

	if (wag_addr_stays_on_link(&packet->tuple.dst) && (wag_addr_is_any(src) || wag_addr_stays_on_link(src)))
		return WAG_PASS;
	return wag_drop(packet, WAG_REASON_SPOOFED);
}

/* Replies first, since a reply's destination may look like a NodePort; then Services; then what leaves the cluster. */
WAG_INLINE enum wag_verdict wag_from_pod(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_endpoint *to = wag_endpoint_find(&packet->tuple.dst);
	struct wag_endpoint *from = wag_endpoint_find(&packet->tuple.src);
	struct wag_service *service;
	enum wag_reason reason;
	int verdict;

	if (!wag_is_own(ctx, from))
		return wag_stranger(packet);
	wag_policy_sender(packet, from);
	if (packet->is_icmp) {
		verdict = wag_icmp_pass(ctx, packet);
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
		return wag_is_left_to_conntrack(packet) ? WAG_PASS : wag_to_pod(ctx, packet, &packet->tuple, to);
	}
	if (!packet->has_flow)
		return wag_beyond_services(ctx, packet, to);
	if (((to && to->nat_used) || from->nat_used) && wag_nat_reply(packet)) {
		verdict = wag_nat_pass(ctx, packet);
		if (verdict != WAG_NEXT)
			return verdict;
	}
	service = packet->has_ports
			  ? wag_frontend_find(&packet->tuple.dst, packet->tuple.dport, packet->tuple.proto, to)
			  : NULL;
	if (service)
		return wag_service_translate(ctx, packet, service);
	if (from->nat_used) {
		/* a flow that has left the cluster; or its Service is gone, but not the flow */
		verdict = wag_nat_pass(ctx, packet);
		if (verdict != WAG_NEXT)
			return verdict;
	}
	if (wag_beside_proxy && wag_is_established(packet)) { /* an answer by a way that conntrack knows */
		reason = wag_admits(ctx, packet, &packet->tuple, to);
		return reason ? wag_drop(packet, reason) : WAG_PASS;
	}
	return wag_beyond_services(ctx, packet, to);
}

SEC("tc")
int wag_pod_egress(struct __sk_buff *skb)
{
	struct wag_packet packet = {};
	enum wag_verdict verdict;

	switch (wag_parse(skb, &packet, WAG_HOOK_POD_EGRESS)) {
	case WAG_PARSE_OK:
		verdict = wag_from_pod(skb, &packet);
		break;
	case WAG_PARSE_BAD:
		verdict = wag_drop(&packet, WAG_REASON_MALFORMED);
		break;
	default:
		verdict = wag_gateway_answers(skb, &packet) ? WAG_SEND_BACK : WAG_PASS;
	}
	return verdict == WAG_REJECT ? wag_reject(skb, &packet) : wag_finish(skb, &packet, verdict);
}

/* What has a mark was translated, and judged, by another program. */
WAG_INLINE enum wag_verdict wag_from_stack(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_endpoint *to = wag_endpoint_find(&packet->tuple.dst);
	enum wag_reason reason;
	int verdict = WAG_NEXT;

	if (!to)
		return WAG_PASS;
	if (to->nat_used)
		verdict = wag_turn_back(ctx, packet);
	else if (packet->is_icmp && wag_is_isolated(to))
		verdict = wag_icmp_pass(ctx, packet);
	if (verdict != WAG_NEXT)
		return verdict;
	if (wag_is_marked(ctx) || !wag_is_isolated(to))
		return WAG_PASS;
	reason = wag_admits(ctx, packet, &packet->tuple, to);
	return reason ? wag_drop(packet, reason) : WAG_PASS;
}

SEC("tc")
int wag_pod_ingress(struct __sk_buff *skb)
{
	struct wag_packet packet = {};
	enum wag_verdict verdict = WAG_PASS;

	switch (wag_parse(skb, &packet, WAG_HOOK_POD_INGRESS)) {
	case WAG_PARSE_OK:
		verdict = wag_from_stack(skb, &packet);
		break;
	case WAG_PARSE_BAD:
		verdict = wag_drop(&packet, WAG_REASON_MALFORMED);
		break;
	default:
		break;
	}
	return wag_finish(skb, &packet, verdict);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
