/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * NAT: an entry says what a tuple becomes. A translated flow has two: the client's packets (client → frontend becomes
 * client or node → backend) and the replies (backend → client or node becomes frontend → client). Both are one map and
 * are applied by one function; a direction is never told apart.
 */
#ifndef WAGGLE_NAT_H
#define WAGGLE_NAT_H

#include <linux/bpf.h>
#include <linux/in.h>
#include "affinity.h"
#include "config.h"
#include "direct.h"
#include "endpoint.h"
#include "event.h"
#include "forward.h"
#include "nat_table.h"
#include "packet.h"
#include "policy.h"
#include "ranges.h"
#include "rewrite.h"
#include "service.h"

/* What does not fit on the stack of a call chain: 512 bytes for all of it. */
struct wag_scratch {
	struct wag_tuple to;     /* what the packet becomes */
	struct wag_tuple answer; /* `to` turned round: what replies come with */
	struct wag_nat entry;
};

/* Key 0. Programs alone, each for the time it runs: with bottom halves off there is one at a time on a CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_scratch);
	__uint(max_entries, 1);
} wag_scratch SEC(".maps");

WAG_INLINE struct wag_scratch *wag_scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&wag_scratch, &zero);
}

/* Ports are tried at random: with nine of ten taken, 2 of 1,000 flows find none. */
#define WAG_NAT_TRIES 64
#define WAG_EEXIST 17

/* Used a moment ago, so that nothing has come by since for either half of the flow? */
WAG_INLINE bool wag_nat_is_fresh(const struct wag_nat *nat)
{
	return bpf_ktime_get_ns() - nat->seen_ns <= WAG_SECOND_NS;
}

/* Takes out what the client's tuple `key` has, both halves of it; only the flow with that number, unless it is -1. */
static __noinline int wag_nat_forget(const struct wag_tuple *key, __u64 number)
{
	struct wag_tuple half;
	struct wag_nat *nat;

	if (!key)
		return 0;
	nat = bpf_map_lookup_elem(&wag_nat, key);
	if (!nat || (number != -1ULL && (nat->number != number || (nat->flags & WAG_NAT_CONFIRMED))))
		return 0;
	if (wag_nat_other(key, nat, &half))
		bpf_map_delete_elem(&wag_nat, &half);
	bpf_map_delete_elem(&wag_nat, key);
	return 1;
}

#define WAG_NAT_ENDING (WAG_NAT_CLOSING | WAG_NAT_RESET)

/* A connection begins: where the last one with its port is at an end, by either direction, nothing has been seen of it. */
static __noinline int wag_nat_renew(const struct wag_tuple *key, struct wag_nat *nat)
{
	__u32 kept = WAG_NAT_FORWARD | WAG_NAT_ALONE | WAG_NAT_TUNNEL;
	struct wag_tuple half;
	struct wag_nat *other;

	if (!key || !nat)
		return 0;
	other = wag_nat_other(key, nat, &half);
	if (!((nat->flags | (other ? other->flags : 0)) & WAG_NAT_ENDING))
		return 0;
	if (other)
		other->flags &= kept;
	nat->flags &= kept;
	return 0;
}

/* The client goes on: was there an answer? */
static __noinline int wag_nat_confirm(struct wag_nat *nat)
{
	struct wag_tuple key;
	struct wag_nat *replies;

	if (!nat)
		return 0;
	if (!(nat->flags & WAG_NAT_ALONE)) {
		wag_tuple_reverse(&key, &nat->to);
		replies = bpf_map_lookup_elem(&wag_nat, &key);
		if (!replies || !(replies->flags & WAG_NAT_ANSWERED))
			return 0;
	}
	__sync_fetch_and_or(&nat->flags, WAG_NAT_CONFIRMED);
	return 0;
}

