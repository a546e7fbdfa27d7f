/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Counters and events. A drop is always counted, and offered to the ring buffer. A flow that begins is added to the
 * counter of all flows between the same ends; these emit an event when they are new and then at most once per
 * wag_event_ns, with the count, so that the cost does not grow with the connection rate. Of each kind of event, a CPU
 * emits so many a second: a flood costs neither the reader nor the ring buffer anything, and what was left out is
 * counted, here and in the next event. Nothing wakes the reader: it polls.
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
	WAG_EVENT_POLICY = 3, /* policies dropped it, or would have, were those that are audited enforced */
	WAG_EVENT_MAX = 4,
};

/* What became of a packet, or of a flow that it begins. */
enum wag_outcome {
	WAG_OUTCOME_FORWARDED = 1,
	WAG_OUTCOME_DROPPED = 2,
	WAG_OUTCOME_REJECTED = 3, /* dropped, and the sender was told */
	WAG_OUTCOME_AUDIT = 4,    /* forwarded; would be dropped were audited policies enforced */
};

/* Whose policies decided: those of the pod that is asked, or of the one that asks. */
enum wag_direction {
	WAG_DIRECTION_NONE = 0,
	WAG_DIRECTION_INGRESS = 1,
	WAG_DIRECTION_EGRESS = 2,
};

/* What wag_events may be. */
enum wag_events_of {
	WAG_EVENTS_OF_OFF = 0,      /* drops alone */
	WAG_EVENTS_OF_SERVICES = 1, /* and translations of Services */
	WAG_EVENTS_OF_ALL = 2,      /* and everything else that begins at or towards a pod */
};

/* Emitted through wag_events_rb. Ports are big-endian, as on the wire. */
struct wag_event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 netns;   /* cookie of the client's network namespace; 0 where only packets are seen */
	__u64 count;   /* flow: how often it has begun so far */
	__u64 policy;  /* policy: the set of policies that decided */
	struct wag_addr src;
	struct wag_addr dst;      /* drop, and flow without a Service: destination; flow: frontend */
	struct wag_addr backend;  /* flow: chosen backend; policy: the destination that was judged; zeros where it is `dst` */
	__be16 sport;
	__be16 dport;
	__be16 bport;
	__u8 proto;
	__u8 kind;      /* enum wag_event_kind */
	__u8 hook;      /* enum wag_hook */
	__u8 reason;    /* enum wag_reason */
	__u8 verdict;   /* enum wag_outcome */
	__u8 direction; /* policy: enum wag_direction */
	__u32 ifindex;
	__u32 rule;       /* policy: the rule that decided; 0: none did, the pod is isolated */
	__u32 suppressed; /* events of this kind that this CPU has left out since its last one */
};

/* All that begins between two ends. Of flows without a Service `backend`, `bport` and `hook` are zeros. */
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
	__u64 seen_ns;    /* of datagrams without a Service: about when the last one came */
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
	WAG_COUNTER_NAME_LEARNED = 6,    /* addresses of names that DNS answers gave */
	WAG_COUNTER_NAME_ENTRY = 7,      /* those that made an entry of their own in wag_names */
	WAG_COUNTER_NAME_SLOT = 8,       /* a pattern that made room for another one of the same address */
	WAG_COUNTER_NAME_UNREADABLE = 9, /* DNS answers that could not be read to their end */
	WAG_COUNTER_NAME_REFUSED = 10,   /* addresses of a pod that was told too many within a minute */
	WAG_COUNTER_MAX = 16,
};

/* Key: enum wag_counter. Programs write, the agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, WAG_COUNTER_MAX);
} wag_counters SEC(".maps");

/* struct wag_event records. Programs write, the agent reads. 1 MiB: about 9,000 events between two polls. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} wag_events_rb SEC(".maps");

/* Key: client, Service or destination, backend. Programs write, the agent reads. Only a view: eviction costs an extra event. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct wag_flow_key);
	__type(value, struct wag_flow);
	__uint(max_entries, 16384);
} wag_flows SEC(".maps");

/* Key: enum wag_hook. Programs write, the agent reads. Every flow that began there, with or without an event. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, WAG_HOOK_MAX);
} wag_flow_counts SEC(".maps");

/* A token bucket, as the time at which it would be full. */
struct wag_bucket {
	__u64 full_ns;
	__u64 left_out; /* events that found it empty, all of them */
	__u32 since;    /* those since the last event */
	__u32 pad;
};

