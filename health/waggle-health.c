// SPDX-License-Identifier: Apache-2.0
/*
 * waggle-health: answers the health ports (spec.healthCheckNodePort) of a node, whether an agent runs or not.
 *
 *	waggle-health CONTROL TABLE OVERDUE CGROUP TAG [LISTENER...]
 *
 * Everything it needs comes as open descriptors: a listening unix socket (SOCK_SEQPACKET), the maps wag_health and
 * wag_overdue, cgroup.procs of the cgroup to live in, and listening TCP sockets of the process that this one replaces. It
 * leaves the agent's session and cgroup, shuts itself into its working directory (an empty one), drops to an unprivileged
 * user, and returns to the agent once it serves. What it answers is looked up when it is asked; nothing is kept.
 *
 * Control, one packet each: "listen *" or "listen ADDRESS..." says where to listen and that the table has changed. The
 * answer, which also comes when a port could be opened later, is TAG and one line "PORT FAMILY ERRNO" for each port that
 * cannot be opened now. "end" ends the process once it has answered whom it has accepted.
 *
 * Anybody who reaches the node may connect. So connections are limited in number, time and rate; the oldest makes way
 * for a new one, and what one client does not finish keeps nobody else waiting.
 */
#define _GNU_SOURCE
#include "waggle/health.h"

#include <arpa/inet.h>
#include <errno.h>
#include <grp.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/queue.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define UNPRIVILEGED 65534 /* nobody */
#define SECOND_NS 1000000000ULL

#define MAX_CONNECTIONS 512
#define MAX_REQUEST 2048u
#define MAX_DISCARDED (64u << 10)
#define CONNECTION_NS (5 * SECOND_NS)
#define SOCKET_BUFFER 8192
#define BACKLOG 128
/* 5,000 connections a second: a flood costs a part of one CPU, whatever its size. */
#define TICK_NS (10 * 1000000ULL)
#define ACCEPTS_PER_TICK 50

#define MAX_ADDRESSES 1024
#define MAX_CONTROLS 4
#define MAX_PACKET (64u << 10)
#define MAX_KEYS (1u << 17) /* read in one pass; a table that changes all the time is read again later */
#define RETRY_NS SECOND_NS
#define DESCRIPTOR_LIMIT 65536
#define SPARE_DESCRIPTORS 64 /* that listeners leave to connections */
#define MEMORY_LIMIT (64ul << 20)

enum kind { CONTROL_LISTENER, CONTROL, LISTENER, CONNECTION };

/* What epoll watches. The first member of everything that has a descriptor. */
struct source {
	enum kind kind;
	int fd; /* -1: none */
};

/* Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d; 0.0.0.0 and :: stand for all of their family. */
struct listener {
	struct source source;
	struct wag_health_key key;
	struct in6_addr address;
	int error; /* why it is not open */
	struct listener *next;
};

struct connection {
	struct source source;
	struct wag_health_key key;
	bool answered; /* what comes now is discarded: closing on unread data would take the answer back */
	unsigned long long deadline;
	size_t length; /* of the request; once answered, of what was discarded */
	char request[MAX_REQUEST];
	TAILQ_ENTRY(connection) link;
};

TAILQ_HEAD(connections, connection);

static const char *tag;
static int epoll, table, overdue;
static struct source control_listener = { CONTROL_LISTENER, -1 };
static struct source controls[MAX_CONTROLS];
static struct listener *listeners[65536]; /* by port */
static struct connection pool[MAX_CONNECTIONS];
static struct connections open_connections = TAILQ_HEAD_INITIALIZER(open_connections); /* the oldest first */
static struct connections free_connections = TAILQ_HEAD_INITIALIZER(free_connections);
static struct in6_addr addresses[MAX_ADDRESSES];
static size_t address_count;
static bool told;	   /* where to listen */
static bool every_address;
static bool table_changed; /* or where to listen */
static bool ending;	   /* nobody new is accepted, by this process at least */
static size_t failures;	   /* ports that cannot be opened */
static unsigned long long retry_at;

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

