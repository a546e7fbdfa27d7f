/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* loadBalancerSourceRanges: which clients may use a frontend. */
#ifndef WAGGLE_RANGES_H
#define WAGGLE_RANGES_H

#include <linux/bpf.h>
#include "service.h"

/* Longest prefix match over `ranges` of struct wag_service and the client's address: 64 + 96 + 24 bits for a.b.c.0/24. */
struct wag_range_key {
	__u32 prefix; /* bits that count */
	__u8 ranges[8];
	__u8 addr[16];
};

/* Key: list of source ranges and network. The agent writes. One entry per range of every distinct list. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct wag_range_key);
	__type(value, __u32);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_source_ranges SEC(".maps");

#define WAG_RANGES_NODES (~0ULL) /* the list of all nodes' addresses: who may send packets inside others (dsr.h) */

/* Is the address in one of the ranges of a list? */
static __noinline int wag_ranges_hold(__u64 ranges, const struct wag_addr *addr)
{
	struct wag_range_key key = { .prefix = 64 + 128 };

	if (!addr)
		return 0;
	__builtin_memcpy(key.ranges, &ranges, sizeof(key.ranges));
	__builtin_memcpy(key.addr, addr, sizeof(key.addr));
	return bpf_map_lookup_elem(&wag_source_ranges, &key) != NULL;
}

/* May this client use the frontend? */
WAG_INLINE bool wag_service_admits(struct wag_service *service, const struct wag_addr *client)
{
	return !service->ranges || wag_ranges_hold(service->ranges, client);
}

#endif
