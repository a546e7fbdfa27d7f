/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services: a frontend becomes a backend in two lookups. The agent writes a new extent of backends first and switches
 * the frontend's value last, so that a packet sees the old set or the new one, never half.
 */
#ifndef WAGGLE_SERVICE_H
#define WAGGLE_SERVICE_H

#include <linux/bpf.h>
#include <linux/in.h>
#include "addr.h"
#include "endpoint.h"

/* A NodePort frontend has the address 0.0.0.0 or ::, meaning any address of this node. */
struct wag_service_key {
	struct wag_addr addr;
	__be16 port;
	__u8 proto; /* IPPROTO_* */
	__u8 pad[5];
};

struct wag_service {
	__u32 offset; /* of the first backend in wag_backends */
	__u32 count;
	__u32 revision; /* changes whenever the set of backends does */
	__u32 flags;    /* enum wag_service_flag */
};

enum wag_service_flag {
	WAG_SERVICE_NODEPORT = 1,
};

struct wag_backend {
	struct wag_addr addr;
	__be16 port;
	__u16 flags;
	__u32 pad;
};

/* Key: frontend. The agent writes. One entry per address, port and protocol of every Service. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_service_key);
	__type(value, struct wag_service);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_services SEC(".maps");

/* Key: index, in extents that wag_services points to. The agent writes. One record per endpoint and Service port. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_backend);
	__uint(max_entries, 262144);
} wag_backends SEC(".maps");

WAG_INLINE struct wag_service *wag_service_find(const struct wag_addr *addr, __be16 port, __u8 proto)
{
	struct wag_service_key key = { .addr = *addr, .port = port, .proto = proto };

	return bpf_map_lookup_elem(&wag_services, &key);
}

/* The NodePort frontend for `port`; the caller knows that `addr` belongs to this node. */
WAG_INLINE struct wag_service *wag_service_find_nodeport(const struct wag_addr *addr, __be16 port, __u8 proto)
{
	struct wag_service_key key = { .port = port, .proto = proto };

	wag_addr_set_any(&key.addr, addr);
	return bpf_map_lookup_elem(&wag_services, &key);
}

WAG_INLINE bool wag_service_has_protocol(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

/* One of the backends, uniformly at random. NULL only when count is 0 or the tables are inconsistent. */
WAG_INLINE struct wag_backend *wag_backend_pick(const struct wag_service *service)
{
	__u32 count = service->count;
	__u32 index;

	if (!count)
		return NULL;
	index = service->offset;
	if (count > 1)
		index += bpf_get_prandom_u32() % count;
	return bpf_map_lookup_elem(&wag_backends, &index);
}

struct wag_backend_search {
	struct wag_addr addr;
	__be16 port;
	__u16 found;
	__u32 offset;
};

static long wag_backend_matches(__u32 i, struct wag_backend_search *search)
{
	__u32 index = search->offset + i;
	struct wag_backend *backend = bpf_map_lookup_elem(&wag_backends, &index);

	search->found = backend && backend->port == search->port && wag_addr_equal(&backend->addr, &search->addr);
	return search->found || !backend;
}

/*
 * Is addr:port still among the backends? Only asked once per flow after its Service changed. A bpf_loop rather than a
 * bounded loop: the verifier walks its body once, which makes loading 20 times faster.
 */
WAG_INLINE bool wag_backend_serves(const struct wag_service *service, const struct wag_addr *addr, __be16 port)
{
	struct wag_backend_search search = { .addr = *addr, .port = port, .offset = service->offset };

	bpf_loop(service->count, wag_backend_matches, &search, 0);
	return search.found;
}

#endif
