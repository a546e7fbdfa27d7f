/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The interfaces that XDP runs on. */
#ifndef WAGGLE_UPLINK_H
#define WAGGLE_UPLINK_H

#include <linux/bpf.h>
#include "addr.h"

struct wag_uplink {
	__u8 mac[6];
	__u8 pad[2];
};

/* Key: ifindex. The agent writes. What XDP may send to: interfaces that run it too, whose drivers can. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct wag_uplink);
	__uint(max_entries, 64);
} wag_uplinks SEC(".maps");

#endif
