/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Session affinity: a client stays with its backend, whichever frontend of the Service port it asks. */
#ifndef WAGGLE_AFFINITY_H
#define WAGGLE_AFFINITY_H

#include <linux/bpf.h>
#include "service.h"

struct wag_affinity_key {
	struct wag_addr client;
	__u32 id; /* of struct wag_service */
	__u32 pad;
};

struct wag_affinity {
	struct wag_addr addr; /* of the backend */
	__be16 port;
	__u8 pad[6];
	__u64 used_ns; /* CLOCK_MONOTONIC of the last new flow */
};

/* Key: client and Service port. Programs write and evict (LRU). One entry per client of a Service with affinity. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct wag_affinity_key);
	__type(value, struct wag_affinity);
	__uint(max_entries, 8192);
} wag_affinity SEC(".maps");

/*
 * The backend for a new flow of this client: the one it has, where the Service has affinity and it still serves, else the
 * one that `number` leads to. `chosen` is filled; 0 when there is none.
 */
static __noinline int wag_backend_choose(struct wag_service *service, const struct wag_addr *client, __u32 number,
					 struct wag_backend *chosen)
{
	struct wag_affinity_key key = {};
	struct wag_affinity *known, fresh = {};
	struct wag_backend *backend;
	__u64 now = 0;

	if (!service || !client || !chosen)
		return 0;
	if (service->affinity_s) {
		key.client = *client;
		key.id = service->id;
		now = bpf_ktime_get_ns();
		known = bpf_map_lookup_elem(&wag_affinity, &key);
		if (known && now - known->used_ns < service->affinity_s * WAG_SECOND_NS &&
		    wag_backend_among(service, service->count, &known->addr, known->port)) {
			known->used_ns = now;
			chosen->addr = known->addr;
			chosen->port = known->port;
			return 1;
		}
	}
	backend = wag_backend_pick(service, number);
	if (!backend)
		return 0;
	chosen->addr = backend->addr;
	chosen->port = backend->port;
	if (service->affinity_s) {
		fresh.addr = backend->addr;
		fresh.port = backend->port;
		fresh.used_ns = now;
		/* a table that takes no entry costs this client its affinity, not its flow */
		bpf_map_update_elem(&wag_affinity, &key, &fresh, BPF_ANY);
	}
	return 1;
}

#endif
