// SPDX-License-Identifier: Apache-2.0
/*
 * The plugin "loopback", for nodes that have none: containerd executes one of that name before it asks any network.
 *
 * The agent puts a link of that name beside waggle-cni where nothing else has it. It needs no agent: a pod's namespace
 * gets its loopback interface whether one runs or not.
 */
#define _GNU_SOURCE
#include "json.h"
#include "plugin.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define NAME "lo"

struct text {
	char data[8192];
	size_t length;
};

__attribute__((format(printf, 2, 3))) static void add(struct text *out, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(out->data + out->length, sizeof(out->data) - out->length, format, arguments);
	va_end(arguments);
	out->length += (size_t)length;
	if (out->length >= sizeof(out->data))
		fail(CNI_IO_FAILURE, "the result exceeds %zu bytes", sizeof(out->data));
}

static const char *enter_netns(void)
{
	const char *netns = getenv("CNI_NETNS");

	if (!netns || netns[0] != '/')
		fail(CNI_INVALID_ENVIRONMENT, "CNI_NETNS: not an absolute path");
	int fd = open(netns, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail(errno == ENOENT ? CNI_UNKNOWN_CONTAINER : CNI_INVALID_ENVIRONMENT, "CNI_NETNS: cannot open %s: %s",
		     netns, strerror(errno));
	if (setns(fd, CLONE_NEWNET) < 0)
		fail(CNI_INVALID_ENVIRONMENT, "CNI_NETNS: cannot enter %s: %s", netns, strerror(errno));
	close(fd);
	return netns;
}

static bool is_up(int fd, struct ifreq *interface)
{
	strcpy(interface->ifr_name, NAME);
	if (ioctl(fd, SIOCGIFFLAGS, interface) < 0)
		fail(CNI_IO_FAILURE, "cannot read the state of %s: %s", NAME, strerror(errno));
	return interface->ifr_flags & IFF_UP;
}

static int open_socket(void)
{
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0); /* of any family: it only asks for interfaces */

	if (fd < 0)
		fail(CNI_IO_FAILURE, "socket: %s", strerror(errno));
	return fd;
}

static void bring_up(void)
{
	struct ifreq interface = { 0 };
	int fd = open_socket();

	if (!is_up(fd, &interface)) {
		interface.ifr_flags |= IFF_UP;
		if (ioctl(fd, SIOCSIFFLAGS, &interface) < 0)
			fail(CNI_IO_FAILURE, "cannot set %s up: %s", NAME, strerror(errno));
	}
	close(fd);
}

/* A result of CNI before 1.0.0 says of every address which family it has. */
static void add_addresses(struct text *out, bool with_family)
{
	struct ifaddrs *found;
	const char *separator = "";

	if (getifaddrs(&found) < 0)
		fail(CNI_IO_FAILURE, "cannot read the addresses of %s: %s", NAME, strerror(errno));
	for (struct ifaddrs *one = found; one; one = one->ifa_next) {
		char address[INET6_ADDRSTRLEN];

		if (!one->ifa_addr || strcmp(one->ifa_name, NAME) != 0)
			continue;
		bool ipv4 = one->ifa_addr->sa_family == AF_INET;
		if (!ipv4 && one->ifa_addr->sa_family != AF_INET6)
			continue;
		const void *bytes = ipv4 ? (const void *)&((struct sockaddr_in *)one->ifa_addr)->sin_addr
					 : (const void *)&((struct sockaddr_in6 *)one->ifa_addr)->sin6_addr;
		inet_ntop(one->ifa_addr->sa_family, bytes, address, sizeof(address));
		add(out, "%s{", separator);
		if (with_family)
			add(out, "\"version\":\"%s\",", ipv4 ? "4" : "6");
		add(out, "\"interface\":0,\"address\":\"%s/%s\"}", address, ipv4 ? "8" : "128");
		separator = ",";
	}
	freeifaddrs(found);
}

__attribute__((noreturn)) static void print_result(const char *netns, const char *version)
{
	struct text out = { 0 };
	char quoted[4096];

	add(&out, "{\"cniVersion\":\"%s\",", version);
	json_quote(quoted, sizeof(quoted), netns);
	add(&out, "\"interfaces\":[{\"name\":\"%s\",\"mac\":\"00:00:00:00:00:00\",\"sandbox\":%s}],\"ips\":[", NAME,
	    quoted);
	add_addresses(&out, version[0] == '0');
	add(&out, "]}\n");
	succeed(out.data, out.length);
}

void loopback(const char *command, const char *version)
{
	struct ifreq interface = { 0 };

	if (strcmp(command, "ADD") == 0) {
		const char *netns = enter_netns();
		bring_up();
		print_result(netns, version);
	}
	if (strcmp(command, "CHECK") == 0) {
		enter_netns();
		if (!is_up(open_socket(), &interface))
			fail(CNI_IO_FAILURE, "%s is down", NAME);
		succeed("", 0);
	}
	/* the interface ends with its namespace, and nothing is kept anywhere */
	if (strcmp(command, "DEL") == 0 || strcmp(command, "GC") == 0 || strcmp(command, "STATUS") == 0)
		succeed("", 0);
	fail(CNI_INVALID_ENVIRONMENT, "CNI_COMMAND: unknown; known are ADD, DEL, CHECK, GC, STATUS, VERSION");
}
