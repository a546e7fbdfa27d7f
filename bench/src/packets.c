// SPDX-License-Identifier: Apache-2.0
// A packet generator for one core: UDP frames straight into an interface, as fast as they go.
//
//   packets --interface NAME --from MAC --to MAC --source ADDRESS --target ADDRESS:PORT
//           [--flows N] [--seconds S] [--once | --show] [--cpu N]
//
// Frames of 60 bytes (64 with the checksum that Ethernet adds). The N flows, a power of two, have the source addresses
// from --source on, 64 flows on each, which differ in their ports; each frame is of one at random. --once sends one
// frame of every flow, with pauses, so that each is answered and known before the rest comes. --show sends nothing and
// prints the first frame in hex.
//
// Frames are made by the kernel itself (BPF_F_TEST_XDP_LIVE_FRAMES): pages from a pool, filled once, into which a program
// writes flow and checksums before it redirects them to the interface. A virtual interface takes them as they are, so
// that its other side gets what a card's driver has: a page with a frame in it, which becomes a socket buffer only where
// somebody wants one. All of it is in softirqs of the core that sends, and so is the whole way of a packet through a
// node. Prints one JSON line; what came out on the far side is for the caller to count.
#define _GNU_SOURCE
#include <getopt.h>
#include <inttypes.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <stddef.h>
#include <sys/syscall.h>

#include "sockets.h"

#define FRAME 60
#define FRAMES_PER_CALL 65536
#define MAX_FLOWS 8192 // by address: the last byte of --source has room for 128 more
#define FLOWS_PER_SOURCE 64
#define FIRST_PORT 20000
#define PAUSE_NS 100000

struct frame {
	struct ethhdr ethernet;
	struct iphdr ip;
	struct udphdr udp;
	uint8_t data[FRAME - sizeof(struct ethhdr) - sizeof(struct iphdr) - sizeof(struct udphdr)];
} __attribute__((packed));

static struct {
	const char *interface;
	uint8_t from[ETH_ALEN], to[ETH_ALEN];
	struct in_addr source;
	struct sockaddr_in target;
	unsigned flows;
	double seconds;
	bool once, show;
} settings = {.flows = 256, .seconds = 1};

static uint32_t sum_words(const void *data, size_t length, uint32_t sum)
{
	const uint8_t *bytes = data;

	for (size_t i = 0; i + 1 < length; i += 2)
		sum += (uint32_t)bytes[i] << 8 | bytes[i + 1];
	if (length & 1)
		sum += (uint32_t)bytes[length - 1] << 8;
	return sum;
}

static uint16_t checksum(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return htons((uint16_t)~sum);
}

static void make_frame(struct frame *frame, unsigned flow)
{
	uint16_t udp_length = sizeof(frame->udp) + sizeof(frame->data);

	memcpy(frame->ethernet.h_dest, settings.to, ETH_ALEN);
	memcpy(frame->ethernet.h_source, settings.from, ETH_ALEN);
	frame->ethernet.h_proto = htons(ETH_P_IP);
	frame->ip = (struct iphdr){
		.version = 4,
		.ihl = 5,
		.tot_len = htons((uint16_t)(sizeof(frame->ip) + udp_length)),
		.ttl = 64,
		.protocol = IPPROTO_UDP,
		.saddr = htonl(ntohl(settings.source.s_addr) + flow / FLOWS_PER_SOURCE),
		.daddr = settings.target.sin_addr.s_addr,
	};
	frame->ip.check = checksum(sum_words(&frame->ip, sizeof(frame->ip), 0));
	frame->udp = (struct udphdr){
		.source = htons((uint16_t)(FIRST_PORT + flow % FLOWS_PER_SOURCE)),
		.dest = settings.target.sin_port,
		.len = htons(udp_length),
	};
	// pseudo header, then the datagram
	frame->udp.check = checksum(sum_words(&frame->udp, udp_length,
					      sum_words(&frame->ip.saddr, 8, IPPROTO_UDP + (uint32_t)udp_length)));
}

static int open_interface(void)
{
	struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(settings.interface)};
	int fd = socket(AF_PACKET, SOCK_RAW, 0), on = 1;

	if (!address.sll_ifindex)
		die("interface %s", settings.interface);
	if (fd < 0 || setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof(on)))
		die("packet socket");
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die("bind to %s", settings.interface);
	return fd;
}

