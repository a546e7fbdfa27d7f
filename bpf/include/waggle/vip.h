/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What is at an address of a Service besides its ports: asked when no frontend was found, so that traffic of Services does
 * not pay for it. A port that no Service defines is refused, an address of a Service range that no Service has is
 * nobody's, and an echo request is answered here: no machine has the address (semantics.md section 3).
 *
 * Traffic that has nothing to do with Services comes by here with every packet. It pays for comparing its address with
 * the few ranges; only what is in one of them is looked up.
 */
#ifndef WAGGLE_VIP_H
#define WAGGLE_VIP_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <stddef.h>
#include "addr.h"
#include "verdict.h"

enum wag_vip_flag {
	WAG_VIP_CLUSTER_IP = 1, /* of the cluster alone: whatever no Service defines there is refused */
};

/* Key: address of a Service. The agent writes. Value: enum wag_vip_flag. One entry per address. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_addr);
	__type(value, __u32);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_vips SEC(".maps");

#define WAG_SERVICE_RANGES 8

enum wag_service_range_flag {
	WAG_SERVICE_RANGE_USED = 1,
	WAG_SERVICE_RANGE_STRAYS = 2, /* in entry 0: some cluster address lies in none of the ranges */
};

struct wag_service_range {
	struct wag_addr network;
	struct wag_addr mask;
	__u32 flags; /* enum wag_service_range_flag */
	__u32 pad;
};

/* Key: index; what is used comes first. The agent writes. The ranges that cluster addresses come from. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_service_range);
	__uint(max_entries, WAG_SERVICE_RANGES);
} wag_svc_ranges SEC(".maps");

WAG_INLINE bool wag_range_holds(const struct wag_service_range *range, const struct wag_addr *addr)
{
	return (addr->half[0] & range->mask.half[0]) == range->network.half[0] &&
	       (addr->half[1] & range->mask.half[1]) == range->network.half[1];
}

WAG_INLINE __u32 *wag_vip_find(const struct wag_addr *addr)
{
	return bpf_map_lookup_elem(&wag_vips, addr);
}

/*
 * Why nothing is to be reached at `addr`, where no frontend is. WAG_REASON_NONE: the address is no Service's, or may be
 * somebody's besides (external and load balancer addresses may be a machine's own). A global function, as wag_parse is.
 */
__noinline int wag_vip_refusal(const struct wag_addr *addr)
{
	struct wag_service_range *range;
	bool inside = false, strays = false;
	__u32 *flags;
	__u32 i;

	if (!addr)
		return WAG_REASON_NONE;
	for (i = 0; i < WAG_SERVICE_RANGES && !inside; i++) {
		__u32 index = i;

		range = bpf_map_lookup_elem(&wag_svc_ranges, &index);
		if (!range)
			break;
		strays |= range->flags & WAG_SERVICE_RANGE_STRAYS;
		if (!(range->flags & WAG_SERVICE_RANGE_USED))
			break;
		inside = wag_range_holds(range, addr);
	}
	if (!inside && !strays)
		return WAG_REASON_NONE;
	flags = wag_vip_find(addr);
	if (flags && (*flags & WAG_VIP_CLUSTER_IP))
		return WAG_REASON_NO_PORT;
	return inside ? WAG_REASON_FREE_ADDRESS : WAG_REASON_NONE;
}

#endif
