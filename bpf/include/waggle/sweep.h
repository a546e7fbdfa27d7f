/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The end of flows: how long they live, and what the sweep over wag_nat found. */
#ifndef WAGGLE_SWEEP_H
#define WAGGLE_SWEEP_H

#include <linux/bpf.h>
#include "config.h"
#include "nat_table.h"
#include "service.h"

#define WAG_OPENING_SECONDS 60     /* TCP and SCTP until the first answer */
#define WAG_CLOSED_SECONDS 10      /* after a FIN in either direction, or a RST */
#define WAG_HALF_CLOSED 6          /* after a FIN in one direction: this part of what an open connection has */
#define WAG_ORPHAN_SECONDS 120     /* replies whose flow has something else by now */
#define WAG_UDP_OPENING_SECONDS 30 /* until the first answer */
#define WAG_ICMP_SECONDS 30

/* linux/bpf.h has it since v6.10 */
struct bpf_wq {
	__u64 opaque[2];
} __attribute__((aligned(8)));

struct wag_sweep {
	struct bpf_timer timer;
	struct bpf_wq work;
	__u64 sweeps;
	__u64 expired;   /* entries taken out so far; a flow has two */
	__u64 took_ns;   /* the last sweep */
	__u32 entries;   /* that the last sweep left */
	__u32 confirmed; /* flows among them that are confirmed */
};

/* Key 0. Programs write, the agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_sweep);
	__uint(max_entries, 1);
} wag_sweeps SEC(".maps");

/* One sweep. */
struct wag_sweeping {
	__u64 now;
	__u32 entries;
	__u32 expired;
	__u32 confirmed;
};

#endif
