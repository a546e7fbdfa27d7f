/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the health port of a Service answers. Only types: health/waggle-health.c, which answers, shares them.
 */
#ifndef WAGGLE_HEALTH_H
#define WAGGLE_HEALTH_H

#include <linux/types.h>

/* A port to listen on; one per family, because the endpoints of a Service are those of a family. */
struct wag_health_key {
	__be16 port;   /* spec.healthCheckNodePort */
	__u16 family;  /* 4 or 6 */
};

struct wag_health {
	__u32 endpoints;    /* addresses of ready endpoints on this node */
	char namespace[64]; /* NUL-padded, as is the name; labels of the DNS, 63 characters at most */
	char name[64];
};

#endif
