/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Reads a DNS answer that is about to be delivered to a pod whose policies accept names, and writes down what addresses it
 * gives, before the pod can use them. Only answers of flows that the pod has opened come here: what it may ask, it believes.
 *
 * All addresses of the answer section are the name's that was asked for, whatever aliases lead there: whose records they
 * are, is the server's to say. So names of records are skipped and no compression pointer is ever followed.
 */
#ifndef WAGGLE_LEARN_H
#define WAGGLE_LEARN_H

#include <linux/bpf.h>
#include "event.h"
#include "names.h"
#include "packet.h"
#include "policy.h"

#ifndef WAG_XDP /* it brings nothing to pods */

#define WAG_DNS_MOST 4096 /* so much of an answer is read */
#define WAG_DNS_HEADER 12
#define WAG_DNS_RECORD 10 /* type, class, TTL, length: behind the name */
#define WAG_DNS_STEPS 2048
#define WAG_DNS_LABEL 63
#define WAG_DNS_MATCHES 8 /* patterns that mean one name */

#define WAG_DNS_A 1
#define WAG_DNS_AAAA 28
#define WAG_DNS_IN 1

/* An answer that is being read. */
struct wag_dns {
	__u8 message[WAG_DNS_MOST + 32]; /* reads need not end where they begin */
	__u8 name[WAG_NAME_MAX];         /* ".www.example.com", as asked for, in small letters */
	struct wag_pattern_key key;
	struct wag_name_key entry;
	struct wag_name fresh;
	__u32 pattern[WAG_DNS_MATCHES];
	__u32 patterns;
	__u32 size;   /* of the message */
	__u32 at;     /* in the message */
	__u32 length; /* of the name */
	__u32 label;  /* bytes of it to come */
	__u32 records; /* to come */
	__u32 done;
	__u32 now;
	__u32 until;
	__u32 entering; /* a pattern, into the slot `best`, which was free in `least` seconds */
	__u32 best;
	__u32 least;
};

/* Key 0. Programs alone, each for the time it runs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct wag_dns);
	__uint(max_entries, 1);
} wag_dns SEC(".maps");

WAG_INLINE struct wag_dns *wag_dns_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&wag_dns, &zero);
}

WAG_INLINE __u32 wag_dns_u16(const struct wag_dns *dns, __u32 at)
{
	at &= WAG_DNS_MOST - 1;
	return (__u32)dns->message[at] << 8 | dns->message[at + 1];
}

/* In small letters; 0 for what is in no pattern. */
WAG_INLINE __u8 wag_dns_letter(__u8 c)
{
	if (c >= 'A' && c <= 'Z')
		return c + ('a' - 'A');
	return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ? c : 0;
}

/* One byte of the name that was asked for. `done` when it ends as it should. */
static long wag_dns_question(__u32 index, void *nothing)
{
	struct wag_dns *dns = wag_dns_get();
	__u32 at;
	__u8 c;

	if (!dns)
		return 1;
	at = WAG_DNS_HEADER + index;
	if (at >= dns->size || index >= WAG_NAME_MAX)
		return 1;
	c = dns->message[at & (WAG_DNS_MOST - 1)];
	if (dns->label) {
		dns->label--;
		c = wag_dns_letter(c);
		if (!c)
			return 1;
	} else if (!c) {
		dns->length = index;
		dns->at = at + 1;
		dns->done = 1;
		return 1;
	} else if (c > WAG_DNS_LABEL) {
		return 1;
	} else {
		dns->label = c;
		c = '.';
	}
	dns->name[index & (WAG_NAME_MAX - 1)] = c;
	return 0;
}

/* One byte of the name, from its end on: at the beginning of each label, is this a pattern? */
static long wag_dns_match(__u32 index, void *context)
{
	struct wag_dns *dns = wag_dns_get();
	struct wag_policy_key policy;
	__u32 *pattern, left;
	__u8 c;

	if (!dns || index >= dns->length)
		return 1;
	left = dns->length - 1 - index;
	c = dns->name[left & (WAG_NAME_MAX - 1)];
	if (index >= sizeof(dns->key.text))
		return 1;
	dns->key.text[index] = c;
	if (c != '.')
		return 0;
	dns->key.exact = !left;
	pattern = bpf_map_lookup_elem(&wag_patterns, &dns->key);
	if (!pattern)
		return 0;
	policy.set = *(__u64 *)context;
	policy.peer = WAG_NAME_CLASS | *pattern;
	if (!bpf_map_lookup_elem(&wag_policy, &policy)) {
		policy.peer |= WAG_NAME_STRICT;
		if (!bpf_map_lookup_elem(&wag_policy, &policy))
			return 0; /* of other pods */
	}
	dns->pattern[dns->patterns & (WAG_DNS_MATCHES - 1)] = *pattern;
	dns->patterns++;
	return dns->patterns == WAG_DNS_MATCHES;
}

