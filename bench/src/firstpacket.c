// SPDX-License-Identifier: Apache-2.0
// How long the first packet of a flow takes: connects to one address after another, each once.
//
//   firstpacket [--cpu N] [--pause MICROSECONDS] <ADDRESSES
//
// Reads ADDRESS:PORT lines from standard input. For each it makes a TCP connection from a fresh socket and takes the
// time that connect() needs: the SYN there and the SYN-ACK back. Over virtual interfaces all of that happens on this
// CPU within the system call, so that no wakeup is in the time. Then it resets the connection, so that nothing
// stays, and pauses, so that what the other side still has to do does not fall into the next one. Prints
// one JSON list of nanoseconds, in the order of the addresses. A connection that is refused or takes a second
// ends it with status 1.
#define _GNU_SOURCE
#include <getopt.h>

#include "sockets.h"

static uint64_t connect_once(const struct address *address)
{
	const struct sockaddr *peer = (const struct sockaddr *)&address->storage;
	struct linger at_once = {.l_onoff = 1, .l_linger = 0};
	struct timeval patience = {.tv_sec = 1};
	int fd = socket(peer->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	uint64_t started, took;

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) ||
	    setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once)))
		die("socket");
	started = now_ns();
	if (connect(fd, peer, address->length))
		die("connect");
	took = now_ns() - started;
	if (close(fd))
		die("close");
	return took;
}

int main(int count, char **arguments)
{
	static const struct option options[] = {
		{"cpu", required_argument, NULL, 'c'},
		{"pause", required_argument, NULL, 'p'},
		{0},
	};
	struct timespec pause = {.tv_nsec = 200000};
	const char *separator = "[";
	char line[128];
	int option;

	while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
		switch (option) {
		case 'c':
			stay_on_cpu(atoi(optarg));
			break;
		case 'p':
			pause.tv_nsec = atol(optarg) * 1000;
			break;
		default:
			return 2;
		}
	}
	end_with_parent();
	while (fgets(line, sizeof(line), stdin)) {
		struct address address;

		line[strcspn(line, "\n")] = 0;
		address = parse_address(line);
		nanosleep(&pause, NULL);
		printf("%s%llu", separator, (unsigned long long)connect_once(&address));
		separator = ",";
	}
	errno = 0;
	if (*separator == '[')
		die("no address on standard input");
	puts("]");
	return 0;
}
