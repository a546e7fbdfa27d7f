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
#include "maglev.h"
#include "verdict.h"

#define WAG_SECOND_NS 1000000000ULL

enum wag_scope {
	WAG_SCOPE_INTERNAL = 0, /* pods and processes of this node; everybody where there is no external entry */
	WAG_SCOPE_EXTERNAL = 1, /* what comes by the wire, where that is answered differently */
};

/* A NodePort frontend has the address 0.0.0.0 or ::, meaning any address of this node that serves NodePorts. */
struct wag_service_key {
	struct wag_addr addr;
	__be16 port;
	__u8 proto; /* IPPROTO_* */
	__u8 scope; /* enum wag_scope */
	__u8 pad[4];
};

struct wag_service {
	__u32 offset; /* of the first backend in wag_backends */
	__u32 count;
	__u32 revision;   /* changes whenever the set of backends does */
	__u16 flags;      /* enum wag_service_flag */
	__u16 draining;   /* UDP: backends after those, which still serve the flows they have and get no others */
	__u32 affinity_s; /* a client stays with its backend for so many seconds after its last new flow; 0: it does not */
	__u32 id;         /* of the Service port, whatever the frontend: part of wag_affinity's key */
	__u64 ranges;     /* part of wag_source_ranges' key: who may come; 0: everybody */
	__u32 maglev;     /* key in wag_maglev; 0: all backends have the same chance */
	__u32 pad;
};

enum wag_service_flag {
	WAG_SERVICE_NODEPORT = 1,
	WAG_SERVICE_HAS_EXTERNAL = 2, /* what comes by the wire has an entry of its own */
	WAG_SERVICE_KEEP_CLIENT = 4,  /* no SNAT: all backends are on this node */
	WAG_SERVICE_EMPTY_DROP = 8,   /* without a backend: drop rather than reject, there are backends elsewhere */
	WAG_SERVICE_DSR = 32,         /* backends on other nodes answer clients directly */
	WAG_SERVICE_BY_HASH = 16,     /* packets of one flow choose the same backend on every node */
	WAG_SERVICE_HOST_PORT = 256,  /* of a pod: on every address of the node, whatever serves NodePorts */
	WAG_SERVICE_HELD = 512,       /* the runtime that asked for the host port has a socket there, so that nobody else does */
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

/* Is a port of any address served at this one? */
WAG_INLINE bool wag_serves_at(const struct wag_service *service, bool nodeports)
{
	return nodeports || (service->flags & WAG_SERVICE_HOST_PORT);
}

/* The node port or host port that an address of the node stands for; `to` is what the address is here, NULL for nothing. */
WAG_INLINE struct wag_service *wag_service_of_node(const struct wag_endpoint *to, const struct wag_addr *addr,
						   __be16 port, __u8 proto)
{
	struct wag_service *service;

	if (!wag_endpoint_is(to, WAG_ENDPOINT_NODE))
		return NULL;
	service = wag_service_find_nodeport(addr, port, proto);
	return service && wag_serves_at(service, to->flags & WAG_ENDPOINT_NODEPORT) ? service : NULL;
}

/*
 * The frontend that an address stands for; `to` is what the address is on this node, NULL for nothing. An external or
 * load balancer address may be one of the node's own: it comes before node ports.
 */
WAG_INLINE struct wag_service *wag_frontend_find(const struct wag_addr *addr, __be16 port, __u8 proto,
						 const struct wag_endpoint *to)
{
	struct wag_service *service = wag_service_find(addr, port, proto);

	return service ? service : wag_service_of_node(to, addr, port, proto);
}

/* What comes by the wire to a frontend gets: its external entry where it has one. */
WAG_INLINE struct wag_service *wag_service_external(struct wag_service *service, const struct wag_addr *addr,
						    __be16 port, __u8 proto)
{
	struct wag_service_key key = { .addr = *addr, .port = port, .proto = proto, .scope = WAG_SCOPE_EXTERNAL };
	struct wag_service *external;

	if (!(service->flags & WAG_SERVICE_HAS_EXTERNAL))
		return service;
	if (service->flags & WAG_SERVICE_NODEPORT)
		wag_addr_set_any(&key.addr, addr);
	external = bpf_map_lookup_elem(&wag_services, &key);
	return external ? external : service; /* between two writes: the next packet finds it */
}

WAG_INLINE bool wag_service_has_protocol(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

/* Why a Service without a backend has none. */
WAG_INLINE enum wag_reason wag_service_empty(const struct wag_service *service)
{
	return service->flags & WAG_SERVICE_EMPTY_DROP ? WAG_REASON_NO_LOCAL_BACKEND : WAG_REASON_NO_BACKEND;
}

/* The backend that `number` leads to: any, where that is random. NULL only when count is 0 or tables are inconsistent. */
WAG_INLINE struct wag_backend *wag_backend_pick(const struct wag_service *service, __u32 number)
{
	__u32 count = service->count;
	struct wag_maglev *table;
	__u32 index = 0;

	if (!count)
		return NULL;
	if (service->maglev) {
		table = bpf_map_lookup_elem(&wag_maglev, &service->maglev);
		if (table)
			number = table->slot[wag_maglev_slot(number)];
	}
	if (count > 1)
		index = number % count;
	index += service->offset;
	return bpf_map_lookup_elem(&wag_backends, &index);
}

struct wag_backend_search {
	struct wag_addr addr;
	__be16 port; /* 0: any; the one that was found */
	__u16 found;
	__u32 offset;
};

static long wag_backend_matches(__u32 i, struct wag_backend_search *search)
{
	__u32 index = search->offset + i;
	struct wag_backend *backend = bpf_map_lookup_elem(&wag_backends, &index);

	search->found = backend && (!search->port || backend->port == search->port) &&
			wag_addr_equal(&backend->addr, &search->addr);
	if (search->found)
		search->port = backend->port;
	return search->found || !backend;
}

/*
 * Is addr:port among the first `count` backends? Only asked once per flow after its Service changed. A bpf_loop rather
 * than a bounded loop: the verifier walks its body once, which makes loading 20 times faster.
 */
WAG_INLINE bool wag_backend_among(const struct wag_service *service, __u32 count, const struct wag_addr *addr,
				  __be16 port)
{
	struct wag_backend_search search = { .addr = *addr, .port = port, .offset = service->offset };

	bpf_loop(count, wag_backend_matches, &search, 0);
	return search.found;
}

/* May a flow stay with this backend? Of UDP, with one that drains too (semantics.md section 4). */
WAG_INLINE bool wag_backend_keeps(const struct wag_service *service, const struct wag_addr *addr, __be16 port)
{
	return wag_backend_among(service, service->count + service->draining, addr, port);
}

#endif
