/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The other end that a program sets or asks for in a socket call, and what a socket asked for before: of connected UDP
 * with the socket, of TCP in a ring.
 */
#ifndef WAGGLE_PEER_H
#define WAGGLE_PEER_H

#include <linux/bpf.h>
#include <linux/in.h>
#include "addr.h"
#include "socket.h"

#define WAG_IPPROTO_MPTCP 262

struct wag_peer {
	struct wag_addr addr;
	__be16 port;
	__u8 proto;
};

WAG_INLINE void wag_peer_read(struct wag_peer *peer, const struct bpf_sock_addr *ctx, bool v6)
{
	if (v6) {
		peer->addr.word[0] = ctx->user_ip6[0];
		peer->addr.word[1] = ctx->user_ip6[1];
		peer->addr.word[2] = ctx->user_ip6[2];
		peer->addr.word[3] = ctx->user_ip6[3];
	} else {
		wag_addr_set4(&peer->addr, ctx->user_ip4);
	}
	peer->port = (__be16)ctx->user_port;
	peer->proto = ctx->protocol == WAG_IPPROTO_MPTCP ? IPPROTO_TCP : (__u8)ctx->protocol;
}

WAG_INLINE void wag_peer_write(struct bpf_sock_addr *ctx, const struct wag_addr *addr, __be16 port, bool v6)
{
	if (v6) {
		ctx->user_ip6[0] = addr->word[0];
		ctx->user_ip6[1] = addr->word[1];
		ctx->user_ip6[2] = addr->word[2];
		ctx->user_ip6[3] = addr->word[3];
	} else {
		ctx->user_ip4 = addr->word[3];
	}
	ctx->user_port = port;
}

/* Keeps what a socket asked for. Without memory for it, it shows its backend. */
WAG_INLINE void wag_peer_remember(struct bpf_sock_addr *ctx, const struct wag_peer *peer, struct wag_sk_entry *fresh)
{
	struct wag_sk_entry *entry;
	struct wag_peer_slot *slot;
	__u64 cookie;

	if (peer->proto == IPPROTO_UDP) {
		entry = bpf_sk_storage_get(&wag_sk_peer, ctx->sk, fresh, BPF_SK_STORAGE_GET_F_CREATE);
		if (entry)
			*entry = *fresh;
		return;
	}
	cookie = bpf_get_socket_cookie(ctx);
	slot = wag_peer_slot(cookie);
	if (slot) {
		slot->cookie = cookie;
		slot->entry = *fresh;
	}
}

/* A socket may connect more than once: what it asked for before no longer holds. */
WAG_INLINE void wag_peer_forget(struct bpf_sock_addr *ctx, const struct wag_peer *peer)
{
	struct wag_peer_slot *slot;
	__u64 cookie;

	if (peer->proto == IPPROTO_UDP) {
		bpf_sk_storage_delete(&wag_sk_peer, ctx->sk);
		return;
	}
	cookie = bpf_get_socket_cookie(ctx);
	slot = wag_peer_slot(cookie);
	if (slot && slot->cookie == cookie)
		slot->cookie = 0;
}

/* What a connected socket asked for; NULL when that was its peer itself. */
WAG_INLINE struct wag_sk_entry *wag_peer_asked(struct bpf_sock_addr *ctx, const struct wag_peer *peer)
{
	struct wag_peer_slot *slot;
	__u64 cookie;

	if (peer->proto == IPPROTO_UDP)
		return bpf_sk_storage_get(&wag_sk_peer, ctx->sk, NULL, 0);
	cookie = bpf_get_socket_cookie(ctx);
	slot = wag_peer_slot(cookie);
	return slot && slot->cookie == cookie ? &slot->entry : NULL;
}

/* The Service that this socket is connected to; NULL for none. */
WAG_INLINE struct wag_sk_entry *wag_connected(struct bpf_sock_addr *ctx)
{
	/* nothing tells a program of a disconnect: the storage outlives it */
	return ctx->sk->dst_port ? bpf_sk_storage_get(&wag_sk_peer, ctx->sk, NULL, 0) : NULL;
}

WAG_INLINE bool wag_entry_is(const struct wag_sk_entry *entry, const struct wag_peer *peer)
{
	return entry->bport == peer->port && wag_addr_equal(&entry->backend, &peer->addr);
}

#endif
