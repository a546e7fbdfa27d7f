// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The two programs on an uplink. wag_node_ingress delivers to local pods, serves NodePorts (with SNAT when the backend
 * is elsewhere) and turns back replies. wag_node_egress turns back replies that the node's own processes give as
 * backends.
 */
#include <linux/bpf.h>
#include "waggle/forward.h"
#include "waggle/nat.h"

WAG_INLINE enum wag_verdict wag_from_wire(struct __sk_buff *skb, struct wag_packet *packet)
{
	struct wag_endpoint *to = wag_endpoint_find(&packet->tuple.dst);
	struct wag_service *service;
	int result;

	if (to && to->nat_used && packet->has_ports) {
		struct wag_nat *nat = bpf_map_lookup_elem(&wag_nat, &packet->tuple);

		if (nat && !(nat->flags & WAG_NAT_FORWARD)) {
			if (wag_nat_pass(skb, packet) < 0)
				return wag_drop(packet, WAG_REASON_REWRITE);
			return wag_deliver(skb, packet);
		}
	}
	if (wag_endpoint_is(to, WAG_ENDPOINT_POD)) {
		if (to->nat_used && packet->has_ports && wag_nat_pass(skb, packet) < 0)
			return wag_drop(packet, WAG_REASON_REWRITE);
		return wag_to_pod(skb, packet, to);
	}
	if (!packet->has_ports)
		return WAG_PASS;
	if (to)
		service = wag_service_find_nodeport(&packet->tuple.dst, packet->tuple.dport, packet->tuple.proto);
	else
		service = wag_service_find(&packet->tuple.dst, packet->tuple.dport, packet->tuple.proto);
	if (!service) {
		/* the Service is gone, its established flows are not */
		if (to && to->nat_used && wag_nat_pass(skb, packet) > 0)
			return wag_deliver(skb, packet);
		return WAG_PASS;
	}
	result = wag_service_translate(skb, packet, service, 1);
	if (result)
		return wag_drop(packet, result);
	return wag_deliver(skb, packet);
}

SEC("tc")
int wag_node_ingress(struct __sk_buff *skb)
{
	struct wag_packet packet;
	enum wag_verdict verdict;

	switch (wag_parse(skb, &packet, WAG_HOOK_NODE_INGRESS)) {
	case WAG_PARSE_OK:
		verdict = wag_from_wire(skb, &packet);
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
int wag_node_egress(struct __sk_buff *skb)
{
	struct wag_packet packet;
	struct wag_endpoint *from;
	enum wag_verdict verdict = WAG_PASS;

	if (wag_parse(skb, &packet, WAG_HOOK_NODE_EGRESS) == WAG_PARSE_OK && packet.has_ports) {
		from = wag_endpoint_find(&packet.tuple.src);
		if (wag_endpoint_is(from, WAG_ENDPOINT_NODE) && from->nat_used && wag_nat_pass(skb, &packet) < 0)
			verdict = wag_drop(&packet, WAG_REASON_REWRITE);
	}
	return wag_finish(skb, &packet, verdict);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
