/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Who may talk to whom. What is judged is the flow as both ends mean it: the source before any translation, and the
 * destination after it, so that one entry serves both directions, whatever happens to the packets in between.
 *
 * A pod that no policy selects costs nothing here. One that is isolated has its flows in wag_conns; a flow that is not
 * there is looked up: the pod's policies are a set, its peer has a class, and the pair leads to a list of steps over protocol
 * and port (docs/decisions/0012).
 */
#ifndef WAGGLE_POLICY_H
#define WAGGLE_POLICY_H

#include <linux/bpf.h>
#include "access.h"
#include "addr.h"
#include "audit.h"
#include "config.h"
#include "conns.h"
#include "direct.h"
#include "endpoint.h"
#include "judge.h"
#include "open_flows.h"
#include "packet.h"
#include "policy_work.h"

/* Policies have changed: which ends may still open this flow? */
static __noinline __u32 wag_conn_judge(struct wag_packet *packet, struct wag_tuple *key, __u32 opened)
{
	struct wag_policy_work *work = wag_policy_work_get();
	__u32 still = 0;

	if (!packet || !key || !work)
		return 0;
	if (opened & 1 && !wag_policy_judge(packet, key))
		still |= 1;
	if (opened & 2) {
		wag_tuple_reverse(&work->back, key);
		if (!wag_policy_judge(packet, &work->back))
			still |= 2;
	}
	return still;
}

/* The same of a known flow. The name that it was allowed by counts still, whatever time it was for. */
WAG_INLINE void wag_conn_review(struct wag_packet *packet, struct wag_tuple *key, struct wag_conn *conn)
{
	struct wag_policy_work *work = wag_policy_work_get();

	if (!work)
		return;
	work->had = conn->pattern;
	work->pattern = 0;
	conn->may = wag_conn_judge(packet, key, conn->opened);
	conn->pattern = work->pattern;
	work->had = 0;
}

/* What flows are judged by. The end of a trial is a change that nobody needs to write. */
WAG_INLINE __u32 wag_policy_revision(const struct wag_packet *packet, const struct wag_policy_state *state)
{
#ifdef WAG_OWN
	if (packet->own && packet->trial)
		return state->revision ^ (1U << 31);
#endif
	return state->revision;
}

/* The flow, if it is known; judged by the policies of now. */
static __noinline struct wag_conn *wag_conn_find(struct wag_packet *packet, struct wag_policy_work *work)
{
	struct wag_policy_state *state;
	struct wag_conn *conn;
	__u32 zero = 0;

	if (!packet || !work)
		return NULL;
	conn = bpf_map_lookup_elem(&wag_conns, &work->key);
	state = bpf_map_lookup_elem(&wag_policy_state, &zero);
	if (!conn || !state || !wag_conn_lives(conn, work->key.proto, work->now))
		return NULL;
	if (conn->revision != wag_policy_revision(packet, state)) {
		__u32 revision = wag_policy_revision(packet, state);

		barrier(); /* what is read from now on is at least as new */
		if (!state->keep)
			wag_conn_review(packet, &work->key, conn);
		conn->revision = revision;
	}
	return conn;
}

/*
 * A flow that was cut: what is denied is what opened it. A reply that is on its way must not begin it anew, nor may the end
 * that was asked go on with what it had begun to send.
 */
WAG_INLINE int wag_policy_judge_as(struct wag_packet *packet, struct wag_policy_work *work, __u32 opened)
{
	if (opened == 1)
		return wag_policy_judge(packet, &work->key);
	wag_tuple_reverse(&work->back, &work->key);
	return wag_policy_judge(packet, &work->back);
}

enum wag_opener {
	WAG_OPENER_UNKNOWN = 0,
	WAG_OPENER_SENDER = 1,
	WAG_OPENER_OTHER = 2,
};

/* Whose sockets are at the end `addr`? A pod's here, with its own namespace; WAG_NETNS_ID_UNKNOWN: nobody's that can be asked. */
WAG_INLINE int wag_policy_netns(const struct wag_packet *packet, const struct wag_addr *addr)
{
	struct wag_endpoint *local;

#ifdef WAG_OWN
	if (packet->own)
		return wag_addr_equal(addr, wag_own_end(packet)) ? WAG_NETNS_ID_NODE : WAG_NETNS_ID_UNKNOWN;
#endif
	local = wag_endpoint_find(addr);
	return wag_endpoint_is(local, WAG_ENDPOINT_POD) && local->netns > WAG_NETNS_ID_NODE ? local->netns :
											      WAG_NETNS_ID_UNKNOWN;
}

/*
 * Who opened a connection that is not known, of which this is a packet? The sockets of a pod here tell, or the node's where it
 * is its own: one that listens at this port has been asked, and one that is connected where nobody listens has asked. `to`:
 * room for a tuple.
 */
