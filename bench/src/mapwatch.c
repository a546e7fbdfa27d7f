// SPDX-License-Identifier: Apache-2.0
// An observer of pinned BPF maps that shares no code with the agent: it opens the pins and reads with bpf(2).
//
//   mapwatch fill PIN COUNT SECONDS [OFFSET VALUE]
//       Waits until the hash map at PIN holds COUNT entries whose value has the 32-bit number VALUE at OFFSET (or any
//       value). Prints one JSON line with the CLOCK_MONOTONIC times at which the pin appeared, the first such entry
//       was there, and all were. Status 1 when SECONDS pass before that.
//
//   mapwatch change PIN [--cpu N]
//       For every line "KEY MILLISECONDS" on standard input (KEY in hex) prints "armed VALUE", then watches the
//       entry and prints "changed NANOSECONDS VALUE" (CLOCK_MONOTONIC) once its value differs, or "unchanged" after
//       the time given. An absent entry has the value "-". Looks every 50 microseconds rather than all the time:
//       on two CPUs a busy observer would slow down what it observes.
//
//   mapwatch burst PIN SECONDS
//       Reads keys in hex from standard input, one a line, to its end; prints "armed", then, once the values of all of
//       them have changed, the CLOCK_MONOTONIC time of that. Looks every millisecond at those that have not yet. Status 1
//       when SECONDS pass before that.
//
//   mapwatch memory DIRECTORY
//       One JSON line per distinct map pinned below DIRECTORY: name, type, sizes, and the bytes that the kernel
//       accounts for it (`memlock` in fdinfo).
#define _GNU_SOURCE
#include <ftw.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/bpf.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "sockets.h"

#define CHANGE_POLL_NS 50000
#define FILL_POLL_NS 5000000
#define BURST_POLL_NS 1000000
#define BATCH 16384

struct map {
	int fd;
	struct bpf_map_info info;
};

// Which entries count: those with `value` at `offset`, or all of them.
struct condition {
	bool any;
	uint32_t offset, value;
};

static int bpf(enum bpf_cmd command, union bpf_attr *attributes)
{
	return (int)syscall(__NR_bpf, command, attributes, sizeof(*attributes));
}

static int open_pin(const char *path)
{
	union bpf_attr attributes = {.pathname = (uint64_t)(uintptr_t)path, .file_flags = BPF_F_RDONLY};
	int fd = bpf(BPF_OBJ_GET, &attributes);

	if (fd >= 0 || errno != EINVAL)
		return fd;
	attributes.file_flags = 0; // programs and links refuse the flag
	return bpf(BPF_OBJ_GET, &attributes);
}

static bool is_map(int fd)
{
	char path[64], target[64];
	ssize_t length;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	length = readlink(path, target, sizeof(target) - 1);
	if (length < 0)
		die("readlink %s", path);
	target[length] = 0;
	return !strcmp(target, "anon_inode:bpf-map");
}

static struct map map_of(int fd)
{
	struct map map = {.fd = fd};
	union bpf_attr attributes = {0};

	attributes.info.bpf_fd = (uint32_t)fd;
	attributes.info.info_len = sizeof(map.info);
	attributes.info.info = (uint64_t)(uintptr_t)&map.info;
	if (bpf(BPF_OBJ_GET_INFO_BY_FD, &attributes))
		die("BPF_OBJ_GET_INFO_BY_FD");
	return map;
}

static void sleep_ns(long nanoseconds)
{
	struct timespec time = {.tv_nsec = nanoseconds};

	nanosleep(&time, NULL);
}

static void *allocate(size_t size)
{
	void *memory = calloc(1, size);

	if (!memory)
		die("calloc");
	return memory;
}

// -- fill ------------------------------------------------------------------------------------------------------------

static uint32_t value_stride(const struct map *map)
{
	return (map->info.value_size + 7) & ~7u;
}

static uint64_t count_matching(const struct map *map, const uint8_t *values, uint32_t count,
			       const struct condition *condition)
{
	uint64_t total = 0;
	uint32_t number;

	if (condition->any)
		return count;
	for (uint32_t i = 0; i < count; i++) {
		memcpy(&number, values + (size_t)i * map->info.value_size + condition->offset, sizeof(number));
		total += number == condition->value;
	}
	return total;
}

static uint64_t count_entries(const struct map *map, void *keys, void *values, const struct condition *condition)
{
	uint32_t in = 0, out = 0;
	uint64_t total = 0;
	bool first = true;
	int error;

	do {
		union bpf_attr attributes = {0};

		attributes.batch.map_fd = (uint32_t)map->fd;
		attributes.batch.in_batch = first ? 0 : (uint64_t)(uintptr_t)&in;
		attributes.batch.out_batch = (uint64_t)(uintptr_t)&out;
		attributes.batch.keys = (uint64_t)(uintptr_t)keys;
		attributes.batch.values = (uint64_t)(uintptr_t)values;
		attributes.batch.count = BATCH;
		error = bpf(BPF_MAP_LOOKUP_BATCH, &attributes) ? errno : 0;
		if (error && error != ENOENT) {
			errno = error;
			die("BPF_MAP_LOOKUP_BATCH");
		}
		total += count_matching(map, values, attributes.batch.count, condition);
		in = out;
		first = false;
	} while (!error);
	return total;
}

