/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is kept with a socket whose connect() or send was translated. */
#ifndef WAGGLE_SOCKET_H
#define WAGGLE_SOCKET_H

#include <linux/bpf.h>
#include "addr.h"

struct wag_sk_entry {
	struct wag_addr frontend;
	struct wag_addr backend;
	__be16 fport;
	__be16 bport;
	__u32 revision; /* of the Service when the backend was last found valid */
};

/* With the socket: what a connected UDP socket asked for. Programs alone. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct wag_sk_entry);
} wag_sk_peer SEC(".maps");

#define WAG_PEERS 32768

struct wag_peer_slot {
	__u64 cookie; /* of the socket that it is about */
	struct wag_sk_entry entry;
};

/*
 * Key: socket cookie modulo WAG_PEERS. Programs alone. What the last connections asked for, for getpeername. Cookies are
 * handed out one after the other, in batches of 4,096 for each CPU, so that with up to eight CPUs a slot is taken again
 * only after thousands of sockets; with more, sooner. TCP needs no more than that, and storage that lives with the socket costs 5 % of the connection rate (docs/decisions/0006).
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_peer_slot);
	__uint(max_entries, WAG_PEERS);
} wag_peers SEC(".maps");

WAG_INLINE struct wag_peer_slot *wag_peer_slot(__u64 cookie)
{
	__u32 index = cookie & (WAG_PEERS - 1);

	return bpf_map_lookup_elem(&wag_peers, &index);
}

#endif
