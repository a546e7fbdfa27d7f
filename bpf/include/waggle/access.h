/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How a program gets at its packet: tc and XDP have the same helpers under other names, and XDP corrects checksums by
 * itself. Everything else is written once, against these.
 */
#ifndef WAGGLE_ACCESS_H
#define WAGGLE_ACCESS_H

#include <linux/bpf.h>
#include "addr.h"

/* skb->mark of packets that are translated and on their way out: wag_node_egress must not look at them again. */
#define WAG_MARK 0x57410000 /* none of the bits that kube-proxy uses */

/* A 32-bit sum as the 16-bit checksum of a header. */
WAG_INLINE __sum16 wag_csum_fold(__s64 sum)
{
	__u32 folded = (__u32)sum;

	folded = (folded & 0xffff) + (folded >> 16);
	folded = (folded & 0xffff) + (folded >> 16);
	return (__sum16)~folded;
}

#ifndef WAG_XDP

typedef struct __sk_buff wag_ctx;

WAG_INLINE long wag_load(wag_ctx *ctx, __u32 off, void *to, __u32 size)
{
	return bpf_skb_load_bytes(ctx, off, to, size);
}

WAG_INLINE long wag_store(wag_ctx *ctx, __u32 off, const void *from, __u32 size)
{
	return bpf_skb_store_bytes(ctx, off, from, size, 0);
}

/*
 * A card may have added up the whole packet (CHECKSUM_COMPLETE), and the stack goes by that. What changes bytes that no
 * checksum inside makes up for has to be told: by this, instead of wag_store, or by wag_sum_changes.
 */
WAG_INLINE long wag_store_summed(wag_ctx *ctx, __u32 off, const void *from, __u32 size)
{
	return bpf_skb_store_bytes(ctx, off, from, size, BPF_F_RECOMPUTE_CSUM);
}

WAG_INLINE void wag_sum_changes(wag_ctx *ctx, __s64 diff)
{
	bpf_csum_update(ctx, (__u32)diff);
}

/* Adds `diff` (of bpf_csum_diff) to the checksum of an IP header. */
WAG_INLINE long wag_fix_l3(wag_ctx *ctx, __u32 off, __s64 diff)
{
	return bpf_l3_csum_replace(ctx, off, 0, diff, 0);
}

/* As bpf_l4_csum_replace. */
WAG_INLINE long wag_fix_l4(wag_ctx *ctx, __u32 off, __u64 from, __u64 to, __u64 flags)
{
	return bpf_l4_csum_replace(ctx, off, from, to, flags);
}

/* Has another hook translated it? */
WAG_INLINE bool wag_is_marked(const wag_ctx *ctx)
{
	return ctx->mark == WAG_MARK;
}

#else

typedef struct xdp_md wag_ctx;

WAG_INLINE long wag_load(wag_ctx *ctx, __u32 off, void *to, __u32 size)
{
	return bpf_xdp_load_bytes(ctx, off, to, size);
}

WAG_INLINE long wag_store(wag_ctx *ctx, __u32 off, const void *from, __u32 size)
{
	return bpf_xdp_store_bytes(ctx, off, (void *)from, size);
}

/* No sum comes with the packet. */
WAG_INLINE long wag_store_summed(wag_ctx *ctx, __u32 off, const void *from, __u32 size)
{
	return wag_store(ctx, off, from, size);
}

WAG_INLINE void wag_sum_changes(wag_ctx *ctx, __s64 diff)
{
}

WAG_INLINE long wag_fix_l4(wag_ctx *ctx, __u32 off, __u64 from, __u64 to, __u64 flags)
{
	__u16 check;
	__u64 sum;

	if (wag_load(ctx, off, &check, sizeof(check)))
		return -1;
	if (!check && (flags & BPF_F_MARK_MANGLED_0))
		return 0; /* UDP without a checksum */
	sum = (__u16)~check;
	sum += flags & BPF_F_HDR_FIELD_MASK ? (__u16)~from + (__u16)to : (__u32)to;
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	check = wag_csum_fold(sum);
	if (!check && (flags & BPF_F_MARK_MANGLED_0))
		check = 0xffff;
	return wag_store(ctx, off, &check, sizeof(check));
}

WAG_INLINE long wag_fix_l3(wag_ctx *ctx, __u32 off, __s64 diff)
{
	return wag_fix_l4(ctx, off, 0, diff, 0);
}

WAG_INLINE bool wag_is_marked(const wag_ctx *ctx)
{
	return false; /* XDP comes first */
}

#endif
#endif
