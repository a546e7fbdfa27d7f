/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef WAGGLE_POLICY_ASSIGN_H
#define WAGGLE_POLICY_ASSIGN_H

#include "addr.h"

/* What wag_policy_assign is told. */
struct wag_policy_request {
	struct wag_addr addr;
	__u64 ingress; /* sets of wag_policy */
	__u64 egress;
};

#endif
