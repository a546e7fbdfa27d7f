// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Socket-level load balancing: a Service address becomes a backend when a socket connects or sends, so that packets of
 * in-cluster traffic carry backends from the start. What was asked for is kept with the socket, for getpeername and
 * for the source address of UDP replies, and is freed with it.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include "waggle/event.h"
#include "waggle/service.h"

#define WAG_ECONNREFUSED 111
#define WAG_IPPROTO_MPTCP 262
#define WAG_UDP_SLOTS 8
#define WAG_LAB_LEVEL 1

struct wag_sk_entry {
	struct wag_addr frontend;
	struct wag_addr backend;
	__be16 fport;
	__be16 bport;
	__u32 revision; /* of the Service when the backend was last found valid */
};

struct wag_sk_udp {
	__u32 next; /* slot to reuse */
	__u32 pad;
	struct wag_sk_entry slot[WAG_UDP_SLOTS];
};

/* With the socket: what a connected socket asked for. Programs alone. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct wag_sk_entry);
} wag_sk_peer SEC(".maps");

/* With the socket: the Services that an unconnected UDP socket talks to. Programs alone. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct wag_sk_udp);
} wag_sk_udp SEC(".maps");

/* Key 0: id of the cgroup that holds labs, 0 for none. The agent of the whole machine leaves its sockets alone. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} wag_lab_cgroup SEC(".maps");

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

WAG_INLINE bool wag_in_lab(void)
{
	__u32 zero = 0;
	__u64 *lab = bpf_map_lookup_elem(&wag_lab_cgroup, &zero);

	return lab && *lab && bpf_get_current_ancestor_cgroup_id(WAG_LAB_LEVEL) == *lab;
}

/* The frontend an address stands for, from this socket's point of view; NULL: none. */
WAG_INLINE struct wag_service *wag_frontend_find(struct bpf_sock_addr *ctx, const struct wag_peer *peer)
{
	struct wag_service *service;
	struct wag_endpoint *node;

	if (!wag_service_has_protocol(peer->proto))
		return NULL;
	service = wag_service_find(&peer->addr, peer->port, peer->proto);
	if (!service) {
		if (wag_addr_is_loopback(&peer->addr)) {
			if (bpf_get_netns_cookie(ctx) != wag_host_cookie)
				return NULL;
		} else {
			node = wag_endpoint_find(&peer->addr);
			if (!wag_endpoint_is(node, WAG_ENDPOINT_NODE))
				return NULL;
		}
		service = wag_service_find_nodeport(&peer->addr, peer->port, peer->proto);
	}
	if (service && wag_in_lab())
		return NULL;
	return service;
}

/* Counts and emits what a socket was sent to. */
WAG_INLINE void wag_socket_record(struct bpf_sock_addr *ctx, const struct wag_peer *peer,
				  const struct wag_addr *backend, __be16 bport)
{
	struct wag_flow_key flow = {};

	wag_count(WAG_COUNTER_SOCKET_LB);
	if (!wag_events)
		return;
	flow.netns = bpf_get_netns_cookie(ctx);
	flow.frontend = peer->addr;
	flow.backend = *backend;
	flow.fport = peer->port;
	flow.bport = bport;
	flow.proto = peer->proto;
	flow.hook = WAG_HOOK_SOCKET;
	wag_flow_record(&flow);
}

/* No backend: the caller fails at once with ECONNREFUSED, as it would after a TCP reset. */
WAG_INLINE int wag_socket_refuse(struct bpf_sock_addr *ctx, const struct wag_peer *peer)
{
	struct wag_event event = {};

	wag_count_drop(WAG_REASON_NO_BACKEND, WAG_HOOK_SOCKET);
	event.time_ns = bpf_ktime_get_ns();
	event.netns = bpf_get_netns_cookie(ctx);
	event.dst = peer->addr;
	event.dport = peer->port;
	event.proto = peer->proto;
	event.kind = WAG_EVENT_DROP;
	event.hook = WAG_HOOK_SOCKET;
	event.reason = WAG_REASON_NO_BACKEND;
	wag_emit(&event);
	bpf_set_retval(-WAG_ECONNREFUSED);
	return 0;
}

