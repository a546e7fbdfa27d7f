/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* May a flow begin? What becomes of one that has begun is in policy.h. */
#ifndef WAGGLE_JUDGE_H
#define WAGGLE_JUDGE_H

#include <linux/bpf.h>
#include "addr.h"
#include "audit.h"
#include "endpoint.h"
#include "names.h"
#include "node_policy.h"
#include "packet.h"
#include "policy_tables.h"
#include "policy_work.h"

WAG_INLINE bool wag_is_isolated(const struct wag_endpoint *endpoint)
{
	return wag_endpoint_is(endpoint, WAG_ENDPOINT_POD) && (endpoint->ingress_policy | endpoint->egress_policy);
}

/*
 * The class of a peer, which has the entry `endpoint`. The node's own addresses count where they cannot be made up: in what its
 * stack sends, and in what pods send to it.
 */
WAG_INLINE __u64 wag_class_seen(const struct wag_packet *packet, const struct wag_addr *addr,
				const struct wag_endpoint *endpoint)
{
	bool self = wag_endpoint_is(endpoint, WAG_ENDPOINT_NODE);

	return self && packet->hook == WAG_HOOK_NODE_INGRESS ? WAG_CLASS_UNKNOWN : wag_class_of(addr, self);
}

/* Where nobody knows yet what a pod may do: to and from this node it always may. */
WAG_INLINE int wag_policy_pends(const struct wag_packet *packet, const struct wag_endpoint *peer)
{
	return wag_endpoint_is(peer, WAG_ENDPOINT_NODE) && packet->hook != WAG_HOOK_NODE_INGRESS ?
		       WAG_REASON_NONE :
		       WAG_REASON_POLICY_PENDING;
}

/*
 * No rule of the set has allowed it so far, but names may; or it is allowed, and names may say that audited policies would allow
 * it too. Notes what wag_names_decide needs.
 */
WAG_INLINE int wag_names_ask(__u64 set, const struct wag_policy_step *step, __u32 place)
{
	struct wag_policy_work *work = wag_policy_work_get();

	if (!work)
		return step->verdict;
	work->query.set = set;
	work->query.peer = WAG_NAME_CLASS | (step->verdict & WAG_POLICY_AUDIT ? WAG_NAME_STRICT : 0);
	work->query.place = place;
	work->query.verdict = step->verdict;
	work->query.admin = step->admin;
	work->query.baseline = step->baseline;
	return step->verdict | WAG_POLICY_ASK_NAMES;
}

/* What one set says of a peer and a port: enum wag_policy_flag. Fills in who says so. */
static __noinline int wag_policy_ask(struct wag_packet *packet, __u64 set, __u64 class, __u32 place)
{
	struct wag_policy_key key = { .set = set, .peer = class };
	struct wag_policy_step *step;
	struct wag_policy_run *run;

	if (!packet)
		return 0;
	packet->policy = set;
	packet->rule = 0;
	run = bpf_map_lookup_elem(&wag_policy, &key);
	if (!run) {
		key.peer = WAG_CLASS_ANY;
		run = bpf_map_lookup_elem(&wag_policy, &key);
	}
	if (!run || !run->count)
		return WAG_POLICY_LOST;
	step = wag_policy_find(run, place);
	if (!step)
		return WAG_POLICY_LOST;
	packet->rule = step->rule;
	if (set & WAG_POLICY_NAMED && step->verdict != WAG_POLICY_ALLOW)
		return wag_names_ask(set, step, place);
	return step->verdict;
}

#ifdef WAG_OWN

/* The end of the node's own packet that the node is. */
WAG_INLINE const struct wag_addr *wag_own_end(const struct wag_packet *packet)
{
	return packet->hook == WAG_HOOK_NODE_INGRESS ? &packet->tuple.dst : &packet->tuple.src;
}

/*
 * As wag_policy_judge, of the node's own traffic. Where the tables know nothing of its set, it passes: who could put them right
 * may have no other way to this node.
 */
WAG_INLINE int wag_own_judge(struct wag_packet *packet, struct wag_tuple *flow)
{
	struct wag_node_policy *own = wag_node_policy_find();
	const struct wag_addr *peer;
	bool comes;
	int verdict;
	__u64 set;

	if (!own)
		return WAG_REASON_NONE;
	comes = wag_addr_equal(&flow->dst, wag_own_end(packet));
	peer = comes ? &flow->src : &flow->dst;
	if (packet->trial)
		set = comes ? own->trial_ingress : own->trial_egress;
	else
		set = comes ? own->ingress : own->egress;
	if (!set)
		return WAG_REASON_NONE;
	verdict = wag_policy_ask(packet, set, wag_class_of(peer, 0), wag_policy_place(flow->proto, flow->dport));
	if (!(verdict & (WAG_POLICY_ALLOW | WAG_POLICY_LOST)))
		return comes ? WAG_REASON_NODE_POLICY_INGRESS : WAG_REASON_NODE_POLICY_EGRESS;
	if (verdict & WAG_POLICY_AUDIT)
		wag_policy_note(packet, comes ? WAG_DIRECTION_INGRESS : WAG_DIRECTION_EGRESS);
	return WAG_REASON_NONE;
}

