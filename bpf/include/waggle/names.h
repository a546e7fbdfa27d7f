/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Domain names in policies: which addresses a pod's own DNS answers gave for names that its policies accept. Learned by
 * the programs that deliver the answers (learn.h), asked by those that judge (judge.h).
 */
#ifndef WAGGLE_NAMES_H
#define WAGGLE_NAMES_H

#include <linux/bpf.h>
#include "addr.h"
#include "config.h"

#define WAG_DNS_PORT 53
#define WAG_NAME_MAX 256 /* ".www.example.com", and a byte more */
#define WAG_NAME_SHOWN 64
#define WAG_NAME_SLOTS 16
#define WAG_NAME_CLASS (0x6e616d65ULL << 32) /* of a set, with the id of a pattern: what having such a name adds */
#define WAG_NAME_STRICT (1ULL << 63)         /* besides: with the audited policies enforced */
#define WAG_NAME_LEAST_SECONDS 30            /* a client may use an answer a little longer than it should */
#define WAG_NAME_MOST_SECONDS 86400

/* *.example.com as ".moc.elpmaxe" turned round: "moc.elpmaxe."; an exact name the same way. Zeros behind. */
struct wag_pattern_key {
	__u8 exact; /* 1: the whole name; 0: the end of it, behind one label or more */
	__u8 text[WAG_NAME_MAX - 1];
};

struct wag_name_key {
	__u32 ifindex; /* of the pod that asked, on the host side: not used again for another pod */
	__u32 pad;
	struct wag_addr addr; /* what the answer said */
};

struct wag_name {
	__u32 pattern[WAG_NAME_SLOTS]; /* ids of patterns that its names are of; 0: none */
	__u32 until[WAG_NAME_SLOTS];   /* CLOCK_MONOTONIC, in seconds */
	__u8 text[WAG_NAME_SHOWN]; /* the name that was asked for last, cut off; for people */
};

/* Key: pattern of a policy in use. The agent writes. Its id. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_pattern_key);
	__type(value, __u32);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_patterns SEC(".maps");

/*
 * Key: pod, and an address that it was told. Programs write and evict (LRU), the agent reads. For a name whose entry has
 * made room the pod has to ask again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct wag_name_key);
	__type(value, struct wag_name);
	__uint(max_entries, 16384);
} wag_names SEC(".maps");

#define WAG_NAME_MINUTE 60

struct wag_name_share {
	__u32 since; /* CLOCK_MONOTONIC, in seconds */
	__u32 made;
};

/* Key: ifindex of a pod. Programs alone. How many entries of wag_names it has made lately, so that it cannot have others' removed. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, __u32);
	__type(value, struct wag_name_share);
	__uint(max_entries, 1024);
} wag_name_shares SEC(".maps");

#define WAG_SECOND_NS 1000000000ULL

WAG_INLINE __u32 wag_seconds(void)
{
	return bpf_ktime_get_ns() / WAG_SECOND_NS;
}

#endif