/* Key: enum wag_event_kind. Programs write, the agent reads. How many more events a CPU may emit now. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_bucket);
	__uint(max_entries, WAG_EVENT_MAX);
} wag_buckets SEC(".maps");

struct wag_denial_key {
	__u64 policy; /* set of policies; 0: all that found this table full */
	__u32 rule;
	__u8 direction; /* enum wag_direction */
	__u8 verdict;   /* enum wag_outcome */
	__u16 pad;
};

/* Key: who decided, and how. Programs count, the agent reads and removes. Every packet that policies drop or would. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_denial_key);
	__type(value, __u64);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_denials SEC(".maps");

WAG_INLINE void wag_count(__u32 index)
{
	__u64 *value = bpf_map_lookup_elem(&wag_counters, &index);

	if (value)
		(*value)++;
}

/* Policies have decided against a packet, or would have: counts it. */
WAG_INLINE void wag_count_denial(__u64 policy, __u32 rule, enum wag_direction direction, enum wag_outcome outcome)
{
	struct wag_denial_key key = { .policy = policy, .rule = rule, .direction = direction, .verdict = outcome };
	__u64 *count = bpf_map_lookup_elem(&wag_denials, &key), one = 1;

	if (!count && !bpf_map_update_elem(&wag_denials, &key, &one, BPF_NOEXIST))
		return;
	if (!count) { /* another CPU was faster, or there is no room */
		count = bpf_map_lookup_elem(&wag_denials, &key);
		if (!count) {
			key.policy = 0;
			key.rule = 0;
			count = bpf_map_lookup_elem(&wag_denials, &key);
		}
		if (!count) {
			bpf_map_update_elem(&wag_denials, &key, &one, BPF_NOEXIST);
			return;
		}
	}
	__sync_fetch_and_add(count, 1);
}

#define WAG_BURST_NS 1000000000ULL /* so much time's worth of events may leave at once */

/* May this CPU emit an event of this kind? Takes nothing out of the bucket; what may not is counted. */
WAG_INLINE struct wag_bucket *wag_event_allowed(enum wag_event_kind kind, __u64 now)
{
	__u32 key = kind;
	struct wag_bucket *bucket = bpf_map_lookup_elem(&wag_buckets, &key);

	if (!bucket)
		return NULL;
	if (bucket->full_ns > now + WAG_BURST_NS - wag_event_gap_ns) {
		bucket->left_out++;
		bucket->since++;
		return NULL;
	}
	return bucket;
}

/*
 * A zeroed event in the ring buffer, to be filled and submitted. NULL where there were too many of them lately, or where
 * there is no room; both are counted.
 */
WAG_INLINE struct wag_event *wag_event_start(enum wag_event_kind kind, __u64 now)
{
	struct wag_bucket *bucket = wag_event_allowed(kind, now);
	struct wag_event *event;

	if (!bucket)
		return NULL;
	event = bpf_ringbuf_reserve(&wag_events_rb, sizeof(*event), 0);
	if (!event) {
		wag_count(WAG_COUNTER_EVENTS_LOST);
		return NULL;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->kind = kind;
	event->time_ns = now;
	event->suppressed = bucket->since;
	bucket->since = 0;
	bucket->full_ns = (bucket->full_ns > now ? bucket->full_ns : now) + wag_event_gap_ns;
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

/*
 * Adds a beginning to its flow and emits an event when one is due. `key` must be zeroed where unused. `hook`: where it is
 * seen; `sport`: the client's port, where it is known. While there are too many new flows, none is remembered.
 */
static __noinline int wag_flow_record(struct wag_flow_key *key, __u32 hook, __be16 sport)
{
	struct wag_flow fresh = { .count = 1 };
	struct wag_event *event;
	struct wag_flow *flow;
	__u64 count = 1, now;
	__u64 *total;

	if (!key)
		return 0;
	hook &= WAG_HOOK_MAX - 1;
	total = bpf_map_lookup_elem(&wag_flow_counts, &hook);
	if (total)
		(*total)++;
	now = bpf_ktime_get_ns();
	flow = bpf_map_lookup_elem(&wag_flows, key);
	if (flow) {
		__sync_fetch_and_add(&flow->count, 1);
		if (now - flow->emitted_ns < wag_event_ns)
			return 0;
		flow->emitted_ns = now;
		count = flow->count;
	} else {
		if (!wag_event_allowed(WAG_EVENT_FLOW, now))
			return 0;
		fresh.emitted_ns = now;
		fresh.seen_ns = now;
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
	event->sport = sport;
	event->dport = key->fport;
	event->bport = key->bport;
	event->proto = key->proto;
	event->hook = hook;
	event->verdict = WAG_OUTCOME_FORWARDED;
	wag_event_submit(event);
	return 0;
}

#endif
