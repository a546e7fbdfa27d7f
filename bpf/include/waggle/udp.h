/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Unconnected UDP sockets: which Services one talks to, which backend each of them has, and through which of them an answer
 * is shown.
 */
#ifndef WAGGLE_UDP_H
#define WAGGLE_UDP_H

#include <linux/bpf.h>
#include "event.h"
#include "peer.h"
#include "socket.h"

#define WAG_UDP_SLOTS 8
#define WAG_UDP_NONE 0xffff

struct wag_sk_udp {
	__u16 next;   /* slot to reuse */
	__u16 last;   /* slot that was asked last; WAG_UDP_NONE: an address that is no Service */
	__u32 silent; /* a bit per slot: what its backend sends answers somebody else, see wag_udp_speak */
	struct wag_sk_entry slot[WAG_UDP_SLOTS];
};

/* With the socket: the Services that an unconnected UDP socket talks to. Programs alone. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct wag_sk_udp);
} wag_sk_udp SEC(".maps");

/* The slot of the Service at `peer`; NULL: the socket did not talk to it lately. */
WAG_INLINE struct wag_sk_entry *wag_udp_find(struct wag_sk_udp *udp, const struct wag_peer *peer)
{
	__u32 i;

	for (i = 0; i < WAG_UDP_SLOTS; i++) {
		struct wag_sk_entry *slot = &udp->slot[i];

		if (slot->fport == peer->port && wag_addr_equal(&slot->frontend, &peer->addr))
			return slot;
	}
	return NULL;
}

/* Is a slot free for one more Service? */
WAG_INLINE bool wag_udp_has_room(const struct wag_sk_udp *udp)
{
	return !udp->slot[udp->next & (WAG_UDP_SLOTS - 1)].fport;
}

/* A slot for one more Service: the one that was taken first. */
WAG_INLINE struct wag_sk_entry *wag_udp_take(struct wag_sk_udp *udp)
{
	struct wag_sk_entry *slot = &udp->slot[udp->next++ & (WAG_UDP_SLOTS - 1)];

	if (slot->fport)
		wag_count(WAG_COUNTER_UDP_SLOT);
	return slot;
}

/*
 * One backend may stand behind several Services, and be spoken to by its own address besides. An answer does not say
 * which of them it is for, so it is shown as coming from the one asked last: `speaking`, NULL for the backend itself.
 * Returns the slot of `speaking`.
 */
WAG_INLINE __u16 wag_udp_speak(struct wag_sk_udp *udp, const struct wag_addr *backend, __be16 bport,
			       const struct wag_sk_entry *speaking)
{
	__u16 asked = WAG_UDP_NONE;
	__u32 i;

	for (i = 0; i < WAG_UDP_SLOTS; i++) {
		struct wag_sk_entry *slot = &udp->slot[i];

		if (slot->bport != bport || !wag_addr_equal(&slot->backend, backend))
			continue;
		if (slot == speaking) {
			udp->silent &= ~(1U << i);
			asked = i;
		} else {
			udp->silent |= 1U << i;
		}
	}
	return asked;
}

/* The slot whose Service the answers of the backend at `peer` are shown as; NULL: the backend itself. */
WAG_INLINE struct wag_sk_entry *wag_udp_shown(struct wag_sk_udp *udp, const struct wag_peer *peer)
{
	__u32 i;

	for (i = 0; i < WAG_UDP_SLOTS; i++) {
		struct wag_sk_entry *slot = &udp->slot[i];

		if (slot->fport && !(udp->silent & 1U << i) && wag_entry_is(slot, peer))
			return slot;
	}
	return NULL;
}

#endif
