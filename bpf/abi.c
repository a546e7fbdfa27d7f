// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Never loaded: holds every type, map and constant that Python shares with the programs, so that their BTF is in one
 * object for tools/generate_abi.py to read.
 */
#include <linux/bpf.h>
#include "waggle/forward.h"
#include "waggle/health_maps.h"
#include "waggle/learn.h"
#include "waggle/nat.h"
#include "waggle/netns.h"
#include "waggle/node_policy.h"
#include "waggle/policy.h"
#include "waggle/policy_assign.h"
#include "waggle/service.h"
#include "waggle/sweep.h"
#include "waggle/translate.h"
#include "waggle/uplink.h"
#include "waggle/vip.h"

struct wag_abi {
	struct wag_event event;
	enum wag_event_kind event_kind;
	enum wag_outcome outcome;
	enum wag_direction direction;
	enum wag_events_of events_of;
	enum wag_counter counter;
	enum wag_verdict verdict;
	enum wag_reason reason;
	enum wag_hook hook;
	enum wag_endpoint_flag endpoint_flag;
	enum wag_netns_id netns_id;
	enum wag_service_flag service_flag;
	enum wag_scope scope;
	enum wag_nat_flag nat_flag;
	struct wag_maglev_backend maglev_backend;
	struct wag_maglev_request maglev_request;
	enum wag_vip_flag vip_flag;
	enum wag_policy_flag policy_flag;
	enum wag_policy_protocol policy_protocol;
	struct wag_policy_request policy_request;
	enum wag_service_range_flag service_range_flag;
} wag_abi;
