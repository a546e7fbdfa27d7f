// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Takes flows out of wag_nat whose time is over. A timer in the kernel starts it every few seconds, whether an agent lives
 * or not; the work itself is done by a kernel thread, since a large table takes longer than a timer may. The agent starts
 * the timer once, by running wag_sweep_start.
 */
#include <linux/bpf.h>
#include "waggle/sweep.h"

extern int bpf_wq_init(struct bpf_wq *wq, void *map, unsigned int flags) __ksym __weak;
extern int bpf_wq_start(struct bpf_wq *wq, unsigned int flags) __ksym __weak;
extern int bpf_wq_set_callback_impl(struct bpf_wq *wq, int (*callback)(void *map, int *key, void *value),
				    unsigned int flags, void *aux__ign) __ksym __weak;

#define WAG_CLOCK_MONOTONIC 1
#define WAG_EBUSY 16 /* initialised already */

/* How long a flow lives after its last packet, in seconds; `flags` of either direction. */
WAG_INLINE __u32 wag_flow_seconds(const struct wag_tuple *tuple, __u32 forward, __u32 replies)
{
	bool confirmed = forward & WAG_NAT_CONFIRMED;

	switch (tuple->proto) {
	case IPPROTO_TCP:
		if ((forward & replies & WAG_NAT_CLOSING) || (forward | replies) & WAG_NAT_RESET)
			return WAG_CLOSED_SECONDS;
		if ((forward | replies) & WAG_NAT_CLOSING)
			return wag_tcp_seconds / WAG_HALF_CLOSED;
		return confirmed ? wag_tcp_seconds : WAG_OPENING_SECONDS;
	case IPPROTO_SCTP:
		return confirmed ? wag_tcp_seconds : WAG_OPENING_SECONDS;
	case IPPROTO_UDP:
		return confirmed ? wag_udp_seconds : WAG_UDP_OPENING_SECONDS;
	default:
		return WAG_ICMP_SECONDS;
	}
}

static long wag_sweep_one(void *map, struct wag_tuple *key, struct wag_nat *nat, struct wag_sweeping *sweeping)
{
	bool forward = nat->flags & WAG_NAT_FORWARD;
	__u64 seen = nat->seen_ns;
	struct wag_tuple half;
	struct wag_nat *other = wag_nat_other(key, nat, &half);
	__u32 seconds;

	if (other) {
		if ((__s64)(other->seen_ns - seen) > 0)
			seen = other->seen_ns;
		seconds = forward ? wag_flow_seconds(key, nat->flags, other->flags)
				  : wag_flow_seconds(key, other->flags, nat->flags);
	} else {
		/* of replies that were left alone nothing is known but that nobody asks any more */
		seconds = forward ? wag_flow_seconds(key, nat->flags, 0) : WAG_ORPHAN_SECONDS;
	}
	/* less than nothing: it was used since the sweep began */
	if ((__s64)(sweeping->now - seen) < (__s64)(seconds * WAG_SECOND_NS)) {
		sweeping->entries++;
		if (forward && (nat->flags & WAG_NAT_CONFIRMED))
			sweeping->confirmed++;
		return 0;
	}
	if (other && !bpf_map_delete_elem(&wag_nat, &half))
		sweeping->expired++;
	if (!bpf_map_delete_elem(&wag_nat, key))
		sweeping->expired++;
	return 0;
}

WAG_INLINE void wag_sweep(struct wag_sweep *sweep)
{
	struct wag_sweeping sweeping = { .now = bpf_ktime_get_ns() };

	bpf_for_each_map_elem(&wag_nat, wag_sweep_one, &sweeping, 0);
	sweep->entries = sweeping.entries;
	sweep->confirmed = sweeping.confirmed;
	sweep->expired += sweeping.expired;
	sweep->sweeps++;
	sweep->took_ns = bpf_ktime_get_ns() - sweeping.now;
}

static int wag_sweep_work(void *map, int *key, void *value)
{
	wag_sweep(value);
	return 0;
}

static int wag_sweep_due(void *map, int *key, struct wag_sweep *sweep)
{
	bpf_wq_start(&sweep->work, 0);
	bpf_timer_start(&sweep->timer, wag_sweep_seconds * WAG_SECOND_NS, 0);
	return 0;
}

/* Starts the timer, or gives it this program's code. Returns 0, or what is in the way. */
SEC("syscall")
int wag_sweep_start(void *ctx)
{
	__u32 zero = 0;
	struct wag_sweep *sweep = bpf_map_lookup_elem(&wag_sweeps, &zero);
	long failed;

	if (!sweep)
		return -1;
	failed = bpf_wq_init(&sweep->work, &wag_sweeps, 0);
	if (failed && failed != -WAG_EBUSY)
		return failed;
	failed = bpf_wq_set_callback_impl(&sweep->work, wag_sweep_work, 0, NULL);
	if (failed)
		return failed;
	failed = bpf_timer_init(&sweep->timer, &wag_sweeps, WAG_CLOCK_MONOTONIC);
	if (failed && failed != -WAG_EBUSY)
		return failed;
	failed = bpf_timer_set_callback(&sweep->timer, wag_sweep_due);
	if (failed)
		return failed;
	return bpf_timer_start(&sweep->timer, 0, 0);
}

/* One sweep, now. */
SEC("syscall")
int wag_sweep_now(void *ctx)
{
	__u32 zero = 0;
	struct wag_sweep *sweep = bpf_map_lookup_elem(&wag_sweeps, &zero);

	if (sweep)
		wag_sweep(sweep);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
