// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Gives a pod's address its policies, in place. The agent cannot: it can only replace an entry, and programs write to the
 * entries of wag_endpoints too.
 */
#include <linux/bpf.h>
#include "waggle/endpoint.h"
#include "waggle/policy_assign.h"

/* 1: done; 0: there is no such endpoint. */
SEC("syscall")
int wag_policy_assign(struct wag_policy_request *request)
{
	struct wag_addr addr = request->addr;
	struct wag_endpoint *endpoint = wag_endpoint_find(&addr);

	if (!endpoint)
		return 0;
	endpoint->ingress_policy = request->ingress;
	endpoint->egress_policy = request->egress;
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
