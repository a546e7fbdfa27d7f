/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What every event about a packet says of it. */
#ifndef WAGGLE_PACKET_EVENT_H
#define WAGGLE_PACKET_EVENT_H

#include <linux/bpf.h>
#include "event.h"
#include "packet.h"

/* An event about a packet as it is now. NULL where none is due. */
WAG_INLINE struct wag_event *wag_packet_event(const struct wag_packet *packet, enum wag_event_kind kind,
					      enum wag_outcome outcome)
{
	struct wag_event *event = wag_event_start(kind, bpf_ktime_get_ns());

	if (!event)
		return NULL;
	event->src = packet->tuple.src;
	event->dst = packet->tuple.dst;
	event->sport = packet->tuple.sport;
	event->dport = packet->tuple.dport;
	event->proto = packet->tuple.proto;
	event->hook = packet->hook;
	event->verdict = outcome;
	return event;
}

#endif