WAG_INLINE enum wag_opener wag_policy_opener(wag_ctx *ctx, const struct wag_packet *packet, const struct wag_tuple *flow,
					     struct wag_tuple *to)
{
	int netns = wag_policy_netns(packet, &flow->src);
	bool sends = netns != WAG_NETNS_ID_UNKNOWN;

	*to = *flow;
	if (sends)
		wag_tuple_reverse(to, flow);
	else
		netns = wag_policy_netns(packet, &flow->dst);
	if (netns == WAG_NETNS_ID_UNKNOWN)
		return WAG_OPENER_UNKNOWN;
	to->sport = 0; /* nobody is connected to that */
	if (wag_socket_takes(ctx, to, netns, 0))
		return sends ? WAG_OPENER_OTHER : WAG_OPENER_SENDER;
	to->sport = sends ? flow->dport : flow->sport;
	if (wag_socket_takes(ctx, to, netns, 1))
		return sends ? WAG_OPENER_SENDER : WAG_OPENER_OTHER;
	return WAG_OPENER_UNKNOWN;
}

/* A flow that is not known: judges it, and remembers it where it may be. Returns enum wag_reason. */
static __noinline int wag_policy_begin(wag_ctx *ctx, struct wag_packet *packet, struct wag_policy_work *work, __u32 end)
{
	enum wag_opener opener = WAG_OPENER_SENDER;
	struct wag_policy_state *state;
	__u32 zero = 0;
	__u32 rule;
	__u64 set;
	int reason;

	if (!packet || !work)
		return WAG_REASON_POLICY_EGRESS;
	state = bpf_map_lookup_elem(&wag_policy_state, &zero);
	work->conn.revision = state ? wag_policy_revision(packet, state) : 0;
	barrier();
	work->pattern = 0;
	if (wag_is_established(packet))
		opener = wag_policy_opener(ctx, packet, &work->flow, &work->back);
	wag_tuple_reverse(&work->back, &work->flow);
	if (opener == WAG_OPENER_OTHER) {
		reason = wag_policy_judge(packet, &work->back);
		end = 3 - end;
	} else {
		reason = wag_policy_judge(packet, &work->flow);
	}
	if (reason && opener == WAG_OPENER_UNKNOWN) {
		/*
		 * In the middle of a connection of which nobody knows any more who opened it. Who may be asked at this
		 * port may answer.
		 */
		set = packet->policy;
		rule = packet->rule;
		packet->audit = 0; /* of a direction that does not count */
		if (!wag_policy_judge(packet, &work->back)) {
			reason = WAG_REASON_NONE;
			end = 3 - end;
		} else {
			packet->policy = set;
			packet->rule = rule;
		}
	}
	if (reason)
		return reason;
	work->conn.seen_ns = work->now;
	work->conn.opened = work->conn.may = end;
	work->conn.pattern = work->pattern;
	bpf_map_update_elem(&wag_conns, &work->key, &work->conn, BPF_ANY);
	return WAG_REASON_NONE;
}

/* May the flow of work->key go on, or begin with this packet? `end`: who sends it. Returns enum wag_reason. */
WAG_INLINE int wag_policy_go_on(wag_ctx *ctx, struct wag_packet *packet, struct wag_policy_work *work, __u32 end)
{
	struct wag_conn *conn = wag_conn_find(packet, work);

	if (wag_conn_cut(conn, packet, work->now))
		return wag_policy_judge_as(packet, work, conn->opened);
	return wag_conn_open(conn, work->now) ? WAG_REASON_NONE : wag_policy_begin(ctx, packet, work, end);
}

/*
 * A flow that the server has opened, with an answer to something of long ago, say, is the pod's too from the moment it asks.
 * `end`: the pod.
 */
static __noinline int wag_policy_question(struct wag_packet *packet, struct wag_policy_work *work, __u32 end)
{
	struct wag_conn *conn;

	if (!packet || !work)
		return 0;
	conn = bpf_map_lookup_elem(&wag_conns, &work->key);
	if (!conn || conn->opened & end || wag_policy_judge(packet, &work->flow))
		return 0;
	conn->opened |= end;
	conn->may |= end;
	return 0;
}

/* Is it an answer to what a pod has asked, whose policies accept names? Then wag_finish will read it. `end`: its source. */
static __noinline int wag_policy_answer(struct wag_packet *packet, struct wag_policy_work *work, __u32 end)
{
	struct wag_endpoint *asker;
	struct wag_conn *conn;

	if (!packet || !work || packet->later_fragment)
		return 0;
	if (work->flow.proto != IPPROTO_UDP && work->flow.proto != IPPROTO_TCP)
		return 0;
	asker = wag_endpoint_find(&work->flow.dst);
	if (!wag_endpoint_is(asker, WAG_ENDPOINT_POD) || !(asker->egress_policy & WAG_POLICY_NAMED) ||
	    asker->egress_policy == WAG_POLICY_PENDING)
		return 0;
	conn = bpf_map_lookup_elem(&wag_conns, &work->key);
	if (!conn || !(conn->opened & (3 - end)))
		return 0;
	work->asker = asker->egress_policy;
	work->asker_ifindex = asker->ifindex;
	packet->answers = 1;
	return 0;
}

