// SPDX-License-Identifier: Apache-2.0
// The load generator of the benchmark: closed loop, one process, prints one JSON line.
//
//   client --test TEST --target ADDRESS:PORT… [--seconds S] [--warmup S] [--slots N] [--size BYTES]
//          [--close fin|rst] [--cpu N] [--end-with-parent]
//
//   connect       connect, one message each way, close. Counted: whole connections.
//   request       request/response on N open TCP connections, one request under way on each.
//   udp           the same with connected UDP sockets.
//   udp-sendto    the same with unconnected sockets: the address is given with every datagram, and the answer must
//                 come from that address.
//   bulk          one TCP connection, sending as fast as it goes. Counted: bytes acknowledged by the other side.
//
// `--slots` is how many exchanges are under way at a time; each starts the next when it ends. Targets are taken in
// turn. Anything unexpected (refused, reset, short answer, silence of a second) ends the run with status 1: a
// figure with failures in it is not a figure. Lost datagrams are sent again and counted.
//
// Closing: with `fin` the client sends FIN, waits for the server's and then closes; with `rst` it resets. A normal
// close leaves a socket in TIME_WAIT that holds its port for a minute, and 20,000 connections per second would run
// out of ports in a few seconds; the harness therefore sets net.ipv4.tcp_max_tw_buckets to 0 in the client's network
// namespace, which drops that socket when the close is complete. Every variant closes in the same way.
#define _GNU_SOURCE
#include <getopt.h>
#include <linux/tcp.h>
#include <sys/epoll.h>

#include "histogram.h"
#include "sockets.h"

#define MAX_TARGETS 64
#define MAX_SLOTS 1024
#define SILENCE_NS 1000000000ull
#define RESEND_NS 200000000ull

enum test { TEST_CONNECT, TEST_REQUEST, TEST_UDP, TEST_UDP_SENDTO, TEST_BULK };
static const char *const test_names[] = {"connect", "request", "udp", "udp-sendto", "bulk"};

enum state { CONNECTING, WAIT_REPLY, WAIT_END };

struct slot {
	int fd;
	enum state state;
	const struct address *target;
	uint64_t started; // of the exchange that is counted
	uint64_t sent;    // of the last request
};

static struct {
	enum test test;
	struct address targets[MAX_TARGETS];
	unsigned target_count;
	double seconds, warmup;
	unsigned slots;
	size_t size;
	bool reset;
} settings = {.seconds = 1, .warmup = 0.2, .slots = 1, .size = 1};

static struct histogram latencies;
static struct slot slots[MAX_SLOTS];
static char message[65536];
static int poller;
static uint64_t measure_from, measure_until;
static uint64_t lost, connections;
static unsigned next_target;

static bool is_tcp(void)
{
	return settings.test == TEST_CONNECT || settings.test == TEST_REQUEST || settings.test == TEST_BULK;
}

static void count_exchange(const struct slot *slot, uint64_t now)
{
	if (now >= measure_from && now < measure_until)
		histogram_add(&latencies, now - slot->started);
}

static void send_request(struct slot *slot, uint64_t now)
{
	ssize_t length;

	if (settings.test == TEST_UDP_SENDTO)
		length = sendto(slot->fd, message, settings.size, MSG_NOSIGNAL,
				(const struct sockaddr *)&slot->target->storage, slot->target->length);
	else
		length = send(slot->fd, message, settings.size, MSG_NOSIGNAL);
	if (length != (ssize_t)settings.size)
		die("send");
	slot->sent = now;
	slot->state = WAIT_REPLY;
}

static void open_slot(struct slot *slot, uint64_t now)
{
	struct epoll_event event = {.events = EPOLLIN | (is_tcp() ? EPOLLOUT : 0) | EPOLLET, .data.ptr = slot};
	const struct sockaddr *peer;
	int on = 1;

	slot->target = &settings.targets[next_target++ % settings.target_count];
	peer = (const struct sockaddr *)&slot->target->storage;
	slot->fd = socket(peer->sa_family, (is_tcp() ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (slot->fd < 0)
		die("socket");
	if (is_tcp() && setsockopt(slot->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)))
		die("TCP_NODELAY");
	slot->started = slot->sent = now;
	slot->state = CONNECTING;
	if (settings.test != TEST_UDP_SENDTO && connect(slot->fd, peer, slot->target->length) && errno != EINPROGRESS)
		die("connect");
	if (epoll_ctl(poller, EPOLL_CTL_ADD, slot->fd, &event))
		die("epoll_ctl");
	connections++;
	if (!is_tcp())
		send_request(slot, now);
}

static void close_slot(struct slot *slot)
{
	struct linger at_once = {.l_onoff = 1, .l_linger = 0};

	if (settings.reset && is_tcp() && setsockopt(slot->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once)))
		die("SO_LINGER");
	if (close(slot->fd))
		die("close");
}