WAG_INLINE int wag_connect(struct bpf_sock_addr *ctx, bool v6)
{
	struct wag_sk_entry *entry, fresh = {};
	struct wag_service *service;
	struct wag_backend *backend;
	struct wag_peer peer = {};

	wag_peer_read(&peer, ctx, v6);
	service = wag_frontend_find(ctx, &peer);
	if (!service) {
		/* a socket may connect more than once: what it asked for before no longer holds */
		bpf_sk_storage_delete(&wag_sk_peer, ctx->sk);
		return 1;
	}
	backend = wag_backend_pick(service);
	if (!backend)
		return wag_socket_refuse(ctx, &peer);
	fresh.frontend = peer.addr;
	fresh.backend = backend->addr;
	fresh.fport = peer.port;
	fresh.bport = backend->port;
	fresh.revision = service->revision;
	entry = bpf_sk_storage_get(&wag_sk_peer, ctx->sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
	if (entry)
		*entry = fresh;
	wag_peer_write(ctx, &fresh.backend, fresh.bport, v6);
	wag_socket_record(ctx, &peer, &fresh.backend, fresh.bport);
	return 1;
}

/* The backend this socket already sends to for `peer`, as long as it still serves; otherwise a new choice. */
WAG_INLINE struct wag_sk_entry *wag_udp_choose(struct wag_sk_udp *udp, const struct wag_peer *peer,
					       struct wag_service *service, bool *fresh)
{
	struct wag_sk_entry *entry = NULL;
	struct wag_backend *backend;
	__u32 i;

	for (i = 0; i < WAG_UDP_SLOTS; i++) {
		struct wag_sk_entry *slot = &udp->slot[i];

		if (slot->fport == peer->port && wag_addr_equal(&slot->frontend, &peer->addr)) {
			entry = slot;
			break;
		}
	}
	if (entry) {
		if (entry->revision == service->revision)
			return entry;
		if (wag_backend_serves(service, &entry->backend, entry->bport)) {
			entry->revision = service->revision;
			return entry;
		}
	} else {
		i = udp->next++ & (WAG_UDP_SLOTS - 1);
		entry = &udp->slot[i];
		if (entry->fport)
			wag_count(WAG_COUNTER_UDP_SLOT);
	}
	backend = wag_backend_pick(service);
	if (!backend)
		return NULL;
	entry->frontend = peer->addr;
	entry->fport = peer->port;
	entry->backend = backend->addr;
	entry->bport = backend->port;
	entry->revision = service->revision;
	*fresh = true;
	return entry;
}

WAG_INLINE int wag_sendmsg(struct bpf_sock_addr *ctx, bool v6)
{
	struct wag_service *service;
	struct wag_sk_entry *entry;
	struct wag_peer peer = {};
	struct wag_sk_udp *udp;
	bool fresh = false;

	wag_peer_read(&peer, ctx, v6);
	service = wag_frontend_find(ctx, &peer);
	if (!service)
		return 1;
	if (!service->count)
		return wag_socket_refuse(ctx, &peer);
	udp = bpf_sk_storage_get(&wag_sk_udp, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!udp)
		return 1; /* no memory: the per-packet path translates */
	entry = wag_udp_choose(udp, &peer, service, &fresh);
	if (!entry)
		return wag_socket_refuse(ctx, &peer);
	wag_peer_write(ctx, &entry->backend, entry->bport, v6);
	if (fresh)
		wag_socket_record(ctx, &peer, &entry->backend, entry->bport);
	return 1;
}

WAG_INLINE bool wag_entry_is(const struct wag_sk_entry *entry, const struct wag_peer *peer)
{
	return entry->bport == peer->port && wag_addr_equal(&entry->backend, &peer->addr);
}

/* A UDP reply came from a backend: show the Service it was asked through. */
WAG_INLINE int wag_recvmsg(struct bpf_sock_addr *ctx, bool v6)
{
	struct wag_sk_entry *entry;
	struct wag_peer peer = {};
	struct wag_sk_udp *udp;
	int i;

	wag_peer_read(&peer, ctx, v6);
	entry = bpf_sk_storage_get(&wag_sk_peer, ctx->sk, NULL, 0);
	if (entry && wag_entry_is(entry, &peer)) {
		wag_peer_write(ctx, &entry->frontend, entry->fport, v6);
		return 1;
	}
	udp = bpf_sk_storage_get(&wag_sk_udp, ctx->sk, NULL, 0);
	if (!udp)
		return 1;
	for (i = 0; i < WAG_UDP_SLOTS; i++) {
		entry = &udp->slot[i];
		if (entry->fport && wag_entry_is(entry, &peer)) {
			wag_peer_write(ctx, &entry->frontend, entry->fport, v6);
			return 1;
		}
	}
	return 1;
}

WAG_INLINE int wag_getpeername(struct bpf_sock_addr *ctx, bool v6)
{
	struct wag_sk_entry *entry = bpf_sk_storage_get(&wag_sk_peer, ctx->sk, NULL, 0);
	struct wag_peer peer = {};

	if (!entry)
		return 1;
	wag_peer_read(&peer, ctx, v6);
	if (wag_entry_is(entry, &peer))
		wag_peer_write(ctx, &entry->frontend, entry->fport, v6);
	return 1;
}

SEC("cgroup/connect4")
int wag_connect4(struct bpf_sock_addr *ctx)
{
	return wag_connect(ctx, false);
}

SEC("cgroup/connect6")
int wag_connect6(struct bpf_sock_addr *ctx)
{
	return wag_connect(ctx, true);
}

SEC("cgroup/sendmsg4")
int wag_sendmsg4(struct bpf_sock_addr *ctx)
{
	return wag_sendmsg(ctx, false);
}

SEC("cgroup/sendmsg6")
int wag_sendmsg6(struct bpf_sock_addr *ctx)
{
	return wag_sendmsg(ctx, true);
}

SEC("cgroup/recvmsg4")
int wag_recvmsg4(struct bpf_sock_addr *ctx)
{
	return wag_recvmsg(ctx, false);
}

SEC("cgroup/recvmsg6")
int wag_recvmsg6(struct bpf_sock_addr *ctx)
{
	return wag_recvmsg(ctx, true);
}

SEC("cgroup/getpeername4")
int wag_getpeername4(struct bpf_sock_addr *ctx)
{
	return wag_getpeername(ctx, false);
}

SEC("cgroup/getpeername6")
int wag_getpeername6(struct bpf_sock_addr *ctx)
{
	return wag_getpeername(ctx, true);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
