// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Connected UDP sockets whose backend serves no more. Nothing sees their packets: they carry the backend's address. So the
 * agent has this iterator walk the UDP sockets of a network namespace when a UDP Service has lost a backend; a socket that
 * asked for a Service and has a backend that may not keep it is aborted. Its owner gets ECONNABORTED and connects again,
 * to a backend that serves. Sockets that asked for a pod itself are left alone, and so is a Service without any backend.
 * What the agent reads from it has a byte for each socket aborted.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include "waggle/service.h"
#include "waggle/socket.h"
#include <bpf/bpf_core_read.h>

/* Of the kernel's own types only what is read here; offsets come from the kernel's BTF. */
struct sock_common {
	__be16 skc_dport;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));

struct udp_sock;

struct bpf_iter_meta {
	struct seq_file *seq;
} __attribute__((preserve_access_index));

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
} __attribute__((preserve_access_index));

extern int bpf_sock_destroy(struct sock_common *sk) __ksym;

SEC("iter/udp")
int wag_stale_udp(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (struct sock *)ctx->udp_sk;
	struct wag_service *service;
	struct wag_sk_entry *entry;

	if (!sk || !sk->__sk_common.skc_dport)
		return 0;
	entry = bpf_sk_storage_get(&wag_sk_peer, sk, NULL, 0);
	if (!entry)
		return 0;
	service = wag_service_find(&entry->frontend, entry->fport, IPPROTO_UDP);
	if (!service)
		service = wag_service_find_nodeport(&entry->frontend, entry->fport, IPPROTO_UDP);
	if (!service || !service->count || service->revision == entry->revision)
		return 0;
	if (wag_backend_keeps(service, &entry->backend, entry->bport))
		entry->revision = service->revision;
	else if (!bpf_sock_destroy(&sk->__sk_common))
		bpf_seq_write(ctx->meta->seq, "x", 1);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
