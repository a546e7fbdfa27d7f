// SPDX-License-Identifier: Apache-2.0
/*
 * waggle-cni: the CNI plugin that a container runtime executes once per pod and command.
 *
 * It hands its environment and standard input to the agent over a unix socket and prints the answer. Only VERSION is
 * answered here, and everything where it is started by the name of loopback. It is static and does nothing else, because a runtime pays for it on every pod and runs it on hosts
 * that may have nothing installed. Whatever happens, standard output gets either the agent's answer as a whole or one
 * error object of the CNI specification (1.1.0, section 5).
 */
#include "json.h"
#include "plugin.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_SOCKET "/run/waggle/agent.sock"
#define LATEST_VERSION "1.1.0"
/* The same list as SUPPORTED_VERSIONS in sources/cni_request.py; a version is in it with its quotes. */
#define SUPPORTED_VERSIONS "[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]"

#define MAX_CONFIG (4u << 20)
#define MAX_ENVIRONMENT (512u << 10)
#define MAX_REQUEST (5u << 20) /* MAX_REQUEST_BYTES in sources/cni_request.py */
#define MAX_ANSWER (4u << 20)
#define TIMEOUT_SECONDS 90

extern char **environ;

static char config_version[64] = LATEST_VERSION;
static const char *command = "";
static char socket_path[sizeof(((struct sockaddr_un *)0)->sun_path)] = DEFAULT_SOCKET;

struct buffer {
	char *data;
	size_t length;
	size_t size;
};

static void write_all(int fd, const char *data, size_t length)
{
	while (length) {
		ssize_t done = write(fd, data, length);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			_exit(1); /* nobody reads the answer */
		data += done;
		length -= (size_t)done;
	}
}

void fail(enum cni_code code, const char *format, ...)
{
	char message[512], version[sizeof(config_version) * 6 + 3], quoted[sizeof(message) * 6 + 3], out[5120];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(message, sizeof(message), format, arguments);
	va_end(arguments);
	json_quote(version, sizeof(version), config_version);
	json_quote(quoted, sizeof(quoted), message);
	int length = snprintf(out, sizeof(out), "{\"cniVersion\":%s,\"code\":%d,\"msg\":%s}\n", version, (int)code, quoted);
	write_all(STDOUT_FILENO, out, (size_t)length);
	_exit(1);
}

void succeed(const char *answer, size_t length)
{
	write_all(STDOUT_FILENO, answer, length);
	_exit(0);
}

/* The agent cannot serve: STATUS has a code of its own for that. */
static enum cni_code unreachable(void)
{
	return strcmp(command, "STATUS") == 0 ? CNI_NOT_AVAILABLE : CNI_TRY_AGAIN_LATER;
}

static bool append(struct buffer *b, const char *data, size_t length, size_t limit)
{
	if (length > limit || b->length > limit - length)
		return false;
	if (b->length + length > b->size) {
		size_t size = b->size ? b->size : 16384;
		while (size < b->length + length)
			size *= 2;
		char *grown = realloc(b->data, size);
		if (!grown)
			fail(CNI_IO_FAILURE, "out of memory");
		b->data = grown;
		b->size = size;
	}
	memcpy(b->data + b->length, data, length);
	b->length += length;
	return true;
}

static void read_config(struct buffer *config)
{
	char chunk[16384];

	for (;;) {
		ssize_t got = read(STDIN_FILENO, chunk, sizeof(chunk));
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			fail(CNI_IO_FAILURE, "cannot read the network configuration: %s", strerror(errno));
		if (got == 0)
			return;
		if (!append(config, chunk, (size_t)got, MAX_CONFIG))
			fail(CNI_IO_FAILURE, "the network configuration exceeds %u bytes", MAX_CONFIG);
	}
}

static void parse_config(const struct buffer *config)
{
	char version[sizeof(config_version)], path[sizeof(socket_path)];
	struct json_member members[] = {
		{ .key = "cniVersion", .value = version, .size = sizeof(version) },
		{ .key = "apiSocket", .value = path, .size = sizeof(path) },
	};

	if (!json_read_object(config->data, config->length, members, sizeof(members) / sizeof(*members)))
		fail(CNI_DECODING_FAILURE, "the network configuration is not a JSON object");
	if (members[0].found && !members[0].usable)
		fail(CNI_DECODING_FAILURE, "cniVersion: not a version");
	if (members[0].found)
		strcpy(config_version, version); /* of the same size */
	if (members[1].found && (!members[1].usable || path[0] != '/'))
		fail(CNI_INVALID_CONFIG, "apiSocket: not an absolute path of at most %zu bytes", sizeof(path) - 1);
	if (members[1].found)
		strcpy(socket_path, path); /* of the same size */
}

