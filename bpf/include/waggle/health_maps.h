/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The tables that waggle-health answers from. No program reads them. */
#ifndef WAGGLE_HEALTH_MAPS_H
#define WAGGLE_HEALTH_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "health.h"

/*
 * Key: health port of a Service and family. The agent writes, waggle-health reads. The range of node ports has 2,768 by
 * default, in two families.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_health_key);
	__type(value, struct wag_health);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_health SEC(".maps");

/*
 * Key: 0. The agent writes, waggle-health reads: the time (CLOCK_MONOTONIC, nanoseconds) from which on a change has waited
 * too long to be in the tables; 0 while none waits.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} wag_overdue SEC(".maps");

#endif
