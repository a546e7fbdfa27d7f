/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What is reported of packets: drops, verdicts of policies, and flows that begin without a Service. Of those a TCP SYN, an
 * SCTP INIT, and the first datagram or echo for a while between two ends; their source ports are not told apart.
 */
#ifndef WAGGLE_REPORT_H
#define WAGGLE_REPORT_H

#include <linux/bpf.h>
#include "access.h"
#include "endpoint.h"
#include "event.h"
#include "packet.h"
#include "packet_event.h"
#include "policy.h"

/* Whose policies refuse the packet? */
WAG_INLINE enum wag_direction wag_reason_direction(enum wag_reason reason)
{
	switch (reason) {
	case WAG_REASON_POLICY_INGRESS:
	case WAG_REASON_NODE_POLICY_INGRESS:
		return WAG_DIRECTION_INGRESS;
	case WAG_REASON_POLICY_EGRESS:
	case WAG_REASON_NODE_POLICY_EGRESS:
		return WAG_DIRECTION_EGRESS;
	default:
		return WAG_DIRECTION_NONE;
	}
}

static __noinline int wag_report_drop(wag_ctx *ctx, struct wag_packet *packet, enum wag_outcome outcome)
{
	enum wag_direction direction;
	struct wag_event *event;

	if (!packet)
		return 0;
	wag_count_drop(packet->reason, packet->hook & (WAG_HOOK_MAX - 1));
	direction = wag_reason_direction(packet->reason);
	if (direction)
		wag_count_denial(packet->policy, packet->rule, direction, outcome);
	event = wag_packet_event(packet, direction ? WAG_EVENT_POLICY : WAG_EVENT_DROP, outcome);
	if (!event)
		return 0;
#ifdef WAG_XDP
	event->ifindex = ctx->ingress_ifindex;
#else
	event->ifindex = ctx->ifindex;
#endif
	event->reason = packet->reason;
	if (direction) {
		event->policy = packet->policy;
		event->rule = packet->rule;
		event->direction = direction;
		wag_policy_judged(event, packet);
	}
	wag_event_submit(event);
	return 0;
}

#ifndef WAG_XDP

#define WAG_SEEN 256
#define WAG_SEEN_NS 1000000000ULL

struct wag_seen {
	__u64 tag;
	__u64 time_ns;
};

/* Key: some bits of the tag. Programs alone. Ends between which a datagram passed this CPU within the last second: they cost no look-up in wag_flows. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_seen);
	__uint(max_entries, WAG_SEEN);
} wag_seen SEC(".maps");

WAG_INLINE __u64 wag_tag_mix(__u64 hash, __u64 value)
{
	hash = (hash ^ value) * 0x9e3779b97f4a7c15ULL;
	return hash ^ (hash >> 29);
}

/* Stands for all flows from `src` to a port of `dst`. */
WAG_INLINE __u64 wag_tag(const struct wag_addr *src, const struct wag_addr *dst, __be16 port, __u8 proto)
{
	__u64 hash = wag_tag_mix(src->half[0], src->half[1]);

	hash = wag_tag_mix(wag_tag_mix(hash, dst->half[0]), dst->half[1]);
	return wag_tag_mix(hash, (__u64)proto << 16 | port);
}

WAG_INLINE struct wag_seen *wag_seen_slot(__u64 tag)
{
	__u32 slot = tag & (WAG_SEEN - 1);

	return bpf_map_lookup_elem(&wag_seen, &slot);
}

/* Has a datagram of these ends passed here a moment ago, in either direction? From now on one of this direction has. */
WAG_INLINE bool wag_seen_lately(const struct wag_tuple *tuple, __u64 now)
{
	__u64 tag = wag_tag(&tuple->src, &tuple->dst, tuple->dport, tuple->proto);
	struct wag_seen *seen = wag_seen_slot(tag);

	if (seen && seen->tag == tag && now - seen->time_ns < WAG_SEEN_NS)
		return true;
	if (tuple->proto == IPPROTO_UDP) {
		__u64 other = wag_tag(&tuple->dst, &tuple->src, tuple->sport, tuple->proto);
		struct wag_seen *asked = wag_seen_slot(other);

		if (asked && asked->tag == other && now - asked->time_ns < WAG_SEEN_NS)
			return true;
	}
	if (seen) {
		seen->tag = tag;
		seen->time_ns = now;
	}
	return false;
}

/* Is a flow of datagrams under way? From now on it is for a while, if it was. */
WAG_INLINE bool wag_flow_goes_on(const struct wag_flow_key *key, __u64 now)
{
	struct wag_flow *flow = bpf_map_lookup_elem(&wag_flows, key);
	__u64 idle;

	if (!flow)
		return false;
	idle = now - flow->seen_ns;
	flow->seen_ns = now;
	return (__s64)idle < (__s64)(wag_udp_seconds * 1000000000ULL);
}

/* A packet by which a flow without a Service may begin. A function of its own, so that keys are not on the stack of all else. */
static __noinline int wag_direct_record(struct wag_packet *packet)
{
	struct wag_flow_key key = {};
	struct wag_tuple *tuple;
	__u64 now = 0; /* of datagrams */

	if (!packet)
		return 0;
	tuple = &packet->tuple;
	if (tuple->proto == IPPROTO_UDP || packet->is_icmp) {
		now = bpf_ktime_get_coarse_ns();
		if (wag_seen_lately(tuple, now))
			return 0;
		if (tuple->proto == IPPROTO_UDP) { /* an answer? */
			key.src = tuple->dst;
			key.frontend = tuple->src;
			key.fport = tuple->sport;
			key.proto = tuple->proto;
			if (wag_flow_goes_on(&key, now))
				return 0;
		}
	}
	if (packet->hook == WAG_HOOK_POD_INGRESS &&
	    !wag_endpoint_is(wag_endpoint_find(&tuple->src), WAG_ENDPOINT_NODE))
		return 0; /* another hook has seen it */
	key.src = tuple->src;
	key.frontend = tuple->dst;
	key.fport = tuple->dport;
	key.proto = tuple->proto;
	if (now && wag_flow_goes_on(&key, now))
		return 0;
	return wag_flow_record(&key, packet->hook, tuple->sport);
}

/* Does a packet begin something, from or to a pod, that has no Service and that no other hook of this node reports? */
WAG_INLINE bool wag_begins_directly(const struct wag_packet *packet, enum wag_verdict verdict)
{
	if (wag_events != WAG_EVENTS_OF_ALL || !packet->begins || packet->translated)
		return false;
	switch (packet->hook) {
	case WAG_HOOK_POD_EGRESS:
		return verdict == WAG_TO_POD || verdict == WAG_TO_WIRE ||
		       (verdict == WAG_PASS && !wag_addr_stays_on_link(&packet->tuple.dst));
	case WAG_HOOK_POD_INGRESS:
		return verdict == WAG_PASS || verdict == WAG_NEXT;
	case WAG_HOOK_NODE_INGRESS:
		return verdict == WAG_TO_POD;
	default:
		return false;
	}
}

#endif
#endif