__attribute__((noreturn)) static void print_version(void)
{
	char version[sizeof(config_version) * 6 + 3], out[1024];

	json_quote(version, sizeof(version), config_version);
	int length = snprintf(out, sizeof(out), "{\"cniVersion\":%s,\"supportedVersions\":%s}\n", version,
			      SUPPORTED_VERSIONS);
	succeed(out, (size_t)length);
}

/* Whether the runtime started the plugin by its other name. */
static bool is_loopback(const char *path)
{
	const char *slash = path ? strrchr(path, '/') : NULL;

	return path && strcmp(slash ? slash + 1 : path, "loopback") == 0;
}

__attribute__((noreturn)) static void be_loopback(const struct buffer *config)
{
	char quoted[sizeof(config_version) * 6 + 3], unused[1];
	struct json_member previous = { .key = "prevResult", .value = unused, .size = sizeof(unused) };

	json_quote(quoted, sizeof(quoted), config_version);
	if (!strstr(SUPPORTED_VERSIONS, quoted))
		fail(CNI_INCOMPATIBLE_VERSION, "cniVersion: %s is not supported", config_version);
	json_read_object(config->data, config->length, &previous, 1); /* it is an object: parse_config() said so */
	if (previous.found && strcmp(command, "ADD") == 0)
		fail(CNI_UNSUPPORTED_FIELD, "prevResult: loopback has to be the first plugin of its network");
	loopback(command, config_version);
}

static void append_variable(struct buffer *body, const char *variable)
{
	if (!append(body, variable, strlen(variable) + 1, MAX_ENVIRONMENT))
		fail(CNI_INVALID_ENVIRONMENT, "the CNI_ variables of the environment exceed %u bytes", MAX_ENVIRONMENT);
}

static bool is_named(const char *variable, const char *name)
{
	return strncmp(variable, name, strlen(name)) == 0;
}

/* `NAME=value\0` of every CNI variable, the command first, then one more NUL. */
static void append_environment(struct buffer *body)
{
	append_variable(body, "CNI_COMMAND");
	body->data[body->length - 1] = '=';
	append_variable(body, command);
	for (char **variable = environ; *variable; variable++)
		if (is_named(*variable, "CNI_") && !is_named(*variable, "CNI_PATH=") &&
		    !is_named(*variable, "CNI_COMMAND="))
			append_variable(body, *variable);
	append(body, "", 1, MAX_ENVIRONMENT + 1);
}

static long milliseconds_left(const struct timespec *deadline)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (deadline->tv_sec - now.tv_sec) * 1000 + (deadline->tv_nsec - now.tv_nsec) / 1000000;
}

static void wait_for(int fd, short events, const struct timespec *deadline)
{
	struct pollfd poller = { .fd = fd, .events = events };

	for (;;) {
		long left = milliseconds_left(deadline);
		int ready = left > 0 ? poll(&poller, 1, (int)left) : 0;
		if (ready > 0)
			return;
		if (ready == 0)
			fail(unreachable(), "the waggle agent at %s did not answer within %d s", socket_path,
			     TIMEOUT_SECONDS);
		if (errno != EINTR)
			fail(CNI_IO_FAILURE, "poll: %s", strerror(errno));
	}
}

static int connect_to_agent(const struct timespec *deadline)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		fail(CNI_IO_FAILURE, "socket: %s", strerror(errno));
	memcpy(address.sun_path, socket_path, sizeof(socket_path));
	while (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		if (errno == EINTR)
			continue;
		/* A unix socket whose queue is full says EAGAIN and cannot be polled for room. */
		if (errno != EAGAIN || milliseconds_left(deadline) <= 0)
			fail(unreachable(), "no waggle agent at %s: %s", socket_path, strerror(errno));
		nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
	}
	return fd;
}

