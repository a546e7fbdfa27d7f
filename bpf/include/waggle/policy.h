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
#include <linux/in.h>
#include "access.h"
#include "addr.h"
#include "config.h"
#include "direct.h"
#include "endpoint.h"
#include "event.h"
#include "names.h"
#include "nat_table.h"
#include "node_policy.h"
#include "packet.h"

/* Sets that stand for something else than policies. */
#define WAG_POLICY_NONE 0ULL      /* no policy selects the pod: everything passes */
#define WAG_POLICY_PENDING (~0ULL) /* nobody has said yet which do: nothing passes, but to and from this node */
#define WAG_POLICY_NAMED 1ULL     /* a bit of other sets: there are rules about domain names */

#define WAG_CLASS_UNKNOWN 0ULL /* nothing that a policy asks for tells the address apart */
#define WAG_CLASS_SELF 1ULL    /* this node */
#define WAG_CLASS_ANY (~0ULL)  /* of a set: every class that has no entry */

enum wag_policy_flag {
	WAG_POLICY_ALLOW = 1,
	WAG_POLICY_AUDIT = 2, /* allowed; it would not be, were the audited policies enforced */
	WAG_POLICY_LOST = 8,  /* in no step: the tables know nothing of the set */
};

struct wag_class_range_key {
	__u32 prefix; /* bits that count: 96 + 24 for a.b.c.0/24 */
	__u8 addr[16];
};

struct wag_policy_key {
	__u64 set;
	__u64 peer; /* its class */
};

/* A run of wag_policy_steps. */
struct wag_policy_run {
	__u32 first;
	__u32 count;
};

/* From `start` up to the start of the next one. */
struct wag_policy_step {
	__u32 start; /* enum wag_policy_protocol << 16 | port */
	__u32 rule;  /* who says so; 0: no rule does */
	__u8 verdict; /* enum wag_policy_flag */
	__u8 pad[3];
	/*
	 * Of a set with domain names: where in the order of its rules each tier ended; of a name: where the first rule
	 * stands that accepts it. The name decides where it stands before the end.
	 */
	__u16 admin;
	__u16 baseline;
};

enum wag_policy_protocol {
	WAG_POLICY_OTHER = 0, /* without ports */
	WAG_POLICY_TCP = 1,
	WAG_POLICY_UDP = 2,
	WAG_POLICY_SCTP = 3,
};

struct wag_policy_state {
	__u32 revision; /* raised when anything has changed: known flows are judged again */
	__u32 keep;     /* 1: known flows are not */
};

/* Key: address of a peer. The agent writes. Peers whose class differs from that of their range. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_addr);
	__type(value, __u64);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_classes SEC(".maps");

/* Key: network. The agent writes. Every network that a policy names. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct wag_class_range_key);
	__type(value, __u64);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_class_ranges SEC(".maps");

/* Key: set of policies and class of the peer. The agent writes. What WAG_CLASS_ANY says is not repeated. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct wag_policy_key);
	__type(value, struct wag_policy_run);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wag_policy SEC(".maps");

/* Key: index. The agent writes. Equal runs are there once. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_policy_step);
	__uint(max_entries, 131072);
} wag_policy_steps SEC(".maps");

/* Key 0. The agent writes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_policy_state);
	__uint(max_entries, 1);
} wag_policy_state SEC(".maps");

struct wag_conn {
	__u64 seen_ns;  /* CLOCK_MONOTONIC, coarse to one second */
	__u32 revision; /* that it was judged by */
	__u16 opened;   /* by whom: 1 the smaller end, 2 the greater one */
	__u16 may;      /* which of them still may, by that revision; none: the flow is cut */
	__u32 pattern;  /* of the name that it was allowed by; 0: by none. As long as policies accept that, however old */
	__u32 pad;
};

/*
 * Key: flow of an isolated pod, with the smaller end as source. Programs write and evict (LRU): what is evicted is judged
 * again, and begins anew by the next packet that policies allow. Flows that are cut stay: what the other end has still to say
 * does not open them.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct wag_tuple);
	__type(value, struct wag_conn);
	__uint(max_entries, 131072);
} wag_conns SEC(".maps");

#define WAG_POLICY_ASK_NAMES 4 /* besides enum wag_policy_flag: names may say something else */

/* What names are asked, where no other rule has allowed a flow. */
struct wag_name_query {
	__u64 set;
	__u64 peer;    /* WAG_NAME_CLASS, or that and WAG_NAME_STRICT */
	__u32 place;
	__u16 admin;   /* where the tiers ended without names */
	__u16 baseline;
	struct wag_policy_key key;
	__u32 low;
	__u32 high;
	__u32 middle;
	__u32 now;
	__u32 verdict; /* without names */
	__u32 pad;
};

/* What does not fit on the stack. */
struct wag_policy_work {
	struct wag_tuple flow; /* as it is judged */
	__u64 now;             /* CLOCK_MONOTONIC, read once for a packet */
	struct wag_tuple back; /* the same, turned round */
	struct wag_tuple key;  /* of wag_conns */
	struct wag_tuple inner; /* what an ICMP error is about */
	struct wag_conn conn;
	struct wag_name_key name; /* what is judged, where names may decide */
	struct wag_name_query query;
	__u32 had;     /* pattern by which a flow that is judged again was allowed */
	__u32 pattern; /* pattern by which it is now */
	__u64 asker;   /* egress policies of the pod that a DNS answer is for */
	__u32 asker_ifindex;
	__u32 pad;
	/* by whom the packet would have been dropped that `audit` tells of */
	__u64 audit_policy[2]; /* by direction, ingress first */
	__u32 audit_rule[2];
};