static unsigned long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (unsigned long long)now.tv_sec * SECOND_NS + (unsigned long long)now.tv_nsec;
}

/* -- the tables --------------------------------------------------------------------------------------------------- */

static bool lookup(int map, const void *key, void *value)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.map_fd = (__u32)map;
	attr.key = (__u64)(unsigned long)key;
	attr.value = (__u64)(unsigned long)value;
	return syscall(SYS_bpf, BPF_MAP_LOOKUP_ELEM, &attr, sizeof(attr)) == 0;
}

/* The key after `key`, or the first one. */
static bool next_key(const struct wag_health_key *key, struct wag_health_key *next)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.map_fd = (__u32)table;
	attr.key = (__u64)(unsigned long)key;
	attr.next_key = (__u64)(unsigned long)next;
	return syscall(SYS_bpf, BPF_MAP_GET_NEXT_KEY, &attr, sizeof(attr)) == 0;
}

/* Whether no change has waited too long to be in the tables. */
static bool is_proxy_healthy(void)
{
	__u32 first = 0;
	__u64 due;

	return lookup(overdue, &first, &due) && (!due || now_ns() < due);
}

/* -- connections -------------------------------------------------------------------------------------------------- */

static void watch(struct source *source)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = source };

	epoll_ctl(epoll, EPOLL_CTL_ADD, source->fd, &event);
}

static void disconnect(struct connection *c)
{
	close(c->source.fd);
	c->source.fd = -1;
	TAILQ_REMOVE(&open_connections, c, link);
	TAILQ_INSERT_HEAD(&free_connections, c, link);
}

/* Sends an answer, which always fits into an empty socket buffer, and reads the rest of what the client has to say. */
static void answer(struct connection *c, const char *text, int length)
{
	if (send(c->source.fd, text, (size_t)length, MSG_NOSIGNAL) != length) {
		disconnect(c);
		return;
	}
	shutdown(c->source.fd, SHUT_WR);
	c->answered = true;
	c->length = 0;
}

static void refuse(struct connection *c, const char *status)
{
	char text[128];

	answer(c, text, snprintf(text, sizeof(text), "HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
				 status));
}

/* A name as it may stand in JSON, whatever the table holds: labels of the DNS have nothing else. */
static const char *plain(char *name, size_t size)
{
	name[size - 1] = '\0';
	for (char *at = name; *at; at++)
		if (!strchr("abcdefghijklmnopqrstuvwxyz0123456789-.", *at))
			*at = '?';
	return name;
}

static void answer_health(struct connection *c, bool with_body)
{
	char body[512], text[1024];
	struct wag_health health;

	if (!lookup(table, &c->key, &health)) {
		disconnect(c); /* the Service is gone, and so will be the listener */
		return;
	}
	bool healthy = is_proxy_healthy();
	int length = snprintf(body, sizeof(body),
			      "{\"service\": {\"namespace\": \"%s\", \"name\": \"%s\"}, \"localEndpoints\": %u, "
			      "\"serviceProxyHealthy\": %s}\n",
			      plain(health.namespace, sizeof(health.namespace)), plain(health.name, sizeof(health.name)),
			      health.endpoints, healthy ? "true" : "false");
	length = snprintf(text, sizeof(text),
			  "HTTP/1.1 %s\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n"
			  "X-Load-Balancing-Endpoint-Weight: %u\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
			  health.endpoints && healthy ? "200 OK" : "503 Service Unavailable", health.endpoints, length,
			  with_body ? body : "");
	answer(c, text, length);
}

/* Whether a line is "METHOD target HTTP/1.x". */
static bool is_request_line(const char *line, size_t length)
{
	const char version[] = " HTTP/1.";
	size_t method = strspn(line, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), tail = strlen(version) + 1;

	return method && length > method + 1 + tail && line[method] == ' ' &&
	       strncmp(line + length - tail, version, strlen(version)) == 0;
}

