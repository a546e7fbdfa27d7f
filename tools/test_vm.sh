#!/usr/bin/env bash
# Runs tests in a virtual machine whose kernel has what this one's may not have (SCTP sockets): the newest cloud kernel of
# Debian's backports, or KERNEL=/path/to/boot/vmlinuz-…, with its modules in ../lib/modules and virtiofs built in.
# The machine sees this one's files, and what it writes is its own and gone with it. The kernel stays in build/vm; without
# that directory the newest is fetched again. VM_SECONDS: how long it may take (3600).
# Usage: tools/test_vm.sh [arguments of pytest, instead of those that run test_sctp.py]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"

[ $# != 0 ] || set -- -v tests/netns/test_sctp.py
limit=${VM_SECONDS:-3600}
say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
fail() { printf 'waggle: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "the machine is given this one's files, which needs root: sudo make test-vm"
[ "$(uname -m)" = x86_64 ] || fail "this script knows only amd64"

virtiofsd() { ls /usr/libexec/virtiofsd /usr/lib/qemu/virtiofsd 2>/dev/null | head -1; }
missing=()
command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
command -v depmod >/dev/null || missing+=(kmod)
if [ -z "$(virtiofsd)" ]; then
	# in Debian 12 it comes with qemu
	if apt-cache show virtiofsd >/dev/null 2>&1; then missing+=(virtiofsd); else missing+=(qemu-system-common); fi
fi
if [ ${#missing[@]} -gt 0 ]; then
	say "installing packages: ${missing[*]}"
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The newest kernel of backports, by an apt of its own: this machine's sources stay as they are.
fetch_kernel() {
	local apt=$PWD/build/vm/apt codename mirror name
	codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $codename" 'Created-By: Packages' | head -1)
	[ -n "$mirror" ] || fail "apt has no mirror of Debian $codename; name a kernel: KERNEL=/path/to/boot/vmlinuz-…"
	mkdir -p "$apt"/{lists,cache/archives}/partial
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $codename-backports main" >"$apt/sources.list"
	cat >"$apt/apt.conf" <<-END
		Dir::State::lists "$apt/lists";
		Dir::Cache "$apt/cache";
		Dir::Etc::sourcelist "$apt/sources.list";
		Dir::Etc::sourceparts "-";
		APT::Sandbox::User "root";
	END
	export APT_CONFIG=$apt/apt.conf
	apt-get update -qq
	name=$(apt-cache pkgnames linux-image- | grep -E '^linux-image-[0-9][^-]*-cloud-amd64$' | sort -V | tail -1)
	[ -n "$name" ] || fail "$codename-backports has no cloud kernel; name one: KERNEL=/path/to/boot/vmlinuz-…"
	say "fetching $name"
	(cd build/vm && apt-get download -qq "$name" && mkdir kernel.new && dpkg-deb -x "$name"_*.deb kernel.new)
	depmod -b build/vm/kernel.new "${name#linux-image-}"
	rm build/vm/"$name"_*.deb
	mv build/vm/kernel.new build/vm/kernel
}

if [ -z "${KERNEL:-}" ]; then
	rm -rf build/vm/kernel.new
	[ -d build/vm/kernel ] || fetch_kernel
	KERNEL=$(echo "$PWD"/build/vm/kernel/boot/vmlinuz-*)
fi
[ -r "$KERNEL" ] || fail "no kernel at $KERNEL"

run=$(mktemp -d build/vm/run.XXXXXX)
pids=()
cleanup() {
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	wait
	rm -rf "$run"
}
trap cleanup EXIT
printf '%s\0' "$@" >"$run/arguments"
realpath "$(dirname "$KERNEL")/.." >"$run/modules"

# Some machines have a /dev/kvm that their CPU cannot serve. Emulation is slow, but works everywhere; of qemu 7.2 only
# without cmpxchg16b, which spoils the flags of an interrupt right after it.
if [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo; then
	accel=kvm cpu=host
else
	accel=tcg,thread=multi cpu=max,cx16=off,la57=off
fi

"$(virtiofsd)" --socket-path="$run/files" -o source=/,sandbox=chroot,cache=always >"$run/virtiofsd.log" 2>&1 &
pids+=($!)
for _ in {1..50}; do [ -S "$run/files" ] && break; sleep 0.1; done
[ -S "$run/files" ] || { cat "$run/virtiofsd.log"; fail "virtiofsd does not start"; }

say "booting $(basename "$KERNEL") (${accel%,*})"
timeout "$limit" qemu-system-x86_64 -accel "$accel" -machine q35 -cpu "$cpu" -smp 2 -m 4G -no-reboot -nic none \
	-object memory-backend-memfd,id=memory,size=4G,share=on -numa node,memdev=memory \
	-chardev socket,id=files,path="$run/files" -device vhost-user-fs-pci,chardev=files,tag=host \
	-display none -monitor none -serial stdio -serial file:"$run/status" -kernel "$KERNEL" -append \
	"console=ttyS0 quiet panic=-1 mitigations=off rootfstype=virtiofs root=host ro init=$PWD/tools/vm_init.sh -- $PWD/$run" </dev/null &
qemu=$!
pids+=("$qemu")
wait "$qemu" || [ $? != 124 ] || fail "not done after $limit seconds (VM_SECONDS)"
status=$(tr -cd 0-9 <"$run/status")
[ -n "$status" ] || fail "the machine ended without a result: is something above that says why?"
exit "$status"
