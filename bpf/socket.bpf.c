// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Socket-level load balancing: a Service address becomes a backend when a socket connects or sends, so that packets of
 * in-cluster traffic carry backends from the start. What was asked for is kept, for getpeername and for the
 * source address of UDP replies: of UDP with the socket, of TCP in a ring.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include "waggle/affinity.h"
#include "waggle/bind.h"
#include "waggle/event.h"
#include "waggle/netns.h"
#include "waggle/peer.h"
#include "waggle/ranges.h"
#include "waggle/service.h"
#include "waggle/udp.h"
#include "waggle/vip.h"

#define WAG_EADDRINUSE 98
#define WAG_ECONNREFUSED 111
#define WAG_EHOSTUNREACH 113
#define WAG_LAB_LEVEL 1

/* Key 0: id of the cgroup that holds labs, 0 for none. The agent of the whole machine leaves its sockets alone. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} wag_lab_cgroup SEC(".maps");

WAG_INLINE bool wag_in_lab(void)
{
	__u32 zero = 0;
	__u64 *lab = bpf_map_lookup_elem(&wag_lab_cgroup, &zero);

	return lab && *lab && bpf_get_current_ancestor_cgroup_id(WAG_LAB_LEVEL) == *lab;
}

/* The frontend an address stands for, from this socket's point of view; NULL: none. */
WAG_INLINE struct wag_service *wag_service_for(struct bpf_sock_addr *ctx, const struct wag_peer *peer)
{
	struct wag_service *service;

	if (!wag_service_has_protocol(peer->proto))
		return NULL;
	/* 0.0.0.0 and :: are loopback to the kernel; they are also what NodePort frontends are kept under */
	if (wag_addr_is_loopback(&peer->addr) || wag_addr_is_any(&peer->addr)) {
		if (bpf_get_netns_cookie(ctx) != wag_host_cookie)
			return NULL;
		service = wag_service_find(&peer->addr, peer->port, peer->proto); /* a host port of loopback alone */
		if (!service)
			service = wag_service_find_nodeport(&peer->addr, peer->port, peer->proto);
		if (service && !wag_serves_at(service, wag_loopback_nodeport))
			service = NULL;
	} else {
		service = wag_service_find(&peer->addr, peer->port, peer->proto);
		if (!service)
			service = wag_service_of_node(wag_endpoint_find(&peer->addr), &peer->addr, peer->port, peer->proto);
	}
	if (service && wag_in_lab())
		return NULL;
	return service;
}

/* The address that a packet of this socket would have; for a namespace that is no pod's, something that stands for it. */
WAG_INLINE void wag_client_of(struct bpf_sock_addr *ctx, const struct wag_peer *peer, struct wag_addr *client)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct wag_netns *netns = bpf_map_lookup_elem(&wag_netns, &cookie);

	client->half[0] = 0;
	client->half[1] = cookie;
	if (netns)
		*client = wag_addr_is4(&peer->addr) ? netns->ip4 : netns->ip6;
}

/* A backend for something new of this socket. WAG_REASON_NONE when `chosen` is filled, otherwise why there is none. */
WAG_INLINE enum wag_reason wag_socket_choose(struct bpf_sock_addr *ctx, const struct wag_peer *peer,
					     struct wag_service *service, struct wag_backend *chosen)
{
	struct wag_addr client = {};

	if (!service->count)
		return wag_service_empty(service);
	if (service->affinity_s || service->ranges) {
		wag_client_of(ctx, peer, &client);
		if (!wag_service_admits(service, &client))
			return WAG_REASON_SOURCE_RANGE;
	}
	return wag_backend_choose(service, &client, bpf_get_prandom_u32(), chosen) ? WAG_REASON_NONE : WAG_REASON_STALE_BACKEND;
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
	wag_flow_record(&flow, WAG_HOOK_SOCKET, 0);
}

/*
 * No backend: the caller fails at once. With ECONNREFUSED, as after a TCP reset, where nothing serves; with EHOSTUNREACH
 * where packets would be dropped.
 */
