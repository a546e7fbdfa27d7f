#!/usr/bin/env bash
# Installs what waggle needs on Debian: packages, a virtual environment, the BPF objects and two static programs.
# Usage: tools/setup.sh install|demo|test. Does only what is missing; says what it does; says plainly what it cannot do.
set -euo pipefail
cd "$(dirname "$0")/.."

goal=${1:-install}
say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
fail() { printf 'waggle: %s\n' "$*" >&2; exit 1; }

# command or file that proves it → package
declare -A needed=(
	[clang]=clang [llvm-strip]=llvm [gcc]=gcc [make]=make [ip]=iproute2 [nsenter]=util-linux
	[/usr/include/bpf/bpf_helpers.h]=libbpf-dev [/usr/include/linux/bpf.h]=linux-libc-dev
	[/usr/include/stdio.h]=libc6-dev
)
# what proves that Netfilter had no part in it
if [ "$goal" != install ]; then needed+=([nft]=nftables); fi
if [ "$goal" = test ]; then needed+=([conntrack]=conntrack [ping]=iputils-ping [ethtool]=ethtool); fi
# container runtimes, and the plugins that containerd needs beside waggle's and the benchmark compares with
if [ "$goal" = test ]; then
	needed+=([containerd]=containerd [runc]=runc [podman]=podman [conmon]=conmon [runsc]=runsc)
	needed+=([/usr/lib/cni/loopback]=containernetworking-plugins [/usr/share/doc/busybox-static]=busybox-static)
	needed+=([/usr/bin/catatonit]=catatonit [curl]=curl)
fi
# a machine that systemd boots, to install on
if [ "$goal" = test ]; then needed+=([/lib/systemd/systemd]=systemd [curl]=curl [ps]=procps); fi
# a resolver whose answers policies with domain names learn from
if [ "$goal" = test ]; then needed+=([dnsmasq]=dnsmasq-base); fi
# the rules of kube-proxy that the benchmark compares with
if [ "$goal" = test ]; then needed+=([iptables-legacy-restore]=iptables [openssl]=openssl); fi

missing=()
for proof in "${!needed[@]}"; do
	case $proof in
	/*) [ -e "$proof" ] || missing+=("${needed[$proof]}") ;;
	*) PATH="$PATH:/usr/sbin:/sbin" command -v "$proof" >/dev/null || missing+=("${needed[$proof]}") ;;
	esac
done
ldconfig -p 2>/dev/null | grep -q 'libbpf\.so\.1' || PATH="$PATH:/sbin:/usr/sbin" ldconfig -p | grep -q 'libbpf\.so\.1' || missing+=(libbpf1)

python=""
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
	if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
		python=$candidate
		break
	fi
done
[ -n "$python" ] || missing+=(python3 python3-venv)
if [ -n "$python" ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
	missing+=(python3-venv)
fi

if [ ${#missing[@]} -gt 0 ]; then
	if [ "$(id -u)" != 0 ]; then
		fail "these packages are missing and need root to install: ${missing[*]}
  sudo apt-get install ${missing[*]}"
	fi
	command -v apt-get >/dev/null || fail "this is not Debian: install the equivalents of: ${missing[*]}"
	say "installing packages: ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
	[ -n "$python" ] || python=python3
fi

if [ ! -x .venv/bin/python ]; then
	say "making a virtual environment in .venv with $("$python" --version)"
	"$python" -m venv .venv
fi

what=.
if [ "$goal" = test ]; then what='.[dev]'; fi
wanted=".venv/.waggle-${what//[^a-z]/}-$(sha256sum pyproject.toml | cut -c1-16)"
if [ ! -e "$wanted" ]; then
	say "installing the Python package and what it depends on"
	.venv/bin/python -m pip install -q --disable-pip-version-check -e "$what" 2> >(grep -v '^WARNING: Location' >&2)
	touch "$wanted"
fi

say "building the BPF objects, the CNI plugin and waggle-health"
make --no-print-directory -C bpf
make --no-print-directory -C cni
make --no-print-directory -C health
say "ready: .venv/bin/waggle"
