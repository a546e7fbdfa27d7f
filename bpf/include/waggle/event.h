/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Counters and events. A drop is always counted and always offered to the ring buffer. A Service translation is
 * added to its flow's counter; the flow emits an event when it is new and then at most once per wag_event_ns, with the
 * count, so that the cost does not grow with the connection rate. Nothing wakes the reader: it polls.
 */
#ifndef WAGGLE_EVENT_H
#define WAGGLE_EVENT_H

#include <linux/bpf.h>
#include "addr.h"
#include "config.h"
#include "verdict.h"

enum wag_event_kind {
	WAG_EVENT_DROP = 1,
	WAG_EVENT_FLOW = 2,
};

/* Emitted through wag_events_rb. Ports are big-endian, as on the wire. */
struct wag_event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 netns;   /* cookie of the client's network namespace; 0 where only packets are seen */
	__u64 count;   /* flow: translations so far */
	struct wag_addr src;
	struct wag_addr dst;      /* drop: destination; flow: frontend */
	struct wag_addr backend;  /* flow: chosen backend */
	__be16 sport;
	__be16 dport;
	__be16 bport;
	__u8 proto;
	__u8 kind;   /* enum wag_event_kind */
	__u8 hook;   /* enum wag_hook */
	__u8 reason; /* enum wag_reason */
	__u16 pad;
	__u32 ifindex;
};

struct wag_flow_key {
	__u64 netns;
	struct wag_addr src;
	struct wag_addr frontend;
	struct wag_addr backend;
	__be16 fport;
	__be16 bport;
	__u8 proto;
	__u8 hook;
	__u16 pad;
};

struct wag_flow {
	__u64 count;
	__u64 emitted_ns; /* when the last event left */
};

/* Key: reason * WAG_HOOK_MAX + hook. Programs write, the agent reads. Every drop there is. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, WAG_REASON_MAX * WAG_HOOK_MAX);
} wag_drops SEC(".maps");

enum wag_counter {
	WAG_COUNTER_EVENTS_LOST = 0,  /* ring buffer full */
	WAG_COUNTER_SOCKET_LB = 1,    /* connects and sends translated */
	WAG_COUNTER_PACKET_LB = 2,    /* flows translated per packet */
	WAG_COUNTER_UDP_SLOT = 3,     /* a UDP socket asked for one more Service than it has slots */
	WAG_COUNTER_MASQUERADE = 4,   /* flows that left the cluster with the node's address */
	WAG_COUNTER_DSR = 5,          /* flows that came from another node, to be answered directly */
	WAG_COUNTER_MAX = 8,
};

/* Key: enum wag_counter. Programs write, the agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, WAG_COUNTER_MAX);
} wag_counters SEC(".maps");

/* struct wag_event records. Programs write, the agent reads. 1 MiB: about 8,000 events between two polls. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} wag_events_rb SEC(".maps");

/* Key: client, Service, backend. Programs write, the agent reads. Only a view: eviction costs an extra event. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct wag_flow_key);
	__type(value, struct wag_flow);
	__uint(max_entries, 8192);
} wag_flows SEC(".maps");

WAG_INLINE void wag_count(__u32 index)
{
	__u64 *value = bpf_map_lookup_elem(&wag_counters, &index);

	if (value)
		(*value)++;
}

/* A zeroed event in the ring buffer, to be filled and submitted. NULL, and counted, when there is no room. */
WAG_INLINE struct wag_event *wag_event_start(enum wag_event_kind kind, __u64 now)
{
	struct wag_event *event = bpf_ringbuf_reserve(&wag_events_rb, sizeof(*event), 0);

	if (!event) {
		wag_count(WAG_COUNTER_EVENTS_LOST);
		return NULL;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->kind = kind;
	event->time_ns = now;
	return event;
}

WAG_INLINE void wag_event_submit(struct wag_event *event)
{
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}

WAG_INLINE void wag_count_drop(enum wag_reason reason, enum wag_hook hook)
{
	__u32 index = (__u32)reason * WAG_HOOK_MAX + hook;
	__u64 *value = bpf_map_lookup_elem(&wag_drops, &index);

	if (value)
		(*value)++;
}

/* Adds one translation to its flow and emits an event when one is due. `key` must be zeroed where unused. */
static __noinline int wag_flow_record(struct wag_flow_key *key)
{
	struct wag_flow fresh = { .count = 1 };
	struct wag_event *event;
	struct wag_flow *flow;
	__u64 count = 1;
	__u64 now;

	if (!key)
		return 0;
	now = bpf_ktime_get_ns();
	flow = bpf_map_lookup_elem(&wag_flows, key);
	if (flow) {
		__sync_fetch_and_add(&flow->count, 1);
		if (now - flow->emitted_ns < wag_event_ns)
			return 0;
		flow->emitted_ns = now;
		count = flow->count;
	} else {
		fresh.emitted_ns = now;
		bpf_map_update_elem(&wag_flows, key, &fresh, BPF_ANY);
	}
	event = wag_event_start(WAG_EVENT_FLOW, now);
	if (!event)
		return 0;
	event->netns = key->netns;
	event->count = count;
	event->src = key->src;
	event->dst = key->frontend;
	event->backend = key->backend;
	event->dport = key->fport;
	event->bport = key->bport;
	event->proto = key->proto;
	event->hook = key->hook;
	wag_event_submit(event);
	return 0;
}

#endif