static void read_request(struct connection *c)
{
	ssize_t got = recv(c->source.fd, c->request + c->length, MAX_REQUEST - 1 - c->length, 0);

	if (got <= 0) {
		if (got == 0 || (errno != EAGAIN && errno != EINTR))
			disconnect(c);
		return;
	}
	c->length += (size_t)got;
	c->request[c->length] = '\0';
	if (c->request[0] < 'A' || c->request[0] > 'Z' || strlen(c->request) != c->length) {
		refuse(c, "400 Bad Request");
	} else if (strstr(c->request, "\r\n\r\n") || strstr(c->request, "\n\n")) {
		if (is_request_line(c->request, strcspn(c->request, "\r\n")))
			answer_health(c, strncmp(c->request, "HEAD ", 5) != 0);
		else
			refuse(c, "400 Bad Request");
	} else if (c->length == MAX_REQUEST - 1) {
		refuse(c, "431 Request Header Fields Too Large");
	}
}

static void discard(struct connection *c)
{
	ssize_t got = recv(c->source.fd, c->request, MAX_REQUEST, 0);

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	c->length += got > 0 ? (size_t)got : 0;
	if (got <= 0 || c->length > MAX_DISCARDED)
		disconnect(c);
}

/* Waits where more was accepted in this moment than the node should spend on it. The kernel queues, or refuses, the rest. */
static void keep_rate(void)
{
	static unsigned long long tick_end;
	static unsigned int accepted;
	unsigned long long now = now_ns();

	if (now < tick_end && accepted == ACCEPTS_PER_TICK) {
		nanosleep(&(struct timespec){ .tv_nsec = (long)(tick_end - now) }, NULL);
		now = tick_end;
	}
	if (now >= tick_end) {
		tick_end = now + TICK_NS;
		accepted = 0;
	}
	accepted++;
}

static void accept_connection(const struct listener *from)
{
	keep_rate();
	int fd = accept4(from->source.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	if (fd < 0) {
		if (errno != EMFILE && errno != ENFILE && errno != ENOMEM && errno != ENOBUFS)
			return; /* the client has gone away */
		if (!TAILQ_EMPTY(&open_connections))
			disconnect(TAILQ_FIRST(&open_connections));
		nanosleep(&(struct timespec){ .tv_nsec = (long)TICK_NS }, NULL);
		return;
	}
	if (TAILQ_EMPTY(&free_connections))
		disconnect(TAILQ_FIRST(&open_connections));
	struct connection *c = TAILQ_FIRST(&free_connections);
	TAILQ_REMOVE(&free_connections, c, link);
	TAILQ_INSERT_TAIL(&open_connections, c, link);
	c->source.fd = fd;
	c->key = from->key;
	c->answered = false;
	c->deadline = now_ns() + CONNECTION_NS;
	c->length = 0;
	watch(&c->source);
	read_request(c);
}

static bool is_all_answered(void)
{
	struct connection *c;

	TAILQ_FOREACH(c, &open_connections, link)
		if (!c->answered)
			return false;
	return true;
}

static void expire(void)
{
	unsigned long long now = now_ns();
	struct connection *oldest;

	while ((oldest = TAILQ_FIRST(&open_connections)) && oldest->deadline <= now)
		disconnect(oldest);
}

/* -- listeners ---------------------------------------------------------------------------------------------------- */

static bool is_same(const struct in6_addr *a, const struct in6_addr *b)
{
	return memcmp(a, b, sizeof(*a)) == 0;
}

static struct in6_addr any_address(__u16 family)
{
	struct in6_addr any = IN6ADDR_ANY_INIT;

	if (family == 4)
		any.s6_addr[10] = any.s6_addr[11] = 0xff;
	return any;
}

static __u16 family_of(const struct in6_addr *address)
{
	return IN6_IS_ADDR_V4MAPPED(address) ? 4 : 6;
}

static bool is_wanted(const struct listener *l)
{
	struct in6_addr any = any_address(l->key.family);
	struct wag_health health;

	if (!lookup(table, &l->key, &health))
		return false;
	if (every_address)
		return is_same(&l->address, &any);
	for (size_t i = 0; i < address_count; i++)
		if (is_same(&l->address, &addresses[i]))
			return true;
	return false;
}

/* All of them when this process ends: others may go on listening on the same sockets. */
static void close_unwanted(void)
{
	for (size_t port = 0; port < sizeof(listeners) / sizeof(*listeners); port++)
		for (struct listener **at = &listeners[port]; *at;) {
			struct listener *l = *at;
			if (!ending && is_wanted(l)) {
				at = &l->next;
				continue;
			}
			if (l->source.fd >= 0) {
				/* not by itself: another process may have the same socket */
				epoll_ctl(epoll, EPOLL_CTL_DEL, l->source.fd, NULL);
				close(l->source.fd);
			}
			*at = l->next;
			free(l);
		}
}

static int bind_and_listen(int fd, const struct listener *l)
{
	struct sockaddr_in6 in6 = { .sin6_family = AF_INET6, .sin6_port = l->key.port, .sin6_addr = l->address };
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = l->key.port };
	const int one = 1, size = SOCKET_BUFFER;
	int bound;

	memcpy(&in.sin_addr, l->address.s6_addr + 12, sizeof(in.sin_addr));
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)); /* accepted sockets have the same */
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	if (l->key.family == 4) {
		bound = bind(fd, (struct sockaddr *)&in, sizeof(in));
	} else {
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof(one));
		bound = bind(fd, (struct sockaddr *)&in6, sizeof(in6));
	}
	return bound == 0 ? listen(fd, BACKLOG) : bound;
}