// True when a whole answer was read; false when it has not come yet.
static bool read_reply(struct slot *slot)
{
	struct address from = {.length = sizeof(from.storage)};
	static char reply[sizeof(message)];
	ssize_t length = recvfrom(slot->fd, reply, sizeof(reply), 0, (struct sockaddr *)&from.storage, &from.length);

	if (length < 0 && errno == EAGAIN)
		return false;
	if (length != (ssize_t)settings.size) {
		if (length >= 0)
			errno = 0;
		die("answer of %zd bytes instead of %zu", length, settings.size);
	}
	errno = 0;
	if (settings.test == TEST_UDP_SENDTO && !same_address(&from, slot->target))
		die("the answer came from another address than the request went to");
	return true;
}

static bool read_end(struct slot *slot)
{
	char byte;
	ssize_t length = recv(slot->fd, &byte, 1, 0);

	if (length < 0 && errno == EAGAIN)
		return false;
	if (length)
		die("expected the end of the connection");
	return true;
}

static void check_connected(struct slot *slot)
{
	socklen_t length = sizeof(int);
	int error = 0;

	getsockopt(slot->fd, SOL_SOCKET, SO_ERROR, &error, &length);
	if (error) {
		errno = error;
		die("connect");
	}
}

static void finish_connection(struct slot *slot)
{
	uint64_t now = now_ns();

	count_exchange(slot, now);
	close_slot(slot);
	open_slot(slot, now);
}

static void step(struct slot *slot, uint32_t events)
{
	switch (slot->state) {
	case CONNECTING:
		if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
			return;
		check_connected(slot);
		if (settings.test == TEST_REQUEST)
			slot->started = now_ns();
		send_request(slot, slot->started);
		return;
	case WAIT_REPLY:
		if (!(events & (EPOLLIN | EPOLLERR | EPOLLHUP)) || !read_reply(slot))
			return;
		if (settings.test != TEST_CONNECT) {
			uint64_t now = now_ns();

			count_exchange(slot, now);
			slot->started = now;
			send_request(slot, now);
			return;
		}
		if (settings.reset) {
			finish_connection(slot);
			return;
		}
		if (shutdown(slot->fd, SHUT_WR))
			die("shutdown");
		slot->state = WAIT_END;
		return;
	case WAIT_END:
		if ((events & (EPOLLIN | EPOLLERR | EPOLLHUP)) && read_end(slot))
			finish_connection(slot);
		return;
	}
}

// Silence is an error for TCP and a lost datagram for UDP.
static void check_silence(uint64_t now)
{
	for (unsigned i = 0; i < settings.slots; i++) {
		struct slot *slot = &slots[i];

		if (is_tcp() && now > slot->started + SILENCE_NS) {
			errno = ETIMEDOUT;
			die("no progress in state %d", slot->state);
		}
		if (!is_tcp() && now > slot->sent + RESEND_NS) {
			lost++;
			send_request(slot, now);
		}
	}
}

static void run_exchanges(void)
{
	struct epoll_event events[64];
	uint64_t now = now_ns(), next_check = now + RESEND_NS / 2;

	for (unsigned i = 0; i < settings.slots; i++)
		open_slot(&slots[i], now_ns());
	while ((now = now_ns()) < measure_until) {
		int count = epoll_wait(poller, events, 64, 50);

		if (count < 0 && errno != EINTR)
			die("epoll_wait");
		for (int i = 0; i < count; i++)
			step(events[i].data.ptr, events[i].events);
		if (now > next_check) {
			check_silence(now);
			next_check = now + RESEND_NS / 2;
		}
	}
	for (unsigned i = 0; i < settings.slots; i++)
		close_slot(&slots[i]);
}

