// SPDX-License-Identifier: Apache-2.0
// The server of the benchmark: one process, one epoll loop, doing as little as it can so that the network shows.
//
//   server --port P [--cpu N] [--end-with-parent]
//
//   TCP P      echoes what it reads and closes when the client has
//   TCP P+1    reads and drops everything: the sink of the bulk test
//   UDP P      echoes every datagram
//
// All on IPv4 and IPv6. Prints "ready" when every socket listens.
#define _GNU_SOURCE
#include <getopt.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>

#include "sockets.h"

enum kind { LISTEN_ECHO, LISTEN_SINK, DATAGRAMS, CONNECTION_ECHO, CONNECTION_SINK };

// epoll_data: kind in the upper, descriptor in the lower half
static uint64_t tag(enum kind kind, int fd)
{
	return (uint64_t)kind << 32 | (uint32_t)fd;
}

static char buffer[256 * 1024];

static void watch(int poller, int fd, enum kind kind)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = tag(kind, fd)};

	if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

// One socket for both families: an IPv6 socket that takes IPv4 as mapped addresses.
static int open_socket(int type, uint16_t port)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = in6addr_any};
	int fd = socket(AF_INET6, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int on = 1, off = 0;

	if (fd < 0)
		die("socket");
	if (setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)) ||
	    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)))
		die("setsockopt");
	if (bind(fd, (struct sockaddr *)&any, sizeof(any)))
		die("cannot bind port %u", port);
	if (type == SOCK_STREAM && listen(fd, 4096))
		die("cannot listen on port %u", port);
	return fd;
}

static void accept_all(int poller, int listener, enum kind kind)
{
	int on = 1, fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		watch(poller, fd, kind);
	}
	if (errno != EAGAIN && errno != ECONNABORTED)
		die("accept");
}

static void echo(int fd)
{
	ssize_t length = recv(fd, buffer, sizeof(buffer), 0);

	// Messages are far smaller than the socket buffer and one is under way at a time: a short send is an error.
	if (length > 0 && send(fd, buffer, (size_t)length, MSG_NOSIGNAL) == length)
		return;
	if (length < 0 && errno == EAGAIN)
		return;
	close(fd);
}

static void sink(int fd)
{
	ssize_t length = recv(fd, buffer, sizeof(buffer), 0);

	if (length == 0 || (length < 0 && errno != EAGAIN))
		close(fd);
}

static void echo_datagrams(int fd)
{
	struct address from;
	ssize_t length;

	for (;;) {
		from.length = sizeof(from.storage);
		length = recvfrom(fd, buffer, sizeof(buffer), 0, (struct sockaddr *)&from.storage, &from.length);
		if (length < 0)
			return; // EAGAIN, or an ICMP error for a client that is gone
		sendto(fd, buffer, (size_t)length, 0, (struct sockaddr *)&from.storage, from.length);
	}
}

static void serve(int poller)
{
	struct epoll_event events[64];

	for (;;) {
		int count = epoll_wait(poller, events, 64, -1);

		if (count < 0 && errno != EINTR)
			die("epoll_wait");
		for (int i = 0; i < count; i++) {
			int fd = (int)(uint32_t)events[i].data.u64;

			switch ((enum kind)(events[i].data.u64 >> 32)) {
			case LISTEN_ECHO:
				accept_all(poller, fd, CONNECTION_ECHO);
				break;
			case LISTEN_SINK:
				accept_all(poller, fd, CONNECTION_SINK);
				break;
			case DATAGRAMS:
				echo_datagrams(fd);
				break;
			case CONNECTION_ECHO:
				echo(fd);
				break;
			case CONNECTION_SINK:
				sink(fd);
				break;
			}
		}
	}
}

int main(int count, char **arguments)
{
	static const struct option options[] = {
		{"port", required_argument, NULL, 'p'},
		{"cpu", required_argument, NULL, 'c'},
		{"end-with-parent", no_argument, NULL, 'e'},
		{0},
	};
	int option, poller;
	uint16_t port = 0;

	while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
		switch (option) {
		case 'p':
			port = (uint16_t)atoi(optarg);
			break;
		case 'c':
			stay_on_cpu(atoi(optarg));
			break;
		case 'e':
			end_with_parent();
			break;
		default:
			return 2;
		}
	}
	errno = 0;
	if (!port || optind != count)
		die("usage: server --port P [--cpu N] [--end-with-parent]");
	poller = epoll_create1(EPOLL_CLOEXEC);
	if (poller < 0)
		die("epoll_create1");
	watch(poller, open_socket(SOCK_STREAM, port), LISTEN_ECHO);
	watch(poller, open_socket(SOCK_STREAM, (uint16_t)(port + 1)), LISTEN_SINK);
	watch(poller, open_socket(SOCK_DGRAM, port), DATAGRAMS);
	puts("ready");
	fflush(stdout);
	serve(poller);
}
