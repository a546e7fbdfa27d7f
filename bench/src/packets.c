// SPDX-License-Identifier: Apache-2.0
// A packet generator for one core: UDP frames straight into an interface, as fast as they go.
//
//   packets --interface NAME --from MAC --to MAC --source ADDRESS --target ADDRESS:PORT
//           [--flows N] [--seconds S] [--once | --show] [--cpu N]
//
// Frames of 60 bytes (64 with the checksum that Ethernet adds), made before the time starts. The N flows have the
// source addresses from --source on, 64 flows on each, which differ in their ports; they are sent in turn. --once
// sends one frame of every flow, with pauses, so that each is answered and known before the rest comes. --show sends
// nothing and prints the first frame in hex.
//
// Sent by sendmmsg on a packet socket past the queueing discipline. A virtual interface hands a frame to the other
// side within the call, and so the whole way of a packet through a node is on the core that sends. Prints one JSON
// line; what came out on the far side is for the caller to count.
#define _GNU_SOURCE
#include <getopt.h>
#include <inttypes.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/udp.h>

#include "sockets.h"

#define FRAME 60
#define BATCH 64
#define MAX_FLOWS 65536
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

static struct frame frames[MAX_FLOWS];
static struct iovec vectors[MAX_FLOWS];
static struct mmsghdr messages[MAX_FLOWS];

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

// Frames that the interface took. ENOBUFS: its other side dropped the frame.
static unsigned send_frames(int fd, unsigned first, unsigned count)
{
	int sent = sendmmsg(fd, messages + first, count, 0);

	if (sent < 0 && errno != ENOBUFS)
		die("sendmmsg");
	return sent < 0 ? 0 : (unsigned)sent;
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
	if (!settings.flows || settings.flows > MAX_FLOWS)
		die("--flows: 1 to %d", MAX_FLOWS);
}

int main(int count, char **arguments)
{
	const struct timespec pause = {.tv_nsec = PAUSE_NS};
	uint64_t started, until, now, sent = 0;
	int fd;

	parse_settings(count, arguments);
	end_with_parent();
	for (unsigned i = 0; i < settings.flows; i++) {
		make_frame(&frames[i], i);
		vectors[i] = (struct iovec){.iov_base = &frames[i], .iov_len = FRAME};
		messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
	}
	if (settings.show) {
		for (size_t i = 0; i < FRAME; i++)
			printf("%02x", ((const uint8_t *)&frames[0])[i]);
		putchar('\n');
		return 0;
	}
	fd = open_interface();
	started = now = now_ns();
	until = started + (uint64_t)(settings.seconds * 1e9);
	if (settings.once) {
		for (unsigned i = 0; i < settings.flows; i++) {
			sent += send_frames(fd, i, 1);
			nanosleep(&pause, NULL);
		}
		now = now_ns();
	} else {
		for (unsigned first = 0; now < until; now = now_ns()) {
			unsigned size = settings.flows - first < BATCH ? settings.flows - first : BATCH;

			sent += send_frames(fd, first, size);
			first = (first + size) % settings.flows;
		}
	}
	printf("{\"sent\":%" PRIu64 ",\"seconds\":%.6f}\n", sent, (double)(now - started) / 1e9);
	return 0;
}
