// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The program on an uplink before the kernel makes anything of a packet. It sends on what belongs to backends on other
 * nodes, sends back what comes from them, and drops what is refused: with the same tables and the same code as
 * wag_node_ingress, which sees, untouched, everything that this program cannot finish: local backends, packets that get
 * an answer, errors, neighbours that are not known yet.
 */
#define WAG_XDP
#include <linux/bpf.h>
#include "waggle/forward.h"
#include "waggle/nat.h"
#include "waggle/translate.h"
#include "waggle/uplink.h"

/* Sent to this machine? In promiscuous mode there are others. */
WAG_INLINE bool wag_is_ours(wag_ctx *ctx)
{
	__u32 ifindex = ctx->ingress_ifindex;
	struct wag_uplink *uplink = bpf_map_lookup_elem(&wag_uplinks, &ifindex);
	__u64 mine = 0, asked = 0;

	if (!uplink || wag_load(ctx, 0, &asked, sizeof(uplink->mac)))
		return false;
	__builtin_memcpy(&mine, uplink->mac, sizeof(uplink->mac));
	return mine == asked;
}

WAG_INLINE enum wag_verdict wag_from_uplink(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_endpoint *to = wag_endpoint_find(&packet->tuple.dst);
	struct wag_service *service;

	if (!packet->has_flow || wag_endpoint_is(to, WAG_ENDPOINT_POD))
		return WAG_PASS;
	if (to && to->nat_used && wag_nat_reply(packet))
		return wag_is_ours(ctx) ? wag_nat_pass(ctx, packet) : WAG_PASS;
	if (!packet->has_ports)
		return WAG_PASS;
	service = wag_frontend_find(&packet->tuple.dst, packet->tuple.dport, packet->tuple.proto, to);
	if (!service || !wag_is_ours(ctx))
		return WAG_PASS;
	service = wag_service_external(service, &packet->tuple.dst, packet->tuple.dport, packet->tuple.proto);
	return wag_service_translate(ctx, packet, service);
}

SEC("xdp")
int wag_xdp_uplink(struct xdp_md *ctx)
{
	struct wag_packet packet = {};

	if (wag_parse(ctx, &packet, WAG_HOOK_XDP) != WAG_PARSE_OK)
		return XDP_PASS;
	switch (wag_from_uplink(ctx, &packet)) {
	case WAG_TO_WIRE:
		if (packet.out_ifindex == ctx->ingress_ifindex)
			return XDP_TX;
		return bpf_redirect(packet.out_ifindex, 0);
	case WAG_DROP:
		wag_report_drop(ctx, &packet, WAG_OUTCOME_DROPPED);
		return XDP_DROP;
	default:
		return XDP_PASS;
	}
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