static long bpf(enum bpf_cmd command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

#define INSN(op, to, from, offset, value)                                                                                  \
	(struct bpf_insn){.code = (op), .dst_reg = (to), .src_reg = (from), .off = (offset), .imm = (int32_t)(value)}
#define SET(to, value) INSN(BPF_ALU64 | BPF_MOV | BPF_K, to, 0, 0, value)
#define COPY(to, from) INSN(BPF_ALU64 | BPF_MOV | BPF_X, to, from, 0, 0)
#define WITH(op, to, value) INSN(BPF_ALU64 | (op) | BPF_K, to, 0, 0, value)
#define WITH_REG(op, to, from) INSN(BPF_ALU64 | (op) | BPF_X, to, from, 0, 0)
#define LOAD32(to, from, offset) INSN(BPF_LDX | BPF_W | BPF_MEM, to, from, offset, 0)
#define STORE32(to, offset, value) INSN(BPF_ST | BPF_W | BPF_MEM, to, 0, offset, value)
#define STORE16(to, offset, from) INSN(BPF_STX | BPF_H | BPF_MEM, to, from, offset, 0)
#define BIG_ENDIAN16(reg) INSN(BPF_ALU | BPF_END | BPF_TO_BE, reg, 0, 0, 16)
#define CALL(helper) INSN(BPF_JMP | BPF_CALL, 0, 0, 0, helper)
#define EXIT() INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)
// r4 = the checksum of r4 and `rest`, the sum of everything else, in host byte order; stored at `offset` of the frame
#define STORE_CHECKSUM(rest, offset)                                                                                       \
	WITH(BPF_ADD, 4, rest), COPY(5, 4), WITH(BPF_RSH, 5, 16), WITH(BPF_AND, 4, 0xffff), WITH_REG(BPF_ADD, 4, 5),       \
		COPY(5, 4), WITH(BPF_RSH, 5, 16), WITH_REG(BPF_ADD, 4, 5), WITH(BPF_XOR, 4, 0xffff), BIG_ENDIAN16(4),      \
		STORE16(2, offset, 4)

static uint32_t rest_of(uint16_t check)
{
	return (uint16_t)~ntohs(check);
}

// Makes one of any flow and sends it to the interface. Pages come back as the node has left them.
static int load_program(const struct frame *first)
{
	enum { source = offsetof(struct frame, ip.saddr) + 2, port = offsetof(struct frame, udp.source) };
	uint32_t word[11]; // all headers, and two bytes

	memcpy(word, first, sizeof(word));

	const struct bpf_insn program[] = {
		COPY(6, 1),
		CALL(BPF_FUNC_get_prandom_u32),
		WITH(BPF_AND, 0, settings.flows - 1),
		COPY(7, 0),
		WITH(BPF_RSH, 7, 6), // r7: its address
		COPY(8, 0),
		WITH(BPF_AND, 8, FLOWS_PER_SOURCE - 1), // r8: its port
		LOAD32(2, 6, offsetof(struct xdp_md, data)),
		LOAD32(3, 6, offsetof(struct xdp_md, data_end)),
		COPY(4, 2),
		WITH(BPF_ADD, 4, FRAME),
		SET(0, XDP_ABORTED),
		INSN(BPF_JMP | BPF_JGT | BPF_X, 4, 3, 47, 0), // to the last instruction
		STORE32(2, 0, word[0]), STORE32(2, 4, word[1]), STORE32(2, 8, word[2]), STORE32(2, 12, word[3]),
		STORE32(2, 16, word[4]), STORE32(2, 20, word[5]), STORE32(2, 24, word[6]), STORE32(2, 28, word[7]),
		STORE32(2, 32, word[8]), STORE32(2, 36, word[9]), STORE32(2, 40, word[10]),
		COPY(4, 7),
		WITH(BPF_ADD, 4, ntohl(first->ip.saddr) & 0xffff),
		BIG_ENDIAN16(4),
		STORE16(2, source, 4),
		COPY(4, 8),
		WITH(BPF_ADD, 4, FIRST_PORT),
		BIG_ENDIAN16(4),
		STORE16(2, port, 4),
		COPY(4, 7),
		STORE_CHECKSUM(rest_of(first->ip.check), offsetof(struct frame, ip.check)),
		COPY(4, 7),
		WITH_REG(BPF_ADD, 4, 8),
		STORE_CHECKSUM(rest_of(first->udp.check), offsetof(struct frame, udp.check)),
		SET(1, if_nametoindex(settings.interface)),
		SET(2, 0),
		CALL(BPF_FUNC_redirect),
		EXIT(),
	};
	static char log[65536];
	union bpf_attr attr = {
		.prog_type = BPF_PROG_TYPE_XDP,
		.insns = (uintptr_t)program,
		.insn_cnt = sizeof(program) / sizeof(program[0]),
		.license = (uintptr_t)"Apache-2.0",
		.log_buf = (uintptr_t)log,
		.log_size = sizeof(log),
		.log_level = 1,
	};
	long fd = bpf(BPF_PROG_LOAD, &attr);

	if (fd < 0)
		die("load the generator's program: %s", log);
	return (int)fd;
}

// One frame as it is, or many by the program.
static void send_frame(int fd, const struct frame *frame)
{
	if (send(fd, frame, FRAME, 0) != FRAME)
		die("send to %s", settings.interface);
}

// How long it took, in nanoseconds, without the time to get pages for it and to give them back.
static uint64_t send_many(int program, const struct frame *first)
{
	union bpf_attr attr = {
		.test = {
			.prog_fd = (uint32_t)program,
			.data_in = (uintptr_t)first,
			.data_size_in = FRAME,
			.repeat = FRAMES_PER_CALL,
			.flags = BPF_F_TEST_XDP_LIVE_FRAMES,
		},
	};

	if (bpf(BPF_PROG_TEST_RUN, &attr))
		die("frames made by the kernel (BPF_F_TEST_XDP_LIVE_FRAMES)");
	return (uint64_t)attr.test.duration * FRAMES_PER_CALL;
}

static void parse_mac(const char *text, uint8_t *mac)
{
	if (sscanf(text, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) != ETH_ALEN)
		die("%s is not a MAC address", text);
}

static void parse_settings(int count, char **arguments)
{
	static const struct option options[] = {
		{"interface", required_argument, NULL, 'i'}, {"from", required_argument, NULL, 'f'},
		{"to", required_argument, NULL, 't'},	     {"source", required_argument, NULL, 's'},
		{"target", required_argument, NULL, 'd'},    {"flows", required_argument, NULL, 'n'},
		{"seconds", required_argument, NULL, 'l'},   {"once", no_argument, NULL, 'o'},
		{"show", no_argument, NULL, 'x'},	     {"cpu", required_argument, NULL, 'c'},
		{0},
	};
	struct address target;
	int option;

	while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
		switch (option) {
		case 'i':
			settings.interface = optarg;
			break;
		case 'f':
			parse_mac(optarg, settings.from);
			break;
		case 't':
			parse_mac(optarg, settings.to);
			break;
		case 's':
			if (inet_pton(AF_INET, optarg, &settings.source) != 1)
				die("%s is not an IPv4 address", optarg);
			break;
		case 'd':
			target = parse_address(optarg);
			memcpy(&settings.target, &target.storage, sizeof(settings.target));
			break;
		case 'n':
			settings.flows = (unsigned)atoi(optarg);
			break;
		case 'l':
			settings.seconds = atof(optarg);
			break;
		case 'o':
			settings.once = true;
			break;
		case 'x':
			settings.show = true;
			break;
		case 'c':
			stay_on_cpu(atoi(optarg));
			break;
		default:
			exit(2);
		}
	}
	errno = 0;
	if (!settings.interface || settings.target.sin_family != AF_INET || optind != count)
		die("usage: packets --interface NAME …; the head of packets.c describes every option");
	if (!settings.flows || settings.flows > MAX_FLOWS || settings.flows & (settings.flows - 1))
		die("--flows: a power of two, %d at most", MAX_FLOWS);
}

int main(int count, char **arguments)
{
	const struct timespec pause = {.tv_nsec = PAUSE_NS};
	uint64_t took = 0, sent = 0;
	struct frame first, frame;
	int fd;

	parse_settings(count, arguments);
	end_with_parent();
	make_frame(&first, 0);
	if (settings.show) {
		for (size_t i = 0; i < FRAME; i++)
			printf("%02x", ((const uint8_t *)&first)[i]);
		putchar('\n');
		return 0;
	}
	if (settings.once) {
		fd = open_interface();
		for (; sent < settings.flows; sent++) {
			make_frame(&frame, (unsigned)sent);
			send_frame(fd, &frame);
			nanosleep(&pause, NULL);
		}
	} else {
		fd = load_program(&first);
		for (; (double)took < settings.seconds * 1e9; sent += FRAMES_PER_CALL)
			took += send_many(fd, &first);
	}
	printf("{\"sent\":%" PRIu64 ",\"seconds\":%.6f}\n", sent, (double)took / 1e9);
	return 0;
}