/* Opens a listener, or leaves in `error` why that is not possible now. */
static void open_listener(struct listener *l)
{
	struct rlimit limit;

	int fd = socket(l->key.family == 4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	l->error = fd < 0 && errno != EAFNOSUPPORT ? errno : 0; /* a node without a family has none to listen on */
	if (fd < 0)
		return;
	if (bind_and_listen(fd, l) != 0) {
		l->error = errno;
	} else if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && (rlim_t)fd + SPARE_DESCRIPTORS >= limit.rlim_cur) {
		l->error = EMFILE;
	} else {
		l->source.fd = fd;
		watch(&l->source);
		return;
	}
	close(fd);
}

static struct listener *add_listener(struct wag_health_key key, struct in6_addr address)
{
	struct listener **head = &listeners[ntohs(key.port)];

	for (struct listener *l = *head; l; l = l->next)
		if (l->key.family == key.family && is_same(&l->address, &address))
			return l;
	struct listener *l = calloc(1, sizeof(*l));
	if (!l)
		return NULL; /* at the limit of memory; the next change tries again */
	*l = (struct listener){ { LISTENER, -1 }, key, address, 0, *head };
	*head = l;
	return l;
}

static void open_missing(void)
{
	struct wag_health_key key, next;
	bool more = next_key(NULL, &next);

	for (size_t count = 0; more && count < MAX_KEYS; count++) {
		key = next;
		if (every_address)
			add_listener(key, any_address(key.family));
		for (size_t i = 0; !every_address && i < address_count; i++)
			if (family_of(&addresses[i]) == key.family)
				add_listener(key, addresses[i]);
		more = next_key(&key, &next);
	}
	failures = 0;
	for (size_t port = 0; port < sizeof(listeners) / sizeof(*listeners); port++)
		for (struct listener *l = listeners[port]; l; l = l->next) {
			if (l->source.fd < 0)
				open_listener(l);
			failures += l->error != 0;
		}
	retry_at = now_ns() + RETRY_NS;
}