/* A packet has used the entry. A reset is no answer, and nobody goes on with one; who does has seen that it was none. */
WAG_INLINE void wag_nat_touch(struct wag_nat *nat, const struct wag_packet *packet)
{
	bool reset = packet->tuple.proto == IPPROTO_TCP && packet->tcp_flags & WAG_TCP_RST;
	__u64 now = bpf_ktime_get_ns();
	__u32 flags = 0;

	if (now - nat->seen_ns > WAG_SECOND_NS)
		nat->seen_ns = now;
	if (reset)
		flags |= WAG_NAT_RESET;
	else if (nat->flags & WAG_NAT_RESET)
		__sync_fetch_and_and(&nat->flags, ~(__u32)WAG_NAT_RESET);
	if (packet->tuple.proto == IPPROTO_TCP && (packet->tcp_flags & WAG_TCP_FIN))
		flags |= WAG_NAT_CLOSING;
	if (!reset && !(nat->flags & WAG_NAT_FORWARD))
		flags |= WAG_NAT_ANSWERED;
	else if (!reset && !(nat->flags & WAG_NAT_CONFIRMED) &&
		 (packet->tuple.proto != IPPROTO_TCP || wag_is_established(packet)))
		wag_nat_confirm(nat);
	if (flags & ~nat->flags)
		__sync_fetch_and_or(&nat->flags, flags);
}

/* The number of a flow that begins. */
static __noinline __u64 wag_nat_number(void)
{
	__u32 zero = 0;
	struct wag_nat_count *count = bpf_map_lookup_elem(&wag_nat_counts, &zero);

	return count ? __sync_fetch_and_add(&count->begun, 1) : 0;
}

/* A flow has begun: it displaces one that began long before it and was never confirmed. */
static __noinline int wag_nat_displace(const struct wag_tuple *key, __u64 number)
{
	struct wag_nat_young *young, earlier;
	struct wag_nat_count *count;
	__u32 slot;

	if (!key || !wag_young_flows)
		return 0;
	slot = number % wag_young_flows;
	young = bpf_map_lookup_elem(&wag_nat_young, &slot);
	if (!young)
		return 0;
	earlier = *young;
	young->key = *key;
	young->number = number;
	/* the tuple may be that of a flow which began since */
	if (!wag_nat_forget(&earlier.key, earlier.number))
		return 0;
	slot = 0;
	count = bpf_map_lookup_elem(&wag_nat_counts, &slot);
	if (count)
		__sync_fetch_and_add(&count->displaced, 1);
	return 0;
}

/* The search for a source port. */
struct wag_nat_search {
	wag_ctx *ctx;
	struct wag_scratch *scratch;
	bool random; /* the source is the node: it has no port to keep */
	bool direct; /* the flow was not translated so far: only its port is to change */
	bool first;  /* a TCP connection begins */
	bool done;
	__u8 reason; /* enum wag_reason; final when done */
};

WAG_INLINE long wag_nat_found(struct wag_nat_search *search, enum wag_reason reason)
{
	search->reason = reason;
	search->done = true;
	return 1;
}

/* One try: takes the key of the replies unless another flow has it. Returns 1 to end the loop. */
static long wag_nat_try(__u32 i, struct wag_nat_search *search)
{
	struct wag_scratch *scratch = search->scratch;
	struct wag_nat *other;
	long failed;

	if (i || search->random)
		scratch->to.sport = bpf_htons(wag_snat_min + bpf_get_prandom_u32() %
								     ((__u32)wag_snat_max - wag_snat_min + 1));
	wag_tuple_reverse(&scratch->answer, &scratch->to);
	/* the sockets of a direct flow itself have the port that it comes with */
	if ((i || !search->direct) &&
	    wag_flow_is_direct(search->ctx, &scratch->to, &scratch->answer, search->first))
		return 0;
	failed = bpf_map_update_elem(&wag_nat, &scratch->answer, &scratch->entry, BPF_NOEXIST);
	if (!failed)
		return wag_nat_found(search, WAG_REASON_NONE);
	if (failed != -WAG_EEXIST)
		return wag_nat_found(search, WAG_REASON_NAT_FULL);
	other = bpf_map_lookup_elem(&wag_nat, &scratch->answer);
	if (!other)
		return 0; /* gone at this moment: the next turn settles it */
	search->reason = WAG_REASON_NAT_PORTS;
	if (!wag_tuple_equal(&other->to, &scratch->entry.to))
		return 0;
	/* left over from the same flow */
	if (bpf_map_update_elem(&wag_nat, &scratch->answer, &scratch->entry, BPF_ANY))
		return wag_nat_found(search, WAG_REASON_NAT_FULL);
	return wag_nat_found(search, WAG_REASON_NONE);
}

/*
 * Writes the two entries of a new flow, which belongs to no Service where `revision` is 0. scratch->to holds client (or
 * node) → backend. Its source port is a random one where the source is the node; otherwise it changes only when another
 * flow to the same backend has it already, translated or not, which also keeps apart several Services in front of one
 * backend. A bpf_loop for the verifier's sake: unrolled, the tries were most of what it had to walk (183,000
 * instructions). Returns enum wag_reason.
 */
