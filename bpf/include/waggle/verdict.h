/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a program may decide, and why a packet may be dropped. Helpers return enum wag_verdict; only a SEC() function
 * turns it into what the hook wants, through forward.h. TC_ACT_SHOT stands in forward.h alone.
 */
#ifndef WAGGLE_VERDICT_H
#define WAGGLE_VERDICT_H

#include <linux/types.h>

enum wag_verdict {
	WAG_PASS = 0,     /* the host stack goes on with the packet */
	WAG_TO_POD = 1,   /* straight into a local pod */
	WAG_TO_WIRE = 2,  /* out of another interface, by the kernel's routes */
	WAG_DROP = 3,     /* with a reason */
	WAG_REJECT = 4,   /* as a drop, and the sender is told at once: TCP reset or ICMP error */
	WAG_NEXT = 5,     /* not decided here: the program goes on */
	WAG_SEND_BACK = 6, /* the packet is its own answer by now and goes back where it came from */
};

enum wag_reason {
	WAG_REASON_NONE = 0,
	WAG_REASON_MALFORMED = 1,     /* IP or transport header cut short or impossible */
	WAG_REASON_NO_BACKEND = 2,    /* a Service without any usable endpoint */
	WAG_REASON_FRAGMENT = 3,      /* a later fragment to a Service whose first one was not translated here */
	WAG_REASON_NAT_PORTS = 4,     /* no free source port for SNAT */
	WAG_REASON_NAT_FULL = 5,      /* the NAT table took no entry */
	WAG_REASON_REWRITE = 6,       /* the packet could not be rewritten */
	WAG_REASON_NO_NODE_IP = 7,    /* SNAT needed, but this node has no address of the family */
	WAG_REASON_STALE_BACKEND = 8, /* the backend record is missing: tables are inconsistent */
	WAG_REASON_NO_LOCAL_BACKEND = 9, /* traffic policy Local, and the usable endpoints are on other nodes */
	WAG_REASON_SOURCE_RANGE = 10,    /* the client is in none of the Service's loadBalancerSourceRanges */
	WAG_REASON_NO_PORT = 11,         /* a cluster address of a Service, and a port that none defines there */
	WAG_REASON_FREE_ADDRESS = 12,    /* an address of a Service range that no Service has */
	WAG_REASON_TOO_BIG = 13, /* translated, it does not fit the way to the backend; the sender is told */
	WAG_REASON_EXPIRED = 14, /* translated, and its time to live is over; the sender is told */
	WAG_REASON_NO_ROUTE = 15, /* no route to the backend's node */
	WAG_REASON_POLICY_INGRESS = 16, /* policies of the pod that it is for do not let it in */
	WAG_REASON_POLICY_EGRESS = 17,  /* policies of the pod that sends it do not let it out */
	WAG_REASON_POLICY_PENDING = 18, /* which policies the pod has is not known yet */
	WAG_REASON_SPOOFED = 19, /* a pod sends it with an address that is not its own */
	WAG_REASON_NODE_POLICY_INGRESS = 20, /* policies of the node do not let it in */
	WAG_REASON_NODE_POLICY_EGRESS = 21,  /* policies of the node do not let it out */
	WAG_REASON_MAX = 32,
};

/* Is the sender told at once? Nothing will ever listen there, and nobody else could answer. */
static inline __attribute__((always_inline)) int wag_reason_rejects(enum wag_reason reason)
{
	return reason == WAG_REASON_NO_BACKEND || reason == WAG_REASON_NO_PORT;
}

enum wag_hook {
	WAG_HOOK_SOCKET = 0,
	WAG_HOOK_POD_EGRESS = 1,
	WAG_HOOK_POD_INGRESS = 2,
	WAG_HOOK_NODE_INGRESS = 3,
	WAG_HOOK_NODE_EGRESS = 4,
	WAG_HOOK_XDP = 5,
	WAG_HOOK_MAX = 8,
};

#endif
