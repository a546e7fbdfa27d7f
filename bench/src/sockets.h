// SPDX-License-Identifier: Apache-2.0
// What the load generator and the server share: addresses, failing loudly, staying on one CPU.
#pragma once

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct address {
	struct sockaddr_storage storage;
	socklen_t length;
};

// One line on stderr, with the reason of errno where it is set, and exit status 1.
__attribute__((noreturn, format(printf, 1, 2))) static inline void die(const char *format, ...)
{
	int error = errno;
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, error ? ": %s\n" : "\n", strerror(error));
	exit(1);
}

static inline uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

// "10.0.0.1:80" or "[fd00::1]:80"
static inline struct address parse_address(const char *text)
{
	struct address address = {0};
	struct sockaddr_in *v4 = (void *)&address.storage;
	struct sockaddr_in6 *v6 = (void *)&address.storage;
	char host[64];
	const char *colon = strrchr(text, ':');
	size_t length;

	errno = 0;
	if (!colon || (size_t)(colon - text) >= sizeof(host))
		die("%s is not ADDRESS:PORT", text);
	length = (size_t)(colon - text);
	if (text[0] == '[' && length > 2) {
		memcpy(host, text + 1, length - 2);
		host[length - 2] = 0;
	} else {
		memcpy(host, text, length);
		host[length] = 0;
	}
	if (inet_pton(AF_INET, host, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons((uint16_t)atoi(colon + 1));
		address.length = sizeof(*v4);
	} else if (inet_pton(AF_INET6, host, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons((uint16_t)atoi(colon + 1));
		address.length = sizeof(*v6);
	} else {
		die("%s is not ADDRESS:PORT", text);
	}
	return address;
}

// Same host and port; other fields (scope, flow label) do not count.
static inline bool same_address(const struct address *a, const struct address *b)
{
	const struct sockaddr_in *a4 = (const void *)&a->storage, *b4 = (const void *)&b->storage;
	const struct sockaddr_in6 *a6 = (const void *)&a->storage, *b6 = (const void *)&b->storage;

	if (a->storage.ss_family != b->storage.ss_family)
		return false;
	if (a->storage.ss_family == AF_INET)
		return a4->sin_port == b4->sin_port && a4->sin_addr.s_addr == b4->sin_addr.s_addr;
	return a6->sin6_port == b6->sin6_port && !memcmp(&a6->sin6_addr, &b6->sin6_addr, sizeof(a6->sin6_addr));
}

static inline void stay_on_cpu(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("cannot run on CPU %d", cpu);
}

// A harness that is killed must not leave load generators behind.
static inline void end_with_parent(void)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		die("cannot ask to end with the parent");
}