/*
 * Is it an error that passes where the packet does that it is about? That one was sent by whoever is told now. Routers
 * complain about what was sent to others; pods of this node, which are none, about what was sent to themselves.
 */
WAG_INLINE bool wag_policy_complains(const struct wag_packet *packet, const struct wag_policy_work *work,
				     const struct wag_tuple *to)
{
	if (!packet->complains || !wag_addr_equal(&work->inner.src, &to->dst))
		return false;
	return wag_addr_equal(&work->inner.dst, &packet->tuple.src) ||
	       !wag_endpoint_is(wag_endpoint_find(&packet->tuple.src), WAG_ENDPOINT_POD);
}

/* What is judged: the source as it was sent, and the destination as it will be. */
WAG_INLINE void wag_policy_flow(struct wag_policy_work *work, const struct wag_packet *packet, const struct wag_tuple *to)
{
	work->flow = packet->tuple;
	work->flow.dst = to->dst;
	work->flow.dport = to->dport;
}

/*
 * May the packet go on to `to`, where it is about to be sent? Returns enum wag_reason. For wag_admits alone. A global function,
 * as wag_parse is.
 */
__noinline int wag_policy_admit(wag_ctx *ctx, struct wag_packet *packet, struct wag_tuple *to)
{
	struct wag_policy_work *work = wag_policy_work_get();
	struct wag_conn *conn;
	int reason;
	__u32 end;

	if (!packet || !to || !work)
		return WAG_REASON_POLICY_EGRESS;
	if (wag_addr_equal(&packet->tuple.src, &to->dst))
		return WAG_REASON_NONE;
	work->now = bpf_ktime_get_coarse_ns();
	if (wag_open_flow_find(packet, to, work))
		return WAG_REASON_NONE;
	if (wag_policy_complains(packet, work, to)) {
		wag_conn_key(&work->key, &work->inner);
		conn = wag_conn_find(packet, work);
		if (conn ? wag_conn_open(conn, work->now) : wag_conn_judge(packet, &work->key, 3))
			return WAG_REASON_NONE;
	}
	wag_policy_flow(work, packet, to);
	end = wag_conn_key(&work->key, &work->flow);
	packet->audit = 0;
	reason = wag_policy_go_on(ctx, packet, work, end);
	if (reason)
		return reason;
	wag_open_flow_note(work);
	if (work->flow.sport == bpf_htons(WAG_DNS_PORT))
		wag_policy_answer(packet, work, end);
	else if (work->flow.dport == bpf_htons(WAG_DNS_PORT))
		wag_policy_question(packet, work, end);
	wag_policy_audits(packet);
	return WAG_REASON_NONE;
}

#ifndef WAG_XDP

/* As wag_policy_admit, where nothing is known of one of the ends: no flow of it can be. */
static __noinline int wag_policy_pending(struct wag_packet *packet, struct wag_tuple *to)
{
	struct wag_policy_work *work = wag_policy_work_get();

	if (!packet || !to || !work)
		return WAG_REASON_POLICY_PENDING;
	if (wag_addr_equal(&packet->tuple.src, &to->dst))
		return WAG_REASON_NONE;
	wag_policy_flow(work, packet, to);
	return wag_policy_judge(packet, &work->flow);
}

#endif

/* What of a packet's sender matters to policies, where it is a pod of this node. */
WAG_INLINE void wag_policy_sender(struct wag_packet *packet, const struct wag_endpoint *from)
{
	packet->isolated = wag_is_isolated(from);
	packet->pending = packet->isolated && from->egress_policy == WAG_POLICY_PENDING;
}

/*
 * The same, asked by everything that delivers: once for a packet. A pod without policies, talking to one without any, is let
 * pass after looking at the two entries that say where they are. `dest`: the destination's, NULL where it is elsewhere.
 */
WAG_INLINE enum wag_reason wag_admits(wag_ctx *ctx, struct wag_packet *packet, struct wag_tuple *to,
				      const struct wag_endpoint *dest)
{
#ifdef WAG_XDP
	return WAG_REASON_NONE; /* it brings nothing to pods */
#else
	bool isolated = wag_is_isolated(dest);
	enum wag_reason reason;

	if (packet->admitted || (!packet->isolated && !isolated))
		return WAG_REASON_NONE;
	/* what an earlier pod with its address had, is not a new one's */
	if (packet->pending || (isolated && dest->ingress_policy == WAG_POLICY_PENDING))
		reason = wag_policy_pending(packet, to);
	else
		reason = wag_policy_admit(ctx, packet, to);
	packet->admitted = !reason;
	return reason;
#endif
}

#endif