WAG_INLINE int wag_socket_refuse(struct bpf_sock_addr *ctx, const struct wag_peer *peer, enum wag_reason reason)
{
	struct wag_event *event;

	wag_count_drop(reason, WAG_HOOK_SOCKET);
	event = wag_event_start(WAG_EVENT_DROP, bpf_ktime_get_ns());
	if (event) {
		event->netns = bpf_get_netns_cookie(ctx);
		event->dst = peer->addr;
		event->dport = peer->port;
		event->proto = peer->proto;
		event->hook = WAG_HOOK_SOCKET;
		event->reason = reason;
		event->verdict = wag_reason_rejects(reason) ? WAG_OUTCOME_REJECTED : WAG_OUTCOME_DROPPED;
		wag_event_submit(event);
	}
	bpf_set_retval(wag_reason_rejects(reason) ? -WAG_ECONNREFUSED : -WAG_EHOSTUNREACH);
	return 0;
}

/* Why a socket should not even try this address, which is no frontend; WAG_REASON_NONE: it should. */
WAG_INLINE enum wag_reason wag_vacant(const struct wag_peer *peer)
{
	enum wag_reason reason = wag_service_has_protocol(peer->proto) ? wag_vip_refusal(&peer->addr) : WAG_REASON_NONE;

	return reason && wag_in_lab() ? WAG_REASON_NONE : reason;
}

WAG_INLINE int wag_connect(struct bpf_sock_addr *ctx, bool v6)
{
	struct wag_backend backend = {};
	struct wag_sk_entry fresh = {};
	struct wag_service *service;
	struct wag_peer peer = {};
	enum wag_reason reason;

	wag_peer_read(&peer, ctx, v6);
	service = wag_service_for(ctx, &peer);
	if (!service) {
		wag_peer_forget(ctx, &peer);
		/* connecting a UDP socket sends nothing: resolvers do it to learn which source address they would have */
		reason = peer.proto == IPPROTO_UDP ? WAG_REASON_NONE : wag_vacant(&peer);
		return reason ? wag_socket_refuse(ctx, &peer, reason) : 1;
	}
	reason = wag_socket_choose(ctx, &peer, service, &backend);
	if (reason)
		return wag_socket_refuse(ctx, &peer, reason);
	fresh.frontend = peer.addr;
	fresh.backend = backend.addr;
	fresh.fport = peer.port;
	fresh.bport = backend.port;
	fresh.revision = service->revision;
	wag_peer_remember(ctx, &peer, &fresh);
	wag_peer_write(ctx, &fresh.backend, fresh.bport, v6);
	wag_socket_record(ctx, &peer, &fresh.backend, fresh.bport);
	return 1;
}

/* Do packets of this socket pass a program of its own interface? */
WAG_INLINE bool wag_of_pod(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);

	return bpf_map_lookup_elem(&wag_netns, &cookie);
}

/*
 * The backend this socket already sends to for `peer`, as long as it still serves; otherwise a new choice. NULL without a
 * reason: the per-packet path does it. That is for a pod's socket that talks to more Services than there are slots: were one
 * taken again, an answer that is still to come would be shown as the backend's.
 */
WAG_INLINE struct wag_sk_entry *wag_udp_choose(struct bpf_sock_addr *ctx, struct wag_sk_udp *udp,
					       const struct wag_peer *peer, struct wag_service *service,
					       enum wag_reason *reason, bool *fresh)
{
	struct wag_sk_entry *entry = wag_udp_find(udp, peer);
	struct wag_backend backend = {};

	if (entry) {
		if (entry->revision == service->revision)
			return entry;
		if (wag_backend_keeps(service, &entry->backend, entry->bport)) {
			entry->revision = service->revision;
			return entry;
		}
	}
	*reason = WAG_REASON_NONE;
	if (!entry && !wag_udp_has_room(udp) && wag_of_pod(ctx)) {
		wag_count(WAG_COUNTER_UDP_SLOT);
		return NULL;
	}
	*reason = wag_socket_choose(ctx, peer, service, &backend);
	if (*reason)
		return NULL;
	if (!entry)
		entry = wag_udp_take(udp);
	entry->frontend = peer->addr;
	entry->fport = peer->port;
	entry->backend = backend.addr;
	entry->bport = backend.port;
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
	enum wag_reason reason;
	bool fresh = false;