static uint64_t bytes_acknowledged(int fd)
{
	struct tcp_info info = {0};
	socklen_t length = sizeof(info);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length))
		die("TCP_INFO");
	return info.tcpi_bytes_acked;
}

static uint64_t run_bulk(double *seconds)
{
	const struct sockaddr *peer = (const struct sockaddr *)&settings.targets[0].storage;
	struct timeval patience = {.tv_sec = 1};
	static char block[128 * 1024];
	uint64_t now, from = 0, begin = 0;
	int fd = socket(peer->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)))
		die("socket");
	if (connect(fd, peer, settings.targets[0].length))
		die("connect");
	connections++;
	while ((now = now_ns()) < measure_until) {
		if (!from && now >= measure_from) {
			from = now;
			begin = bytes_acknowledged(fd);
		}
		if (send(fd, block, sizeof(block), MSG_NOSIGNAL) < 0)
			die("send");
	}
	*seconds = (double)(now - from) / 1e9;
	begin = bytes_acknowledged(fd) - begin;
	close(fd);
	return begin;
}

static void parse_settings(int count, char **arguments)
{
	static const struct option options[] = {
		{"test", required_argument, NULL, 't'},	   {"target", required_argument, NULL, 'a'},
		{"seconds", required_argument, NULL, 's'}, {"warmup", required_argument, NULL, 'w'},
		{"slots", required_argument, NULL, 'n'},   {"size", required_argument, NULL, 'b'},
		{"close", required_argument, NULL, 'x'},   {"cpu", required_argument, NULL, 'c'},
		{"end-with-parent", no_argument, NULL, 'e'}, {0},
	};
	int option;
	bool known = false;

	while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
		switch (option) {
		case 't':
			for (unsigned i = 0; i < sizeof(test_names) / sizeof(*test_names); i++) {
				if (!strcmp(optarg, test_names[i])) {
					settings.test = (enum test)i;
					known = true;
				}
			}
			break;
		case 'a':
			if (settings.target_count == MAX_TARGETS)
				die("at most %d targets", MAX_TARGETS);
			settings.targets[settings.target_count++] = parse_address(optarg);
			break;
		case 's':
			settings.seconds = atof(optarg);
			break;
		case 'w':
			settings.warmup = atof(optarg);
			break;
		case 'n':
			settings.slots = (unsigned)atoi(optarg);
			break;
		case 'b':
			settings.size = (size_t)atol(optarg);
			break;
		case 'x':
			settings.reset = !strcmp(optarg, "rst");
			if (!settings.reset && strcmp(optarg, "fin"))
				die("--close is fin or rst");
			break;
		case 'c':
			stay_on_cpu(atoi(optarg));
			break;
		case 'e':
			end_with_parent();
			break;
		default:
			exit(2);
		}
	}
	errno = 0;
	if (!known || !settings.target_count || optind != count)
		die("usage: client --test TEST --target ADDRESS:PORT…; the head of client.c describes every option");
	if (!settings.slots || settings.slots > MAX_SLOTS || !settings.size || settings.size > sizeof(message) ||
	    settings.seconds <= 0 || settings.warmup < 0)
		die("a setting is out of range");
}

int main(int count, char **arguments)
{
	double seconds;
	uint64_t bytes = 0;

	parse_settings(count, arguments);
	poller = epoll_create1(EPOLL_CLOEXEC);
	if (poller < 0)
		die("epoll_create1");
	measure_from = now_ns() + (uint64_t)(settings.warmup * 1e9);
	measure_until = measure_from + (uint64_t)(settings.seconds * 1e9);
	seconds = settings.seconds;
	if (settings.test == TEST_BULK)
		bytes = run_bulk(&seconds);
	else
		run_exchanges();
	printf("{\"test\":\"%s\",\"seconds\":%.6f,\"exchanges\":%llu,\"bytes\":%llu,\"connections\":%llu,"
	       "\"lost\":%llu,\"p50_us\":%.3f,\"p99_us\":%.3f}\n",
	       test_names[settings.test], seconds, (unsigned long long)latencies.total, (unsigned long long)bytes,
	       (unsigned long long)connections, (unsigned long long)lost, histogram_quantile(&latencies, 0.5) / 1e3,
	       histogram_quantile(&latencies, 0.99) / 1e3);
	return 0;
}