/* Takes over what the process before this one listened on, so that nobody finds a port closed in between. */
static void inherit_listener(int fd)
{
	struct sockaddr_in6 in6;
	struct sockaddr_in *in = (struct sockaddr_in *)&in6;
	struct in6_addr address = any_address(4);
	struct wag_health_key key = { .family = 6 };
	socklen_t length = sizeof(in6);

	if (getsockname(fd, (struct sockaddr *)&in6, &length) != 0)
		fail("descriptor %d is no socket", fd);
	key.port = in6.sin6_port;
	if (in6.sin6_family == AF_INET) {
		key.family = 4;
		memcpy(address.s6_addr + 12, &in->sin_addr, sizeof(in->sin_addr));
	} else {
		address = in6.sin6_addr;
	}
	struct listener *l = add_listener(key, address);
	if (!l)
		fail("out of memory");
	l->source.fd = fd;
	watch(&l->source);
}

/* -- control ------------------------------------------------------------------------------------------------------ */

static void report(void)
{
	static char text[MAX_PACKET];
	size_t length = (size_t)snprintf(text, sizeof(text), "%s\n", tag);

	for (size_t port = 0; port < sizeof(listeners) / sizeof(*listeners); port++)
		for (struct listener *l = listeners[port]; l && length < sizeof(text) - 64; l = l->next)
			if (l->error)
				length += (size_t)snprintf(text + length, sizeof(text) - length, "%zu %u %d\n", port,
							   l->key.family, l->error);
	for (size_t i = 0; i < MAX_CONTROLS; i++)
		if (controls[i].fd >= 0)
			send(controls[i].fd, text, length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void accept_control(void)
{
	int fd = accept4(control_listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	for (size_t i = 0; fd >= 0 && i < MAX_CONTROLS; i++)
		if (controls[i].fd < 0) {
			controls[i].fd = fd;
			watch(&controls[i]);
			return;
		}
	if (fd >= 0)
		close(fd);
}

static void follow(char *words)
{
	char *rest, *word = strtok_r(words, " ", &rest);

	ending = ending || (word && strcmp(word, "end") == 0);
	if (!word || strcmp(word, "listen") != 0)
		return;
	told = table_changed = true;
	every_address = false;
	address_count = 0;
	while ((word = strtok_r(NULL, " ", &rest)) && address_count < MAX_ADDRESSES) {
		struct in6_addr address = any_address(4);
		if (strcmp(word, "*") == 0)
			every_address = true;
		else if (inet_pton(AF_INET6, word, &address) == 1 || inet_pton(AF_INET, word, address.s6_addr + 12) == 1)
			addresses[address_count++] = address;
	}
}

static void read_control(struct source *control)
{
	static char packet[MAX_PACKET + 1];

	if (control->fd < 0)
		return; /* closed since epoll saw it */
	ssize_t got = recv(control->fd, packet, MAX_PACKET, 0);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (got <= 0) {
		close(control->fd);
		control->fd = -1;
		return;
	}
	packet[got] = '\0';
	follow(packet);
}

/* -- life --------------------------------------------------------------------------------------------------------- */

static int parse_descriptor(const char *text)
{
	char *end;
	long number = strtol(text, &end, 10);

	if (*end || end == text || number < 3 || number > DESCRIPTOR_LIMIT)
		fail("%s is not a descriptor", text);
	return (int)number;
}

static void set_limit(int what, rlim_t most)
{
	struct rlimit limit;

	if (getrlimit((__rlimit_resource_t)what, &limit) != 0)
		fail("getrlimit: %m");
	if (limit.rlim_max > most)
		limit.rlim_max = most;
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit((__rlimit_resource_t)what, &limit) != 0)
		fail("setrlimit: %m");
}

/* Keeps nothing but the right to listen on ports below 1024. */
static void drop_privileges(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {
		{ .effective = 1u << CAP_NET_BIND_SERVICE, .permitted = 1u << CAP_NET_BIND_SERVICE },
	};

	if (chroot(".") != 0)
		fail("chroot: %m");
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) != 0 || setgroups(0, NULL) != 0 ||
	    setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED) != 0 ||
	    setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED) != 0)
		fail("cannot become user %d: %m", UNPRIVILEGED);
	if (syscall(SYS_capset, &header, data) != 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		fail("cannot drop capabilities: %m");
	set_limit(RLIMIT_NOFILE, DESCRIPTOR_LIMIT);
	set_limit(RLIMIT_AS, MEMORY_LIMIT);
	set_limit(RLIMIT_FSIZE, 0);
	set_limit(RLIMIT_CORE, 0);
}