	wag_peer_read(&peer, ctx, v6);
	service = wag_service_for(ctx, &peer);
	if (!service) {
		udp = bpf_sk_storage_get(&wag_sk_udp, ctx->sk, NULL, 0);
		if (udp) {
			wag_udp_speak(udp, &peer.addr, peer.port, NULL);
			udp->last = WAG_UDP_NONE;
		}
		reason = wag_vacant(&peer);
		return reason ? wag_socket_refuse(ctx, &peer, reason) : 1;
	}
	entry = wag_connected(ctx);
	if (entry && entry->fport == peer.port && wag_addr_equal(&entry->frontend, &peer.addr)) {
		/* the kernel takes answers from no other backend */
		wag_peer_write(ctx, &entry->backend, entry->bport, v6);
		return 1;
	}
	if (!service->count)
		return wag_socket_refuse(ctx, &peer, wag_service_empty(service));
	udp = bpf_sk_storage_get(&wag_sk_udp, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!udp)
		return 1; /* no memory: the per-packet path translates */
	if (udp->last != WAG_UDP_NONE) {
		/* the same as before, which is what nearly every datagram is: nothing has to be found or settled again */
		entry = &udp->slot[udp->last & (WAG_UDP_SLOTS - 1)];
		if (entry->fport == peer.port && entry->revision == service->revision &&
		    wag_addr_equal(&entry->frontend, &peer.addr)) {
			wag_peer_write(ctx, &entry->backend, entry->bport, v6);
			return 1;
		}
	}
	entry = wag_udp_choose(ctx, udp, &peer, service, &reason, &fresh);
	if (!entry) {
		udp->last = WAG_UDP_NONE;
		return reason ? wag_socket_refuse(ctx, &peer, reason) : 1;
	}
	udp->last = wag_udp_speak(udp, &entry->backend, entry->bport, entry);
	wag_peer_write(ctx, &entry->backend, entry->bport, v6);
	if (fresh)
		wag_socket_record(ctx, &peer, &entry->backend, entry->bport);
	return 1;
}

/* A UDP reply came from a backend: show the Service it was asked through. */
WAG_INLINE int wag_recvmsg(struct bpf_sock_addr *ctx, bool v6)
{
	struct wag_sk_entry *entry;
	struct wag_peer peer = {};
	struct wag_sk_udp *udp;

	wag_peer_read(&peer, ctx, v6);
	entry = wag_connected(ctx);
	if (!entry || !wag_entry_is(entry, &peer)) {
		udp = bpf_sk_storage_get(&wag_sk_udp, ctx->sk, NULL, 0);
		entry = udp ? wag_udp_shown(udp, &peer) : NULL;
	}
	if (entry)
		wag_peer_write(ctx, &entry->frontend, entry->fport, v6);
	return 1;
}

WAG_INLINE int wag_getpeername(struct bpf_sock_addr *ctx, bool v6)
{
	struct wag_sk_entry *entry;
	struct wag_peer peer = {};

	wag_peer_read(&peer, ctx, v6);
	entry = wag_peer_asked(ctx, &peer);
	if (entry && wag_entry_is(entry, &peer))
		wag_peer_write(ctx, &entry->frontend, entry->fport, v6);
	return 1;
}

/* Port 0 is for the kernel to choose: it keeps off these ports by ip_local_reserved_ports. */
WAG_INLINE int wag_bind(struct bpf_sock_addr *ctx, bool v6)
{
	struct wag_peer own = {};

	if (!ctx->user_port || bpf_get_netns_cookie(ctx) != wag_host_cookie)
		return 1;
	wag_peer_read(&own, ctx, v6);
	if (!wag_service_has_protocol(own.proto) || !wag_bind_in_vain(&own.addr, own.port, own.proto))
		return 1;
	bpf_set_retval(-WAG_EADDRINUSE);
	return 0;
}

SEC("cgroup/bind4")
int wag_bind4(struct bpf_sock_addr *ctx)
{
	return wag_bind(ctx, false);
}

SEC("cgroup/bind6")
int wag_bind6(struct bpf_sock_addr *ctx)
{
	return wag_bind(ctx, true);
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