/* Key 0. Programs alone, each for the time it runs, as wag_scratch. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_policy_work);
	__uint(max_entries, 1);
} wag_policy_work SEC(".maps");

WAG_INLINE struct wag_policy_work *wag_policy_work_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&wag_policy_work, &zero);
}

WAG_INLINE bool wag_is_isolated(const struct wag_endpoint *endpoint)
{
	return wag_endpoint_is(endpoint, WAG_ENDPOINT_POD) && (endpoint->ingress_policy | endpoint->egress_policy);
}

/* Where in a run of steps the port is. */
WAG_INLINE __u32 wag_policy_place(__u8 proto, __be16 port)
{
	switch (proto) {
	case IPPROTO_TCP:
		return WAG_POLICY_TCP << 16 | bpf_ntohs(port);
	case IPPROTO_UDP:
		return WAG_POLICY_UDP << 16 | bpf_ntohs(port);
	case IPPROTO_SCTP:
		return WAG_POLICY_SCTP << 16 | bpf_ntohs(port);
	default:
		return WAG_POLICY_OTHER << 16;
	}
}

/* `self`: the address is this node's; it may have a class of its own all the same, where policies tell nodes apart. */
static __noinline __u64 wag_class_of(const struct wag_addr *addr, int self)
{
	struct wag_class_range_key key = { .prefix = 128 };
	__u64 *found;

	if (!addr)
		return WAG_CLASS_UNKNOWN;
	found = bpf_map_lookup_elem(&wag_classes, addr);
	if (found)
		return *found;
	if (self)
		return WAG_CLASS_SELF;
	__builtin_memcpy(key.addr, addr, sizeof(key.addr));
	found = bpf_map_lookup_elem(&wag_class_ranges, &key);
	return found ? *found : WAG_CLASS_UNKNOWN;
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

#define WAG_POLICY_HALVINGS 17 /* as many as the array could need */

/* The last step of the run that starts at `place` or before; NULL where the tables are broken. */
WAG_INLINE struct wag_policy_step *wag_policy_find(const struct wag_policy_run *run, __u32 place)
{
	__u32 low = run->first, high = run->first + run->count - 1;
	struct wag_policy_step *step;
	int i;

	for (i = 0; i < WAG_POLICY_HALVINGS && low < high; i++) {
		__u32 middle = low + (high - low + 1) / 2;

		step = bpf_map_lookup_elem(&wag_policy_steps, &middle);
		if (!step)
			return NULL;
		if (step->start <= place)
			low = middle;
		else
			high = middle - 1;
	}
	return bpf_map_lookup_elem(&wag_policy_steps, &low);
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
	event = wag_event_start(WAG_EVENT_POLICY, bpf_ktime_get_ns());
	if (!event)
		return 0;
	event->src = packet->tuple.src;
	event->dst = packet->tuple.dst;
	event->sport = packet->tuple.sport;
	event->dport = packet->tuple.dport;
	event->proto = packet->tuple.proto;
	event->hook = packet->hook;
	event->verdict = WAG_OUTCOME_AUDIT;
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

/* The key of a flow, and which end its source is: 1 or 2. */
WAG_INLINE __u32 wag_conn_key(struct wag_tuple *key, const struct wag_tuple *flow)
{
	bool greater;

	if (flow->src.half[0] != flow->dst.half[0])
		greater = flow->src.half[0] > flow->dst.half[0];
	else if (flow->src.half[1] != flow->dst.half[1])
		greater = flow->src.half[1] > flow->dst.half[1];
	else
		greater = flow->sport > flow->dport;
	if (greater) {
		wag_tuple_reverse(key, flow);
		return 2;
	}
	*key = *flow;
	return 1;
}

WAG_INLINE bool wag_conn_lives(const struct wag_conn *conn, __u8 proto, __u64 now)
{
	__u64 most = (__u64)(proto == IPPROTO_TCP ? wag_tcp_seconds : wag_udp_seconds) * 1000000000ULL;

	return now - conn->seen_ns <= most || (__s64)(now - conn->seen_ns) < 0;
}

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

#define WAG_CONN_COARSE_NS 1000000000ULL

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

/* Is it open? Packets of one that is cut do not make it live longer. */
WAG_INLINE bool wag_conn_open(struct wag_conn *conn, __u64 now)
{
	if (!conn || !conn->may)
		return false;
	if (now - conn->seen_ns > WAG_CONN_COARSE_NS)
		conn->seen_ns = now;
	return true;
}

#define WAG_ANSWER_NS (30 * 1000000000ULL) /* so long after a flow was cut a datagram of it may be an answer */

/* Is the packet part of a flow that was cut? Not one that begins a connection itself. */
WAG_INLINE bool wag_conn_cut(const struct wag_conn *conn, const struct wag_packet *packet, __u64 now)
{
	if (!conn || conn->may || wag_begins(packet))
		return false;
	return wag_is_established(packet) || now - conn->seen_ns < WAG_ANSWER_NS;
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

#define WAG_DNS_PORT 53

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
	work->now = bpf_ktime_get_ns();
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
