/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Maglev tables (Eisenbud et al., NSDI 2016, section 3.4): a slot for every value of a hash, each with a backend. Nodes
 * with the same backends have the same table, so that a flow has the same backend whichever node it comes to; when a
 * backend goes, few flows of the others move. Weights give a backend more slots.
 */
#ifndef WAGGLE_MAGLEV_H
#define WAGGLE_MAGLEV_H

#include <linux/bpf.h>
#include "addr.h"

#define WAG_MAGLEV_SLOTS 4093 /* a prime */
#define WAG_MAGLEV_EMPTY 0xffff

struct wag_maglev {
	__u16 slot[WAG_MAGLEV_SLOTS + 3]; /* a backend's index in its Service's extent */
};

/* The slot of a number, in a way that the verifier follows: it knows nothing of remainders. */
WAG_INLINE __u32 wag_maglev_slot(__u64 number)
{
	__u32 slot = number % WAG_MAGLEV_SLOTS;

	barrier_var(slot);
	return slot & 4095;
}

/* Key: `maglev` of struct wag_service. The agent makes entries, a program fills them. One per distinct set of backends. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct wag_maglev);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_maglev SEC(".maps");

/* A backend while the table is filled. */
struct wag_maglev_backend {
	__u32 start; /* the first slot that it wants, */
	__u32 step;  /* and how far apart the others are: both from its address, the same on every node */
	__u32 weight;
	__u32 credit; /* turns come when it reaches the greatest weight */
	__u32 next;   /* how many slots it has tried */
	__u32 pad;
};

/* What wag_maglev_fill is called with. */
struct wag_maglev_request {
	__u32 id; /* key in wag_maglev */
	__u32 count;
	__u32 greatest; /* weight */
};

#endif
