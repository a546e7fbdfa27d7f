/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The checksum of SCTP (RFC 9260 section 6.8) when ports change. It is a CRC-32c over the whole packet, but a CRC is
 * linear: what changes in the ports changes the CRC by their difference, moved over the bytes that follow, whatever those
 * are. Moving over n bytes is a multiplication by x^(8n) modulo the polynomial, from the powers for every bit of n.
 */
#ifndef WAGGLE_SCTP_H
#define WAGGLE_SCTP_H

#include <linux/bpf.h>
#include "access.h"

#define WAG_SCTP_HEADER 12
#define WAG_SCTP_CHECK 8 /* where the checksum is */
#define WAG_CRC32C 0x82f63b78U

/* x^(8 << i) modulo the polynomial, bits reversed. */
static const __u32 wag_crc32c_powers[16] = {
	0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c,
	0x18b8ea18, 0x510ac59a, 0xb82be955, 0xb8fdb1e7,
	0x88e56f72, 0x74c360a4, 0xe4172b16, 0x0d65762a,
	0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc,
};

struct wag_crc_shift {
	__u32 crc;
	__u32 size; /* bytes to move over */
};

/* Product of two polynomials modulo CRC-32c's. */
static __noinline __u32 wag_crc32c_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;
	int i;

	for (i = 0; i < 32; i++) {
		product ^= b & -(a >> 31);
		a <<= 1;
		b = (b >> 1) ^ (WAG_CRC32C & -(b & 1));
	}
	return product;
}

static long wag_crc32c_step(__u32 i, struct wag_crc_shift *shift)
{
	if (shift->size >> (i & 15) & 1)
		shift->crc = wag_crc32c_multiply(wag_crc32c_powers[i & 15], shift->crc);
	return 0;
}

/*
 * Corrects the checksum for the ports at `off` having changed by `diff`, the bits that differ as a little-endian number;
 * `size` of the SCTP packet. None is there where a network card will compute it.
 */
WAG_INLINE long wag_fix_sctp(wag_ctx *ctx, __u32 off, __u32 size, __u32 diff)
{
	struct wag_crc_shift shift = { .crc = diff, .size = size };
	__u32 check;

	if (wag_load(ctx, off + WAG_SCTP_CHECK, &check, sizeof(check)))
		return -1;
	if (!check)
		return 0;
	bpf_loop(16, wag_crc32c_step, &shift, 0);
	check ^= shift.crc;
	return wag_store_summed(ctx, off + WAG_SCTP_CHECK, &check, sizeof(check));
}

/* The checksum of `count` words, with zeros where it will be. */
WAG_INLINE __u32 wag_sctp_sum(const __u32 *words, __u32 count)
{
	__u32 crc = ~0U;
	__u32 i;

	for (i = 0; i < count; i++)
		crc = wag_crc32c_multiply(wag_crc32c_powers[2], crc ^ words[i]);
	return ~crc;
}

#endif