static void send_all(int fd, const char *data, size_t length, const struct timespec *deadline)
{
	while (length) {
		ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
		if (sent >= 0) {
			data += sent;
			length -= (size_t)sent;
		} else if (errno == EAGAIN) {
			wait_for(fd, POLLOUT, deadline);
		} else if (errno == EPIPE || errno == ECONNRESET) {
			return; /* it may have answered all the same: a refusal */
		} else if (errno != EINTR) {
			fail(unreachable(), "cannot send to the waggle agent at %s: %s", socket_path, strerror(errno));
		}
	}
}

static void receive_all(int fd, struct buffer *answer, const struct timespec *deadline)
{
	char chunk[16384];

	for (;;) {
		ssize_t got = recv(fd, chunk, sizeof(chunk), 0);
		if (got == 0)
			return;
		if (got > 0) {
			if (!append(answer, chunk, (size_t)got, MAX_ANSWER))
				fail(unreachable(), "the answer of the waggle agent exceeds %u bytes", MAX_ANSWER);
		} else if (errno == EAGAIN) {
			wait_for(fd, POLLIN, deadline);
		} else if (errno == ECONNRESET) {
			return; /* whether the answer is whole shows when it is read */
		} else if (errno != EINTR) {
			fail(unreachable(), "the waggle agent at %s went away: %s", socket_path, strerror(errno));
		}
	}
}

/* The value of a header in the NUL-terminated head of an answer, or NULL. `name` in lower case, with its colon. */
static const char *find_header(const char *head, const char *name)
{
	for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n"))
		if (strncasecmp(line + 2, name, strlen(name)) == 0)
			return line + 2 + strlen(name);
	return NULL;
}

/* Prints the body of the agent's HTTP answer and exits. */
__attribute__((noreturn)) static void finish(struct buffer *answer)
{
	append(answer, "", 1, MAX_ANSWER + 1);
	char *head = answer->data, *end = strstr(head, "\r\n\r\n");
	if (!end || strncmp(head, "HTTP/1.", 7) != 0 || strlen(head) < 12)
		fail(unreachable(), "the waggle agent at %s ended before it answered", socket_path);
	*end = '\0';
	const char *body = end + 4, *header = find_header(head, "content-length:");
	size_t length = answer->length - 1 - (size_t)(body - answer->data);
	int status = atoi(head + 9);
	if (find_header(head, "transfer-encoding:"))
		fail(unreachable(), "%s is not a waggle agent", socket_path);
	if (header && strtoull(header, NULL, 10) > length)
		fail(unreachable(), "the waggle agent at %s ended while it answered", socket_path);
	if (status != 200 && (length == 0 || body[0] != '{'))
		fail(unreachable(), "the waggle agent at %s answered HTTP %d", socket_path, status);
	write_all(STDOUT_FILENO, body, length);
	_exit(status == 200 ? 0 : 1);
}

int main(int count, char **arguments)
{
	struct buffer config = { 0 }, request = { 0 }, body = { 0 }, answer = { 0 };
	struct timespec deadline;
	char head[256];

	const char *variable = getenv("CNI_COMMAND");
	if (!variable || !*variable) {
		fprintf(stderr, "waggle-cni is a CNI plugin: a container runtime starts it. CNI versions: %s\n",
			SUPPORTED_VERSIONS);
		fail(CNI_INVALID_ENVIRONMENT, "CNI_COMMAND: not set");
	}
	command = variable;
	read_config(&config);
	/* Before 1.0.0 a runtime may ask for the version without a configuration. */
	if (config.length || strcmp(command, "VERSION") != 0)
		parse_config(&config);
	if (strcmp(command, "VERSION") == 0)
		print_version();
	if (is_loopback(count ? arguments[0] : NULL))
		be_loopback(&config);

	append_environment(&body);
	append(&body, config.data, config.length, MAX_REQUEST); /* fits: see the limits above */
	int length = snprintf(head, sizeof(head),
			      "POST /cni HTTP/1.1\r\nHost: waggle\r\nConnection: close\r\n"
			      "Content-Type: application/octet-stream\r\nContent-Length: %zu\r\n\r\n",
			      body.length);
	append(&request, head, (size_t)length, sizeof(head));
	append(&request, body.data, body.length, sizeof(head) + MAX_REQUEST);

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += TIMEOUT_SECONDS;
	int fd = connect_to_agent(&deadline);
	send_all(fd, request.data, request.length, &deadline);
	receive_all(fd, &answer, &deadline);
	finish(&answer);
}