/* What one slot of dns->name is to the pattern that is being entered: its own; else, is it free, or will it be before others? */
static long wag_name_slot(__u32 index, void *nothing)
{
	struct wag_dns *dns = wag_dns_get();
	struct wag_name *name;
	__u32 i = index & (WAG_NAME_SLOTS - 1), left;

	name = dns ? bpf_map_lookup_elem(&wag_names, &dns->entry) : NULL;
	if (!name)
		return 1;
	left = name->until[i] - dns->now;
	if (!name->pattern[i] || (__s32)left < 0)
		left = 0;
	if (left < dns->least) {
		dns->least = left;
		dns->best = i;
	}
	if (name->pattern[i] != dns->entering)
		return 0;
	dns->best = i;
	dns->least = 0;
	if ((__s32)(dns->until - name->until[i]) < 0)
		dns->until = name->until[i];
	return 1;
}

/* Gives a pattern a slot. */
__noinline int wag_name_enter(__u32 pattern, __u32 until)
{
	struct wag_dns *dns = wag_dns_get();
	struct wag_name *name;
	__u32 i;

	if (!dns)
		return 0;
	dns->entering = pattern;
	dns->until = until;
	dns->least = ~0U;
	bpf_loop(WAG_NAME_SLOTS, wag_name_slot, NULL, 0);
	name = bpf_map_lookup_elem(&wag_names, &dns->entry);
	if (!name)
		return 0;
	if (dns->least)
		wag_count(WAG_COUNTER_NAME_SLOT);
	i = dns->best & (WAG_NAME_SLOTS - 1);
	name->until[i] = dns->until;
	name->pattern[i] = pattern;
	return 0;
}

/* May the pod have one more entry in wag_names? */
static __noinline int wag_name_has_room(struct wag_dns *dns)
{
	struct wag_name_share first = { .made = 1 }, *share;

	if (!dns)
		return 0;
	share = bpf_map_lookup_elem(&wag_name_shares, &dns->entry.ifindex);
	if (!share) {
		first.since = dns->now;
		bpf_map_update_elem(&wag_name_shares, &dns->entry.ifindex, &first, BPF_ANY);
		return 1;
	}
	if (dns->now - share->since >= WAG_NAME_MINUTE) {
		share->since = dns->now;
		share->made = 0;
	}
	if (share->made >= wag_names_share)
		return 0;
	share->made++;
	return 1;
}

/* Writes down what dns->entry says, for so many seconds. */
__noinline int wag_name_learn(__u32 seconds)
{
	struct wag_dns *dns = wag_dns_get();
	struct wag_name *name;
	__u32 i;

	if (!dns)
		return 0;
	dns->now = wag_seconds();
	if (seconds < WAG_NAME_LEAST_SECONDS || seconds >> 31) /* RFC 2181, section 8 */
		seconds = WAG_NAME_LEAST_SECONDS;
	if (seconds > WAG_NAME_MOST_SECONDS)
		seconds = WAG_NAME_MOST_SECONDS;
	name = bpf_map_lookup_elem(&wag_names, &dns->entry);
	if (!name) {
		if (!wag_name_has_room(dns)) {
			wag_count(WAG_COUNTER_NAME_REFUSED);
			return 0;
		}
		bpf_map_update_elem(&wag_names, &dns->entry, &dns->fresh, BPF_NOEXIST);
		name = bpf_map_lookup_elem(&wag_names, &dns->entry);
		if (!name)
			return 0;
		wag_count(WAG_COUNTER_NAME_ENTRY);
	}
	for (i = 0; i < WAG_DNS_MATCHES; i++) {
		if (i >= dns->patterns)
			break;
		wag_name_enter(dns->pattern[i], dns->now + seconds);
	}
	__builtin_memcpy(name->text, dns->name + 1, sizeof(name->text));
	wag_count(WAG_COUNTER_NAME_LEARNED);
	return 0;
}

