/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What policies say, as it is looked up: classes of peers, and what sets of policies say of them (docs/decisions/0012). */
#ifndef WAGGLE_POLICY_TABLES_H
#define WAGGLE_POLICY_TABLES_H

#include <linux/bpf.h>
#include <linux/in.h>
#include "addr.h"

/* Sets that stand for something else than policies. */
#define WAG_POLICY_NONE 0ULL      /* no policy selects the pod: everything passes */
#define WAG_POLICY_PENDING (~0ULL) /* nobody has said yet which do: nothing passes, but to and from this node */
#define WAG_POLICY_NAMED 1ULL     /* a bit of other sets: there are rules about domain names */

#define WAG_CLASS_UNKNOWN 0ULL /* nothing that a policy asks for tells the address apart */
#define WAG_CLASS_SELF 1ULL    /* this node */
#define WAG_CLASS_ANY (~0ULL)  /* of a set: every class that has no entry */

enum wag_policy_flag {
	WAG_POLICY_ALLOW = 1,
	WAG_POLICY_AUDIT = 2, /* allowed; it would not be, were the audited policies enforced */
	WAG_POLICY_LOST = 8,  /* in no step: the tables know nothing of the set */
};

struct wag_class_range_key {
	__u32 prefix; /* bits that count: 96 + 24 for a.b.c.0/24 */
	__u8 addr[16];
};

struct wag_policy_key {
	__u64 set;
	__u64 peer; /* its class */
};

/* A run of wag_policy_steps. */
struct wag_policy_run {
	__u32 first;
	__u32 count;
};

/* From `start` up to the start of the next one. */
struct wag_policy_step {
	__u32 start; /* enum wag_policy_protocol << 16 | port */
	__u32 rule;  /* who says so; 0: no rule does */
	__u8 verdict; /* enum wag_policy_flag */
	__u8 pad[3];
	/*
	 * Of a set with domain names: where in the order of its rules each tier ended; of a name: where the first rule
	 * stands that accepts it. The name decides where it stands before the end.
	 */
	__u16 admin;
	__u16 baseline;
};

enum wag_policy_protocol {
	WAG_POLICY_OTHER = 0, /* without ports */
	WAG_POLICY_TCP = 1,
	WAG_POLICY_UDP = 2,
	WAG_POLICY_SCTP = 3,
};

struct wag_policy_state {
	__u32 revision; /* raised when anything has changed: known flows are judged again */
	__u32 keep;     /* 1: known flows are not */
};

/* Key: address of a peer. The agent writes. Peers whose class differs from that of their range. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_addr);
	__type(value, __u64);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_classes SEC(".maps");

/* Key: network. The agent writes. Every network that a policy names. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct wag_class_range_key);
	__type(value, __u64);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_class_ranges SEC(".maps");

/* Key: set of policies and class of the peer. The agent writes. What WAG_CLASS_ANY says is not repeated. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_policy_key);
	__type(value, struct wag_policy_run);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_policy SEC(".maps");

/* Key: index. The agent writes. Equal runs are there once. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_policy_step);
	__uint(max_entries, 131072);
} wag_policy_steps SEC(".maps");

/* Key 0. The agent writes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_policy_state);
	__uint(max_entries, 1);
} wag_policy_state SEC(".maps");

/* Where in a run of steps the port is. */
WAG_INLINE __u32 wag_policy_place(__u8 proto, __be16 port)
{
	switch (proto) {
	case IPPROTO_TCP:
		return WAG_POLICY_TCP << 16 | bpf_ntohs(port);
	case IPPROTO_UDP:
		return WAG_POLICY_UDP << 16 | bpf_ntohs(port);
	case IPPROTO_SCTP:
		return WAG_POLICY_SCTP << 16 | bpf_ntohs(port);
	default:
		return WAG_POLICY_OTHER << 16;
	}
}

/* `self`: the address is this node's; it may have a class of its own all the same, where policies tell nodes apart. */
static __noinline __u64 wag_class_of(const struct wag_addr *addr, int self)
{
	struct wag_class_range_key key = { .prefix = 128 };
	__u64 *found;

	if (!addr)
		return WAG_CLASS_UNKNOWN;
	found = bpf_map_lookup_elem(&wag_classes, addr);
	if (found)
		return *found;
	if (self)
		return WAG_CLASS_SELF;
	__builtin_memcpy(key.addr, addr, sizeof(key.addr));
	found = bpf_map_lookup_elem(&wag_class_ranges, &key);
	return found ? *found : WAG_CLASS_UNKNOWN;
}

#define WAG_POLICY_HALVINGS 17 /* as many as the array could need */

/* The last step of the run that starts at `place` or before; NULL where the tables are broken. */
WAG_INLINE struct wag_policy_step *wag_policy_find(const struct wag_policy_run *run, __u32 place)
{
	__u32 low = run->first, high = run->first + run->count - 1;
	struct wag_policy_step *step;
	int i;

	for (i = 0; i < WAG_POLICY_HALVINGS && low < high; i++) {
		__u32 middle = low + (high - low + 1) / 2;

		step = bpf_map_lookup_elem(&wag_policy_steps, &middle);
		if (!step)
			return NULL;
		if (step->start <= place)
			low = middle;
		else
			high = middle - 1;
	}
	return bpf_map_lookup_elem(&wag_policy_steps, &low);
}

#endif
