#!/usr/bin/env bash
# Runs the tests this machine can run, and says what was left out.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"

make --no-print-directory abi-check || exit 1 # else half of the tests fail, and none says why
status=0
echo "==> tests that need neither root nor BPF"
.venv/bin/python -m pytest -q -n 2 tests/unit "$@" || status=1
if [ "$(id -u)" != 0 ]; then
	echo "==> left out, because they need root: tests/bpf (programs and packets), tests/netns (namespaces, agents, lab)"
	echo "    run them with: sudo make test"
	exit $status
fi
if ! grep -qs ' /sys/fs/bpf bpf ' /proc/mounts; then
	mount -t bpf bpf /sys/fs/bpf || { echo "waggle: no bpffs at /sys/fs/bpf and it cannot be mounted" >&2; exit 1; }
fi
echo "==> tests of the programs, with packets as data"
.venv/bin/python -m pytest -q -n 2 tests/bpf "$@" || status=1
# most of them wait; those that measure time, or fill the machine, come one at a time afterwards
alone=(tests/netns/test_{agent,bandwidth,bench_smoke,change,podman,restart,takeover}.py)
echo "==> tests with namespaces, agents and the lab"
.venv/bin/python -m pytest -q -n 2 --dist loadfile --durations=15 tests/netns "${alone[@]/#/--ignore=}" "$@" || status=1
.venv/bin/python -m pytest -q --durations=10 "${alone[@]}" "$@" || status=1
exit $status
