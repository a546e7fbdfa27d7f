// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The two programs on a pod's host-side interface. wag_pod_egress sees what the pod sends: it load-balances what the
 * socket did not translate, turns replies of translated flows back, and delivers. wag_pod_ingress sees what the host
 * stack sends to the pod and only has replies to turn back.
 */
#include <linux/bpf.h>
#include "waggle/forward.h"
#include "waggle/nat.h"

/* Replies first, since a reply's destination may look like a NodePort; then Services. */
WAG_INLINE enum wag_verdict wag_from_pod(struct __sk_buff *skb, struct wag_packet *packet)
{
	struct wag_endpoint *to = wag_endpoint_find(&packet->tuple.dst);
	struct wag_service *service;
	struct wag_endpoint *from;
	int result;

	if (wag_endpoint_is(to, WAG_ENDPOINT_POD)) {
		if (!to->nat_used || !packet->has_ports)
			return wag_to_pod(skb, packet, to);
		result = wag_nat_pass(skb, packet);
		if (result < 0)
			return wag_drop(packet, WAG_REASON_REWRITE);
		return wag_deliver(skb, packet);
	}
	if (!packet->has_ports) {
		if (packet->later_fragment && wag_service_has_protocol(packet->tuple.proto) && !to)
			return wag_to_wire(skb, packet);
		return to ? WAG_PASS : wag_to_wire(skb, packet);
	}
	from = wag_endpoint_find(&packet->tuple.src);
	if ((to && to->nat_used) || (from && from->nat_used)) {
		struct wag_nat *nat = bpf_map_lookup_elem(&wag_nat, &packet->tuple);

		if (nat && !(nat->flags & WAG_NAT_FORWARD)) {
			if (wag_nat_pass(skb, packet) < 0)
				return wag_drop(packet, WAG_REASON_REWRITE);
			return wag_deliver(skb, packet);
		}
	}
	if (to)
		service = wag_service_find_nodeport(&packet->tuple.dst, packet->tuple.dport, packet->tuple.proto);
	else
		service = wag_service_find(&packet->tuple.dst, packet->tuple.dport, packet->tuple.proto);
	if (service) {
		result = wag_service_translate(skb, packet, service, 0);
		if (result)
			return wag_drop(packet, result);
		return wag_deliver(skb, packet);
	}
	if (from && from->nat_used) {
		/* the Service is gone, its established flows are not */
		if (wag_nat_pass(skb, packet) < 0)
			return wag_drop(packet, WAG_REASON_REWRITE);
		return wag_deliver(skb, packet);
	}
	return to ? WAG_PASS : wag_to_wire(skb, packet);
}

SEC("tc")
int wag_pod_egress(struct __sk_buff *skb)
{
	struct wag_packet packet;
	enum wag_verdict verdict;

	switch (wag_parse(skb, &packet, WAG_HOOK_POD_EGRESS)) {
	case WAG_PARSE_OK:
		verdict = wag_from_pod(skb, &packet);
		break;
	case WAG_PARSE_BAD:
		verdict = wag_drop(&packet, WAG_REASON_MALFORMED);
		break;
	default:
		verdict = WAG_PASS;
	}
	return wag_finish(skb, &packet, verdict);
}

SEC("tc")
int wag_pod_ingress(struct __sk_buff *skb)
{
	struct wag_packet packet;
	struct wag_endpoint *to;
	enum wag_verdict verdict = WAG_PASS;

	switch (wag_parse(skb, &packet, WAG_HOOK_POD_INGRESS)) {
	case WAG_PARSE_OK:
		to = wag_endpoint_find(&packet.tuple.dst);
		if (to && to->nat_used && packet.has_ports && wag_nat_pass(skb, &packet) < 0)
			verdict = wag_drop(&packet, WAG_REASON_REWRITE);
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