static __noinline int wag_nat_create(wag_ctx *ctx, struct wag_packet *packet, struct wag_scratch *scratch, __u32 revision)
{
	struct wag_nat_search search = { .ctx = ctx, .scratch = scratch, .reason = WAG_REASON_NAT_PORTS };

	if (!packet || !scratch)
		return WAG_REASON_NAT_PORTS;
	/* What the tuple had before; of UDP, which moves with its backends and not as its client likes, answers may still come. */
	if (packet->tuple.proto == IPPROTO_TCP)
		wag_nat_forget(&packet->tuple, -1ULL);
	wag_tuple_reverse(&scratch->entry.to, &packet->tuple);
	scratch->entry.revision = 0;
	scratch->entry.flags = 0;
	scratch->entry.seen_ns = bpf_ktime_get_ns();
	scratch->entry.number = wag_nat_number();
	search.random = !wag_addr_equal(&scratch->to.src, &packet->tuple.src);
	search.direct = !revision && !search.random;
	search.first = packet->tuple.proto == IPPROTO_TCP && packet->begins;
	bpf_loop(WAG_NAT_TRIES, wag_nat_try, &search, 0);
	if (!search.done || search.reason)
		return search.reason;

	scratch->entry.to = scratch->to;
	scratch->entry.revision = revision;
	scratch->entry.flags = WAG_NAT_FORWARD;
	if (bpf_map_update_elem(&wag_nat, &packet->tuple, &scratch->entry, BPF_ANY)) {
		bpf_map_delete_elem(&wag_nat, &scratch->answer);
		return WAG_REASON_NAT_FULL;
	}
	wag_nat_displace(&packet->tuple, scratch->entry.number);
	return WAG_REASON_NONE;
}

/*
 * An entry for one direction alone: packets with the tuple `key` become scratch->to. `how`: as bpf_map_update_elem takes
 * it. Returns what that does.
 */
WAG_INLINE long wag_nat_create_alone(struct wag_scratch *scratch, const struct wag_tuple *key, __u32 revision, __u32 flags,
				     __u64 how)
{
	long failed;

	scratch->entry.to = scratch->to;
	scratch->entry.revision = revision;
	scratch->entry.flags = WAG_NAT_FORWARD | WAG_NAT_ALONE | flags;
	scratch->entry.seen_ns = bpf_ktime_get_ns();
	scratch->entry.number = wag_nat_number();
	failed = bpf_map_update_elem(&wag_nat, key, &scratch->entry, how);
	if (!failed)
		wag_nat_displace(key, scratch->entry.number);
	return failed;
}

/*
 * The packet becomes `to` and goes its way. Hooks that see what the host stack has routed already, only rewrite. What
 * XDP cannot deliver is left as it is, for tc. A global function, as wag_parse is: verified once, and not for every way that
 * leads here, which took half of the time in which all programs are loaded.
 */
__noinline int wag_translate(wag_ctx *ctx, struct wag_packet *packet, struct wag_tuple *to)
{
	enum wag_verdict verdict = WAG_PASS;
	enum wag_reason reason;

	if (!packet || !to)
		return WAG_DROP;
	if (!wag_is_routed(packet)) {
		verdict = wag_route(ctx, packet, to);
	} else if ((reason = wag_admits(ctx, packet, to, wag_endpoint_find(&to->dst)))) {
		return wag_drop(packet, reason);
	} else if (!wag_addr_equal(&to->dst, &packet->tuple.dst)) {
		/* sent on the way to a Service: the backend's is another */
		verdict = wag_route(ctx, packet, to);
		if (verdict == WAG_PASS)
			return wag_answer(packet, WAG_ANSWER_UNREACHABLE, WAG_REASON_NO_ROUTE);
	}
	if (verdict == WAG_REJECT || verdict == WAG_DROP)
		return verdict;
#ifdef WAG_XDP
	if (verdict == WAG_PASS)
		return verdict;
#endif
	if (wag_rewrite(ctx, packet, to))
		return wag_drop(packet, WAG_REASON_REWRITE);
	packet->translated = 1;
	return verdict;
}

