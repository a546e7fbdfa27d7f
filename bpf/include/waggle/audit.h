/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What audited policies would have dropped. */
#ifndef WAGGLE_AUDIT_H
#define WAGGLE_AUDIT_H

#include <linux/bpf.h>
#include "event.h"
#include "packet.h"
#include "packet_event.h"
#include "policy_work.h"

/* The set that was asked last allows it, and would not, were the audited policies enforced. */
static __noinline int wag_policy_note(struct wag_packet *packet, __u32 direction)
{
	struct wag_policy_work *work = wag_policy_work_get();
	__u32 index = direction == WAG_DIRECTION_EGRESS;

	if (!packet || !work)
		return 0;
	work->audit_policy[index] = packet->policy;
	work->audit_rule[index] = packet->rule;
	packet->audit |= direction;
	return 0;
}

/* In an event about the packet: which destination was judged, where it is not the one that the packet has. */
WAG_INLINE void wag_policy_judged(struct wag_event *event, const struct wag_packet *packet)
{
	struct wag_policy_work *work = wag_policy_work_get();

	if (!work || (wag_addr_equal(&work->flow.dst, &packet->tuple.dst) && work->flow.dport == packet->tuple.dport))
		return;
	event->backend = work->flow.dst;
	event->bport = work->flow.dport;
}

/* Counts and emits what audited policies of one direction would have dropped. */
static __noinline int wag_report_audit(struct wag_packet *packet, __u32 direction)
{
	struct wag_policy_work *work = wag_policy_work_get();
	__u32 index = direction == WAG_DIRECTION_EGRESS;
	struct wag_event *event;

	if (!packet || !work)
		return 0;
	wag_count_denial(work->audit_policy[index], work->audit_rule[index], direction, WAG_OUTCOME_AUDIT);
	event = wag_packet_event(packet, WAG_EVENT_POLICY, WAG_OUTCOME_AUDIT);
	if (!event)
		return 0;
	if (packet->own)
		event->reason = direction == WAG_DIRECTION_EGRESS ? WAG_REASON_NODE_POLICY_EGRESS :
								    WAG_REASON_NODE_POLICY_INGRESS;
	else
		event->reason = direction == WAG_DIRECTION_EGRESS ? WAG_REASON_POLICY_EGRESS : WAG_REASON_POLICY_INGRESS;
	event->direction = direction;
	event->policy = work->audit_policy[index];
	event->rule = work->audit_rule[index];
	wag_policy_judged(event, packet);
	wag_event_submit(event);
	return 0;
}

/* The packet passes: would it, were the audited policies enforced? Once for a flow, and again when policies have changed. */
WAG_INLINE void wag_policy_audits(struct wag_packet *packet)
{
	if (packet->audit & WAG_DIRECTION_EGRESS)
		wag_report_audit(packet, WAG_DIRECTION_EGRESS);
	if (packet->audit & WAG_DIRECTION_INGRESS)
		wag_report_audit(packet, WAG_DIRECTION_INGRESS);
}

#endif
