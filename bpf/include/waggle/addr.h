/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Addresses. One 16-byte form serves both families: an IPv4 address a.b.c.d is ::ffff:a.b.c.d, as IPv6 sockets
 * themselves show it. Maps, tuples and configuration all hold this form, so there are no per-family twins.
 */
#ifndef WAGGLE_ADDR_H
#define WAGGLE_ADDR_H

#include <linux/types.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define WAG_INLINE static __always_inline

struct wag_addr {
	union {
		__u8 bytes[16];
		__be32 word[4];
		__u64 half[2];
	};
};

WAG_INLINE void wag_addr_set4(struct wag_addr *addr, __be32 ip)
{
	addr->half[0] = 0;
	addr->word[2] = bpf_htonl(0xffff);
	addr->word[3] = ip;
}

WAG_INLINE bool wag_addr_is4(const struct wag_addr *addr)
{
	return addr->half[0] == 0 && addr->word[2] == bpf_htonl(0xffff);
}

WAG_INLINE bool wag_addr_equal(const struct wag_addr *a, const struct wag_addr *b)
{
	return a->half[0] == b->half[0] && a->half[1] == b->half[1];
}

/* 127.0.0.0/8 or ::1. */
WAG_INLINE bool wag_addr_is_loopback(const struct wag_addr *addr)
{
	if (wag_addr_is4(addr))
		return addr->bytes[12] == 127;
	return addr->half[0] == 0 && addr->half[1] == bpf_cpu_to_be64(1);
}

/* Multicast, broadcast, and what IPv6 never forwards: routes to single receivers mean nothing. */
WAG_INLINE bool wag_addr_stays_on_link(const struct wag_addr *addr)
{
	if (wag_addr_is4(addr))
		return addr->bytes[12] >= 224;
	return addr->bytes[0] == 0xff || (addr->bytes[0] == 0xfe && (addr->bytes[1] & 0xc0) == 0x80);
}

/* fe80::/10: between two ends of one link. */
WAG_INLINE bool wag_addr_is_link_local6(const struct wag_addr *addr)
{
	return addr->bytes[0] == 0xfe && (addr->bytes[1] & 0xc0) == 0x80;
}

/* 0.0.0.0 or ::. */
WAG_INLINE bool wag_addr_is_any(const struct wag_addr *addr)
{
	return addr->half[0] == 0 && (addr->half[1] == 0 || (wag_addr_is4(addr) && addr->word[3] == 0));
}

/* The address that stands for "any address of this node" in a frontend: 0.0.0.0 or ::, by the family of `like`. */
WAG_INLINE void wag_addr_set_any(struct wag_addr *addr, const struct wag_addr *like)
{
	if (wag_addr_is4(like)) {
		wag_addr_set4(addr, 0);
	} else {
		addr->half[0] = 0;
		addr->half[1] = 0;
	}
}

#endif
