// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Fills a Maglev table: 0.2 ms for what takes the agent's Python 10. Run by the agent with BPF_PROG_RUN, never by a
 * packet. Backends take turns; whose turn it is takes the next slot of its own order that is still free. A backend with
 * half the weight has half the turns.
 */
#include <linux/bpf.h>
#include "waggle/maglev.h"

/* Key: index of a backend. The agent writes what its program reads. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_maglev_backend);
	__uint(max_entries, WAG_MAGLEV_SLOTS);
} wag_maglev_work SEC(".maps");

struct wag_maglev_filling {
	struct wag_maglev *table;
	struct wag_maglev_backend *backend;
	__u32 index;
	__u32 count;
	__u32 greatest;
	__u32 filled;
};

static long wag_maglev_probe(__u32 i, struct wag_maglev_filling *filling)
{
	struct wag_maglev_backend *backend = filling->backend;
	struct wag_maglev *table = filling->table;
	__u32 slot;

	slot = wag_maglev_slot(backend->start + (__u64)backend->step * backend->next);
	backend->next++;
	if (table->slot[slot] != WAG_MAGLEV_EMPTY)
		return 0;
	table->slot[slot] = filling->index;
	filling->filled++;
	return 1;
}

static long wag_maglev_turn(__u32 i, struct wag_maglev_filling *filling)
{
	__u32 index = i % filling->count;
	struct wag_maglev_backend *backend = bpf_map_lookup_elem(&wag_maglev_work, &index);

	if (!backend)
		return 1;
	backend->credit += backend->weight;
	if (backend->credit < filling->greatest)
		return 0;
	backend->credit -= filling->greatest;
	filling->backend = backend;
	filling->index = index;
	bpf_loop(WAG_MAGLEV_SLOTS, wag_maglev_probe, filling, 0);
	return filling->filled == WAG_MAGLEV_SLOTS;
}

/* Returns the number of slots that have a backend: all, or something is wrong. */
SEC("syscall")
int wag_maglev_fill(struct wag_maglev_request *request)
{
	struct wag_maglev_filling filling = { .count = request->count, .greatest = request->greatest };
	__u32 id = request->id;

	filling.table = bpf_map_lookup_elem(&wag_maglev, &id);
	if (!filling.table || !filling.count || filling.count > WAG_MAGLEV_SLOTS)
		return 0;
	bpf_loop(1 << 23, wag_maglev_turn, &filling, 0);
	return filling.filled;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