#endif

/*
 * Does the set of work->query accept names of a pattern before anything else was decided? As wag_policy_find, with its
 * bounds in memory: what the verifier does not follow, it need not tell apart.
 */
WAG_INLINE bool wag_name_decides(struct wag_packet *packet, struct wag_policy_work *work, __u32 pattern)
{
	struct wag_name_query *query = &work->query;
	struct wag_policy_step *step;
	struct wag_policy_run *run;
	int i;

	query->key.set = query->set;
	query->key.peer = query->peer | pattern;
	run = bpf_map_lookup_elem(&wag_policy, &query->key);
	if (!run || !run->count)
		return false;
	query->low = run->first;
	query->high = run->first + run->count - 1;
	for (i = 0; i < WAG_POLICY_HALVINGS && query->low < query->high; i++) {
		query->middle = query->low + (query->high - query->low + 1) / 2;
		step = bpf_map_lookup_elem(&wag_policy_steps, &query->middle);
		if (!step)
			return false;
		if (step->start <= query->place)
			query->low = query->middle;
		else
			query->high = query->middle - 1;
	}
	step = bpf_map_lookup_elem(&wag_policy_steps, &query->low);
	if (!step || !(step->verdict & WAG_POLICY_ALLOW) ||
	    (step->admin >= query->admin && step->baseline >= query->baseline))
		return false;
	work->pattern = pattern;
	packet->rule = step->rule;
	return true;
}

/* The same verdict, unless the destination has a name that decides. A global function, so that it is verified once. */
__noinline int wag_names_decide(struct wag_packet *packet, struct wag_tuple *flow)
{
	struct wag_policy_work *work = wag_policy_work_get();
	struct wag_endpoint *from;
	struct wag_name *name;
	__u32 i;

	if (!packet || !flow || !work)
		return 0;
	from = wag_endpoint_find(&flow->src);
	if (!from)
		return 0;
	work->name.ifindex = from->ifindex;
	work->name.addr = flow->dst;
	if (work->had && wag_name_decides(packet, work, work->had))
		return WAG_POLICY_ALLOW;
	name = bpf_map_lookup_elem(&wag_names, &work->name);
	work->query.now = wag_seconds();
	for (i = 0; name && i < WAG_NAME_SLOTS; i++) {
		/* of a flow that lives by a name, every one counts that was learned */
		if (name->pattern[i] && (work->had || (__s32)(name->until[i] - work->query.now) >= 0) &&
		    wag_name_decides(packet, work, name->pattern[i]))
			return WAG_POLICY_ALLOW;
	}
	return work->query.verdict;
}

/*
 * May this flow begin? Both ends are asked, where they are pods of this node. Returns enum wag_reason, and says in the packet
 * who decided. A global function, as wag_parse is.
 */
__noinline int wag_policy_judge(struct wag_packet *packet, struct wag_tuple *flow)
{
	struct wag_endpoint *from, *to;
	__u32 place;
	int verdict;

	if (!packet || !flow)
		return WAG_REASON_POLICY_EGRESS;
#ifdef WAG_OWN
	if (packet->own)
		return wag_own_judge(packet, flow);
#endif
	place = wag_policy_place(flow->proto, flow->dport);
	from = wag_endpoint_find(&flow->src);
	to = wag_endpoint_find(&flow->dst);
	if (wag_endpoint_is(from, WAG_ENDPOINT_POD) && from->egress_policy) {
		if (from->egress_policy == WAG_POLICY_PENDING)
			return wag_policy_pends(packet, to);
		verdict = wag_policy_ask(packet, from->egress_policy, wag_class_seen(packet, &flow->dst, to), place);
		if (verdict & WAG_POLICY_ASK_NAMES)
			verdict = wag_names_decide(packet, flow);
		if (!(verdict & WAG_POLICY_ALLOW))
			return WAG_REASON_POLICY_EGRESS;
		if (verdict & WAG_POLICY_AUDIT)
			wag_policy_note(packet, WAG_DIRECTION_EGRESS);
	}
	if (wag_endpoint_is(to, WAG_ENDPOINT_POD) && to->ingress_policy) {
		if (to->ingress_policy == WAG_POLICY_PENDING)
			return wag_policy_pends(packet, from);
		verdict = wag_policy_ask(packet, to->ingress_policy, wag_class_seen(packet, &flow->src, from), place);
		if (!(verdict & WAG_POLICY_ALLOW))
			return WAG_REASON_POLICY_INGRESS;
		if (verdict & WAG_POLICY_AUDIT)
			wag_policy_note(packet, WAG_DIRECTION_INGRESS);
	}
	return WAG_REASON_NONE;
}

#endif