static int fill(const char *pin, uint64_t wanted, double seconds, const struct condition *condition)
{
	uint64_t until = now_ns() + (uint64_t)(seconds * 1e9), count = 0, appeared = 0, first = 0;
	void *keys = NULL, *values = NULL;
	struct map map = {.fd = -1};

	end_with_parent();
	while (now_ns() < until) {
		if (map.fd < 0) {
			map.fd = open_pin(pin);
			if (map.fd < 0) {
				if (errno != ENOENT && errno != ENOTDIR)
					die("cannot open %s", pin);
				sleep_ns(1000000);
				continue;
			}
			appeared = now_ns();
			map = map_of(map.fd);
			errno = 0;
			if (!condition->any && condition->offset + sizeof(uint32_t) > map.info.value_size)
				die("values have %u bytes", map.info.value_size);
			keys = allocate((size_t)BATCH * map.info.key_size);
			values = allocate((size_t)BATCH * value_stride(&map));
		}
		count = count_entries(&map, keys, values, condition);
		if (count && !first)
			first = now_ns();
		if (count >= wanted) {
			printf("{\"appeared_ns\":%" PRIu64 ",\"first_ns\":%" PRIu64 ",\"full_ns\":%" PRIu64
			       ",\"count\":%" PRIu64 "}\n",
			       appeared, first, now_ns(), count);
			return 0;
		}
		sleep_ns(FILL_POLL_NS);
	}
	errno = 0;
	die("%s holds %" PRIu64 " of %" PRIu64 " entries after %g s", pin, count, wanted, seconds);
}

// -- change ----------------------------------------------------------------------------------------------------------

static bool lookup(const struct map *map, const void *key, void *value)
{
	union bpf_attr attributes = {0};

	attributes.map_fd = (uint32_t)map->fd;
	attributes.key = (uint64_t)(uintptr_t)key;
	attributes.value = (uint64_t)(uintptr_t)value;
	if (!bpf(BPF_MAP_LOOKUP_ELEM, &attributes))
		return true;
	if (errno != ENOENT)
		die("BPF_MAP_LOOKUP_ELEM");
	return false;
}

static void print_value(bool present, const uint8_t *value, uint32_t size)
{
	if (!present) {
		puts("-");
		return;
	}
	for (uint32_t i = 0; i < size; i++)
		printf("%02x", value[i]);
	putchar('\n');
}

static void parse_hex(const char *text, uint8_t *bytes, uint32_t size)
{
	if (strlen(text) != 2 * (size_t)size)
		die("a key has %u bytes, not %zu hex digits", size, strlen(text));
	for (uint32_t i = 0; i < size; i++) {
		unsigned byte;

		if (sscanf(text + 2 * (size_t)i, "%2x", &byte) != 1)
			die("%s is not hex", text);
		bytes[i] = (uint8_t)byte;
	}
}

static void watch_entry(const struct map *map, const uint8_t *key, unsigned milliseconds, uint8_t *before, uint8_t *after)
{
	uint32_t size = map->info.value_size;
	bool was = lookup(map, key, before), is;
	uint64_t until = now_ns() + milliseconds * 1000000ull, now;

	fputs("armed ", stdout);
	print_value(was, before, size);
	fflush(stdout);
	do {
		sleep_ns(CHANGE_POLL_NS);
		is = lookup(map, key, after);
		now = now_ns();
		if (is != was || (is && memcmp(before, after, size))) {
			printf("changed %" PRIu64 " ", now);
			print_value(is, after, size);
			fflush(stdout);
			return;
		}
	} while (now < until);
	puts("unchanged");
	fflush(stdout);
}

static int change(const char *pin)
{
	int fd = open_pin(pin);
	char text[1024];
	unsigned milliseconds;
	struct map map;
	uint8_t *key, *before, *after;

	if (fd < 0)
		die("cannot open %s", pin);
	map = map_of(fd);
	key = allocate(map.info.key_size);
	before = allocate(map.info.value_size);
	after = allocate(map.info.value_size);
	if (prctl(PR_SET_TIMERSLACK, 1))
		die("PR_SET_TIMERSLACK");
	end_with_parent();
	while (scanf("%1023s %u", text, &milliseconds) == 2) {
		errno = 0;
		parse_hex(text, key, map.info.key_size);
		watch_entry(&map, key, milliseconds, before, after);
	}
	return 0;
}