/* Lets the agent go on: whoever started this process gets its exit status, and init has what is left. */
static void detach(void)
{
	pid_t child = fork();

	if (child < 0)
		fail("fork: %m");
	if (child > 0)
		_exit(0);
	set_limit(RLIMIT_NPROC, 0);
	dup2(STDOUT_FILENO, STDERR_FILENO);
}

static int milliseconds_to_wait(void)
{
	const struct connection *oldest = TAILQ_FIRST(&open_connections);
	unsigned long long now = now_ns(), until = oldest ? oldest->deadline : ~0ULL;

	if (failures && retry_at < until)
		until = retry_at;
	if (until == ~0ULL)
		return -1;
	return until <= now ? 0 : (int)((until - now) / 1000000) + 1;
}

__attribute__((noreturn)) static void serve(void)
{
	struct epoll_event events[64];

	for (;;) {
		int count = epoll_wait(epoll, events, sizeof(events) / sizeof(*events), milliseconds_to_wait());
		for (int i = 0; i < count; i++) {
			struct source *source = events[i].data.ptr;
			struct connection *c = (struct connection *)source;
			switch (source->kind) {
			case CONTROL_LISTENER:
				accept_control();
				break;
			case CONTROL:
				read_control(source);
				break;
			case LISTENER:
				accept_connection((struct listener *)source);
				break;
			case CONNECTION:
				if (c->source.fd < 0)
					break; /* made way for another since epoll saw it */
				if (c->answered)
					discard(c);
				else
					read_request(c);
				break;
			}
		}
		expire();
		/* not before: events may name listeners that close now */
		bool changed = table_changed;
		size_t before = failures;
		if (changed || ending)
			close_unwanted();
		if (ending && is_all_answered())
			exit(0);
		if (!ending && (changed || (told && failures && now_ns() >= retry_at)))
			open_missing();
		if (changed || failures != before)
			report();
		table_changed = false;
	}
}

int main(int argc, char **argv)
{
	__u32 first = 0;
	__u64 due;

	if (argc < 6) {
		fprintf(stderr, "waggle-health answers the health ports of Services: waggle's agent starts it\n");
		return 2;
	}
	control_listener.fd = parse_descriptor(argv[1]);
	table = parse_descriptor(argv[2]);
	overdue = parse_descriptor(argv[3]);
	int cgroup = parse_descriptor(argv[4]);
	tag = argv[5];

	setsid();
	if (write(cgroup, "0", 1) != 1)
		fail("cannot enter the cgroup: %m");
	close(cgroup);
	drop_privileges();
	if (!lookup(overdue, &first, &due))
		fail("cannot read the tables without privileges (before Linux 5.19 nobody can): %m");
	signal(SIGPIPE, SIG_IGN);

	epoll = epoll_create1(EPOLL_CLOEXEC);
	if (epoll < 0)
		fail("epoll: %m");
	for (size_t i = 0; i < MAX_CONNECTIONS; i++) {
		pool[i].source = (struct source){ CONNECTION, -1 };
		TAILQ_INSERT_TAIL(&free_connections, &pool[i], link);
	}
	for (size_t i = 0; i < MAX_CONTROLS; i++)
		controls[i] = (struct source){ CONTROL, -1 };
	for (int i = 6; i < argc; i++)
		inherit_listener(parse_descriptor(argv[i]));
	watch(&control_listener);
	detach();
	serve();
}