/* A record, its name skipped. False where the message ends within it. */
WAG_INLINE bool wag_dns_record(struct wag_dns *dns)
{
	__u32 at = dns->at & (WAG_DNS_MOST - 1);
	__u32 type, class, seconds, length, end;

	type = wag_dns_u16(dns, at);
	class = wag_dns_u16(dns, at + 2);
	seconds = wag_dns_u16(dns, at + 4) << 16 | wag_dns_u16(dns, at + 6);
	length = wag_dns_u16(dns, at + 8);
	end = at + WAG_DNS_RECORD + length;
	if (end > dns->size)
		return false;
	dns->at = end;
	if (class != WAG_DNS_IN)
		return true;
	at = (at + WAG_DNS_RECORD) & (WAG_DNS_MOST - 1);
	if (type == WAG_DNS_A && length == 4) {
		__be32 addr;

		__builtin_memcpy(&addr, dns->message + at, sizeof(addr));
		wag_addr_set4(&dns->entry.addr, addr);
	} else if (type == WAG_DNS_AAAA && length == 16) {
		__builtin_memcpy(&dns->entry.addr, dns->message + at, 16);
	} else {
		return true;
	}
	wag_name_learn(seconds);
	return true;
}

/* A label of the name of a record, or the rest of the record. `done` when there is no more. */
static long wag_dns_answer(__u32 index, void *nothing)
{
	struct wag_dns *dns = wag_dns_get();
	__u8 c;

	if (!dns || dns->at >= dns->size)
		return 1;
	c = dns->message[dns->at & (WAG_DNS_MOST - 1)];
	if (c && c <= WAG_DNS_LABEL) {
		dns->at += c + 1;
		return 0;
	}
	if (c && c < 0xc0)
		return 1; /* no label that was ever defined */
	dns->at += c ? 2 : 1;
	if (dns->at + WAG_DNS_RECORD > dns->size || !wag_dns_record(dns))
		return 1;
	dns->done = !--dns->records;
	return dns->done;
}

/* Brings the message into dns->message. False where there is none. */
WAG_INLINE bool wag_dns_load(wag_ctx *ctx, const struct wag_packet *packet, struct wag_dns *dns)
{
	__u32 off = packet->l4_off, end = WAG_L3_OFF + packet->size, size;
	__u8 head;

	if (packet->tuple.proto == IPPROTO_TCP) {
		if (wag_load(ctx, off + 12, &head, 1))
			return false;
		off += (head >> 4) * 4;
	} else {
		off += 8;
	}
	if (end > ctx->len)
		end = ctx->len;
	if (off >= end)
		return false;
	size = end - off;
	if (packet->tuple.proto == IPPROTO_TCP && size > 2) {
		__be16 said;

		/* some servers send the length ahead, in a segment of its own */
		if (!wag_load(ctx, off, &said, sizeof(said)) && bpf_ntohs(said) <= size - 2) {
			off += 2;
			size = bpf_ntohs(said);
		}
	}
	if (size > WAG_DNS_MOST)
		size = WAG_DNS_MOST;
	if (size <= WAG_DNS_HEADER || size > WAG_DNS_MOST)
		return false;
	dns->size = size;
	return !wag_load(ctx, off, dns->message, size);
}

/* Is it an answer with something in it? */
WAG_INLINE bool wag_dns_is_answer(const struct wag_dns *dns)
{
	/* QR; a query; not cut short; no error; one question */
	return (dns->message[2] & 0xfa) == 0x80 && !(dns->message[3] & 0x0f) && wag_dns_u16(dns, 4) == 1 &&
	       wag_dns_u16(dns, 6);
}

/*
 * For wag_finish alone, of a packet with `answers` set. `set`: of the pod that it is for; `ifindex`: the pod. A global
 * function, as wag_parse is.
 */
__noinline int wag_names_learn(wag_ctx *ctx, struct wag_packet *packet)
{
	struct wag_policy_work *work = wag_policy_work_get();
	struct wag_dns *dns = wag_dns_get();
	__u64 set;

	if (!packet || !work || !dns || !wag_dns_load(ctx, packet, dns) || !wag_dns_is_answer(dns))
		return 0;
	set = work->asker;
	dns->entry.ifindex = work->asker_ifindex;
	dns->label = 0;
	dns->done = 0;
	__builtin_memset(dns->name, 0, sizeof(dns->name));
	bpf_loop(WAG_NAME_MAX, wag_dns_question, NULL, 0);
	if (!dns->done)
		goto unreadable;
	dns->at += 4; /* type and class of the question */
	dns->patterns = 0;
	__builtin_memset(&dns->key, 0, sizeof(dns->key));
	bpf_loop(WAG_NAME_MAX, wag_dns_match, &set, 0);
	if (!dns->patterns)
		return 0;
	dns->records = wag_dns_u16(dns, 6);
	dns->done = 0;
	bpf_loop(WAG_DNS_STEPS, wag_dns_answer, NULL, 0);
	if (dns->done)
		return 0;
unreadable:
	wag_count(WAG_COUNTER_NAME_UNREADABLE);
	return 0;
}

#endif
#endif
