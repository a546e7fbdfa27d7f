#!/bin/bash
# The first process of the virtual machine of test_vm.sh. Makes the other machine's files writable without writing to
# them, runs pytest, says its exit status on the second serial port and turns the machine off.
# Usage: vm_init.sh DIRECTORY, where `arguments` (of pytest) and `modules` (the directory of lib/modules) are
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
project=$(dirname "$(dirname "$0")")
modules=$(cat "$1/modules")

tests() {
	set -e
	mount -t proc proc /proc
	modprobe -d "$modules" overlay
	mount -t tmpfs tmpfs /mnt
	mkdir /mnt/{upper,work,root}
	mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
	cd /mnt/root
	pivot_root . mnt
	mount -t proc proc /proc
	mount -t sysfs sysfs /sys
	mount -t devtmpfs devtmpfs /dev
	mkdir -p /dev/shm /dev/pts
	for directory in /dev/shm /run /tmp; do mount -t tmpfs tmpfs "$directory"; done
	mount -t devpts devpts /dev/pts
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
	mount -t bpf bpf /sys/fs/bpf
	if [ ! -d "/lib/modules/$(uname -r)" ]; then
		mkdir -p /lib/modules
		ln -s "$modules/lib/modules/$(uname -r)" /lib/modules/
	fi
	ip link set lo up
	echo waggle-vm >/proc/sys/kernel/hostname
	cd "$project"
	mapfile -d '' arguments <"$1/arguments"
	.venv/bin/python -m pytest -p no:cacheprovider "${arguments[@]}"
}

(tests "$1")
status=$?
[ -e /dev/ttyS1 ] && echo $status >/dev/ttyS1
sync
echo o >/proc/sysrq-trigger
sleep 60