// -- burst -----------------------------------------------------------------------------------------------------------

#define MAX_BURST 65536

struct watched {
	uint8_t *key, *before;
	bool was;
};

static bool has_changed(const struct map *map, const struct watched *watched, uint8_t *now)
{
	bool is = lookup(map, watched->key, now);

	return is != watched->was || (is && memcmp(watched->before, now, map->info.value_size));
}

static int burst(const char *pin, double seconds)
{
	static struct watched watched[MAX_BURST];
	unsigned count = 0, left;
	char text[1024];
	uint64_t until;
	uint8_t *value;
	struct map map;
	int fd = open_pin(pin);

	if (fd < 0)
		die("cannot open %s", pin);
	map = map_of(fd);
	value = allocate(map.info.value_size);
	if (prctl(PR_SET_TIMERSLACK, 1))
		die("PR_SET_TIMERSLACK");
	end_with_parent();
	while (scanf("%1023s", text) == 1) {
		errno = 0;
		if (count == MAX_BURST)
			die("at most %d keys", MAX_BURST);
		watched[count].key = allocate(map.info.key_size);
		watched[count].before = allocate(map.info.value_size);
		parse_hex(text, watched[count].key, map.info.key_size);
		watched[count].was = lookup(&map, watched[count].key, watched[count].before);
		count++;
	}
	puts("armed");
	fflush(stdout);
	until = now_ns() + (uint64_t)(seconds * 1e9);
	for (left = count; left && now_ns() < until; sleep_ns(left ? BURST_POLL_NS : 0))
		// those that have changed move out of the front part
		for (unsigned i = 0; i < left;) {
			if (!has_changed(&map, &watched[i], value)) {
				i++;
				continue;
			}
			watched[i] = watched[--left];
		}
	errno = 0;
	if (left)
		die("%u of %u entries did not change within %g s", left, count, seconds);
	printf("%" PRIu64 "\n", now_ns());
	return 0;
}

// -- memory ----------------------------------------------------------------------------------------------------------

static uint64_t accounted_bytes(int fd)
{
	char path[64], line[256];
	uint64_t bytes = 0;
	bool found = false;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	file = fopen(path, "r");
	if (!file)
		die("cannot open %s", path);
	while (fgets(line, sizeof(line), file))
		found |= sscanf(line, "memlock: %" SCNu64, &bytes) == 1;
	fclose(file);
	errno = 0;
	if (!found)
		die("%s has no memlock line", path);
	return bytes;
}

static int visit(const char *path, const struct stat *status, int type, struct FTW *where)
{
	static uint32_t seen[4096];
	static unsigned seen_count;
	struct map map;
	int fd;

	(void)status;
	(void)where;
	if (type != FTW_F)
		return 0;
	fd = open_pin(path);
	if (fd < 0)
		die("cannot open %s", path);
	if (is_map(fd)) {
		bool known = false;

		map = map_of(fd);
		for (unsigned i = 0; i < seen_count; i++)
			known |= seen[i] == map.info.id;
		if (!known && seen_count < sizeof(seen) / sizeof(*seen)) {
			seen[seen_count++] = map.info.id;
			printf("{\"path\":\"%s\",\"name\":\"%s\",\"type\":%u,\"key_size\":%u,\"value_size\":%u,"
			       "\"max_entries\":%u,\"bytes\":%" PRIu64 "}\n",
			       path, map.info.name, map.info.type, map.info.key_size, map.info.value_size,
			       map.info.max_entries, accounted_bytes(fd));
		}
	}
	close(fd);
	return 0;
}

int main(int count, char **arguments)
{
	if ((count == 5 || count == 7) && !strcmp(arguments[1], "fill")) {
		struct condition condition = {.any = count == 5};

		if (!condition.any) {
			condition.offset = (uint32_t)atoi(arguments[5]);
			condition.value = (uint32_t)atoi(arguments[6]);
		}
		return fill(arguments[2], strtoull(arguments[3], NULL, 10), atof(arguments[4]), &condition);
	}
	if (count == 3 && !strcmp(arguments[1], "memory")) {
		if (nftw(arguments[2], visit, 16, FTW_PHYS))
			die("cannot walk %s", arguments[2]);
		return 0;
	}
	if (count == 4 && !strcmp(arguments[1], "burst"))
		return burst(arguments[2], atof(arguments[3]));
	if (count == 5 && !strcmp(arguments[1], "change") && !strcmp(arguments[3], "--cpu"))
		stay_on_cpu(atoi(arguments[4]));
	else if (count != 3 || strcmp(arguments[1], "change"))
		die("usage: mapwatch fill PIN COUNT SECONDS [OFFSET VALUE] | change PIN [--cpu N] | burst PIN SECONDS | "
		    "memory DIRECTORY");
	return change(arguments[2]);
}
