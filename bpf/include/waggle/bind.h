/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Ports of the node that lead to Services or pods are not for its processes to bind: what they would listen for is
 * translated before it reaches them. Whoever tries learns it at once. Pods have ports of their own.
 */
#ifndef WAGGLE_BIND_H
#define WAGGLE_BIND_H

#include <linux/bpf.h>
#include "addr.h"
#include "config.h"
#include "endpoint.h"
#include "service.h"

/* Does a port of any address of the node, of the family of `any`, lead elsewhere where a socket bound to `addr` listens? */
WAG_INLINE bool wag_bind_meets(const struct wag_addr *any, const struct wag_addr *addr, __be16 port, __u8 proto)
{
	struct wag_service *service = wag_service_find_nodeport(any, port, proto);

	if (!service || (service->flags & WAG_SERVICE_HELD))
		return false;
	if (wag_addr_is_any(addr))
		return true;
	if (wag_addr_is_loopback(addr))
		return wag_serves_at(service, wag_loopback_nodeport);
	return wag_serves_at(service, wag_endpoint_is(wag_endpoint_find(addr), WAG_ENDPOINT_NODEPORT));
}

/* Would a socket of the node that binds `addr` and `port` listen in vain? */
WAG_INLINE bool wag_bind_in_vain(const struct wag_addr *addr, __be16 port, __u8 proto)
{
	struct wag_service *service;
	struct wag_addr any4;

	if (wag_bind_meets(addr, addr, port, proto))
		return true;
	if (wag_addr_is_any(addr)) {
		if (wag_addr_is4(addr))
			return false;
		/* [::] takes IPv4 too, unless it was told not to, which no program is shown */
		wag_addr_set4(&any4, 0);
		return wag_bind_meets(&any4, addr, port, proto);
	}
	service = wag_service_find(addr, port, proto);
	return service && (service->flags & (WAG_SERVICE_HOST_PORT | WAG_SERVICE_HELD)) == WAG_SERVICE_HOST_PORT;
}

#endif