/* May the flow go on to the backend it has? `service` is the frontend it came in by, as it is now. */
WAG_INLINE bool wag_nat_valid(struct wag_nat *nat, const struct wag_packet *packet, const struct wag_service *service)
{
	/* established connections keep their backend; the port may be used again after one has closed */
	if (wag_is_established(packet))
		return true;
	if (nat->flags & WAG_NAT_ENDING)
		return false;
	if (packet->tuple.proto == IPPROTO_TCP)
		wag_nat_renew(&packet->tuple, nat); /* the backend may have closed */
	if (nat->revision == service->revision)
		return true;
	/* nothing serves: UDP has nowhere to go, and is left alone (semantics.md section 4) */
	if (packet->tuple.proto == IPPROTO_UDP && !service->count && !service->draining)
		return true;
	if (!wag_backend_keeps(service, &nat->to.dst, nat->to.dport))
		return false;
	nat->revision = service->revision;
	return true;
}

/*
 * The client's packets found their entry: do the replies have theirs? Whoever used the port again while only this half
 * is left would lose every answer. Puts the other half back where it is gone; 0: another flow has it now.
 */
static __noinline int wag_nat_mend(struct wag_packet *packet, struct wag_tuple *to)
{
	struct wag_nat entry = {};
	struct wag_tuple key;
	struct wag_nat *replies;

	if (!packet || !to)
		return 0;
	wag_tuple_reverse(&key, to);
	wag_tuple_reverse(&entry.to, &packet->tuple);
	replies = bpf_map_lookup_elem(&wag_nat, &key);
	if (replies)
		return wag_tuple_equal(&replies->to, &entry.to);
	entry.seen_ns = bpf_ktime_get_ns();
	return !bpf_map_update_elem(&wag_nat, &key, &entry, BPF_NOEXIST);
}

/*
 * A packet that is not for a Service, from or to an address with translated flows: applies the flow's translation if it
 * has one. If it has none, but its replies would be taken for those of a translated flow (the same ends met through a
 * Service and now meet directly, or a port of SNAT is now a port of the node's own), it gets a source port of its own.
 * Only the first packet can: an established flow is left as it is. WAG_NEXT: not of a translated flow. A global function, as
 * wag_parse is.
 */
__noinline int wag_nat_pass(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_scratch *scratch = wag_scratch_get();
	struct wag_nat *nat;

	if (!packet || !scratch || wag_is_marked(ctx))
		return WAG_NEXT;
	nat = bpf_map_lookup_elem(&wag_nat, &packet->tuple);
	if (nat && (nat->flags & WAG_NAT_FORWARD) && nat->revision && !wag_is_established(packet)) {
		/*
		 * Left by a Service that is gone: whoever begins anew must not reach its former backend. What that
		 * one still answers is turned back, as long as the sweep leaves it.
		 */
		bpf_map_delete_elem(&wag_nat, &packet->tuple);
		return WAG_NEXT;
	}
	if (nat && (nat->flags & WAG_NAT_FORWARD) && packet->tuple.proto == IPPROTO_TCP && packet->begins)
		wag_nat_renew(&packet->tuple, nat);
	if (nat) {
		wag_nat_touch(nat, packet);
		scratch->to = nat->to;
#ifndef WAG_XDP
		if ((nat->flags & (WAG_NAT_TUNNEL | WAG_NAT_FORWARD)) == WAG_NAT_TUNNEL &&
		    packet->tcp_flags & WAG_TCP_SYN)
			wag_lower_mss(ctx, packet); /* only of local backends, which XDP never hears */
#endif
	} else {
		if (!packet->begins || packet->later_fragment)
			return WAG_NEXT;
		/* what looks direct here may be what conntrack has made of the very same flow */
		if (wag_beside_proxy && wag_is_routed(packet))
			return WAG_NEXT;
		wag_tuple_reverse(&scratch->to, &packet->tuple);
		nat = bpf_map_lookup_elem(&wag_nat, &scratch->to);
		if (!nat || (nat->flags & WAG_NAT_FORWARD))
			return WAG_NEXT;
		scratch->to = packet->tuple;
		if (wag_nat_create(ctx, packet, scratch, 0))
			return WAG_NEXT; /* no port: as good as before */
	}
	return wag_translate(ctx, packet, &scratch->to);
}

/* The entry of a reply to a translated flow; NULL for anything else. */
WAG_INLINE struct wag_nat *wag_nat_reply(const struct wag_packet *packet)
{
	struct wag_nat *nat = bpf_map_lookup_elem(&wag_nat, &packet->tuple);

	return nat && !(nat->flags & WAG_NAT_FORWARD) ? nat : NULL;
}

#endif
