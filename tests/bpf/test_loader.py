"""Objects that do not load, maps that are taken over, links that are put and replaced under packets."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from waggle.abi._generated import CONFIG_LAYOUT
from waggle.errors import KernelError, LoadError, NotFound
from waggle.kernel import links, syscall
from waggle.kernel.links import AttachType
from waggle.kernel.maps import ARRAY, HASH, LRU_HASH, Map
from waggle.kernel.netns import call_in_netns
from waggle.kernel.objects import BpfObject, load_pinned

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="loads programs: needs root")]

INCLUDE = Path(__file__).resolve().parents[2] / "bpf" / "include"
HEAD = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
char LICENSE[] SEC("license") = "GPL";
"""
REFUSED = """
SEC("tc") int good(struct __sk_buff *skb) { return 0; }
SEC("tc") int bad(struct __sk_buff *skb)
{
	char *data = (char *)(long)skb->data;
	return *data; /* nobody looked for the end of the packet */
}
"""
#: counts packets into `seen`, lets all pass; TAG tells two compilations apart
COUNTER = """
const volatile __u32 tag = 1;
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 4);
} seen SEC(".maps");
SEC("tc") int count(struct __sk_buff *skb)
{
	__u32 key = tag;
	__u64 *value;
	if (skb->protocol != __builtin_bswap16(0x0800))
		return -1; /* only IPv4; on with the next program */
	value = bpf_map_lookup_elem(&seen, &key);
	if (value)
		__sync_fetch_and_add(value, 1);
	return -1;
}
"""
TABLES = """
struct { __uint(type, BPF_MAP_TYPE_%s); __type(key, __u32); __type(value, __u64); __uint(max_entries, 8); } table SEC(".maps");
SEC("tc") int look(struct __sk_buff *skb) { __u32 key = 0; return bpf_map_lookup_elem(&table, &key) ? 0 : 2; }
"""  # noqa: E501
_numbers = itertools.count(1)


def compiled(directory: Path, source: str, name: str = "tiny") -> Path:
    path = directory / f"{name}.c"
    path.write_text(HEAD + source)
    command = ["clang", "-O2", "-g", "-target", "bpf", "-I/usr/include/x86_64-linux-gnu", f"-I{INCLUDE}"]
    subprocess.run([*command, "-c", str(path), "-o", str(path.with_suffix(".bpf.o"))], check=True)
    return path.with_suffix(".bpf.o")


@pytest.fixture
def pins() -> Iterator[Path]:
    """A directory on bpffs."""
    directory = Path("/sys/fs/bpf") / f"wagld-{os.getpid()}-{next(_numbers)}"
    directory.mkdir()
    yield directory
    for path in directory.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    directory.rmdir()


# -- objects that do not load ----------------------------------------------------------------------------------------


def test_refused_by_the_verifier(tmp_path: Path) -> None:
    with BpfObject(compiled(tmp_path, REFUSED)) as bpf, pytest.raises(LoadError) as caught:
        bpf.load()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("tiny.bpf.o: bad did not load: invalid access to packet"), message
    assert caught.value.errno == 13
    log = caught.value.log
    assert "--- bad\n" in log and "processed" in log  # from the verifier's first line to its statistics
    assert log.index("invalid access to packet") > log.index("--- bad\n")


def test_refused_leaves_nothing_behind(tmp_path: Path, pins: Path) -> None:
    with BpfObject(compiled(tmp_path, REFUSED + TABLES % "HASH")) as bpf, pytest.raises(LoadError):
        load_pinned(bpf, pins, {})
    assert list(pins.iterdir()) == []


def test_refused_program_that_is_not_wanted_is_not_loaded(tmp_path: Path) -> None:
    with BpfObject(compiled(tmp_path, REFUSED)) as bpf:
        bpf.autoload({"good"})
        bpf.load()
        assert set(bpf.programs) == {"good"}


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\x7fELF", b"\x7fELF" + bytes(200)])
def test_object_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.bpf.o"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"broken\.bpf\.o: not a BPF object") as caught:
        BpfObject(path)
    assert "\n" not in str(caught.value)


def test_object_file_cut_short(tmp_path: Path) -> None:
    path = compiled(tmp_path, COUNTER)
    whole = path.read_bytes()
    for size in (len(whole) // 4, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:size])
        with pytest.raises(LoadError), BpfObject(path) as bpf:
            bpf.load()


def test_object_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"none\.bpf\.o is missing: build it with"):
        BpfObject(tmp_path / "none.bpf.o")
    with pytest.raises(LoadError, match="not a BPF object"):
        BpfObject(tmp_path)  # a directory


def test_constants_of_a_wrong_size() -> None:
    values = {name: bytes(size) for name, (_, size) in CONFIG_LAYOUT["pod"].items()}
    name = next(iter(values))
    for value in (b"", values[name] + b"\0", values[name][1:]):
        with BpfObject.open("pod") as bpf, pytest.raises(LoadError, match=f"constant {name} does not fit"):
            bpf.configure(CONFIG_LAYOUT["pod"], values | {name: value})
    beyond = CONFIG_LAYOUT["pod"] | {name: (1 << 16, len(values[name]))}
    with BpfObject.open("pod") as bpf, pytest.raises(LoadError, match="does not fit"):
        bpf.configure(beyond, values)


def test_constants_are_set(tmp_path: Path) -> None:
    from waggle.kernel.testrun import run_packet

    with BpfObject(compiled(tmp_path, COUNTER)) as bpf:
        bpf.configure({"tag": (0, 4)}, {"tag": (3).to_bytes(4, "little")})
        bpf.load()
        run_packet(bpf.programs["count"], bytes(12) + b"\x08\x00" + bytes(46))
        values = [int.from_bytes(raw, "little") for _, raw in bpf.maps["seen"].dump()]
        assert values == [0, 0, 0, 1]


# -- maps that are taken over ----------------------------------------------------------------------------------------


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


@pytest.mark.parametrize("kind", ["HASH", "ARRAY", "LRU_HASH"])
def test_changed_size_moves_entries(tmp_path: Path, pins: Path, kind: str) -> None:
    path = compiled(tmp_path, TABLES % kind)
    with BpfObject(path) as bpf:
        first = load_pinned(bpf, pins, {"table": 8})["table"]
    first.update_many([(u32(n), u64(100 + n)) for n in range(8)])
    with BpfObject(path) as bpf:
        same = load_pinned(bpf, pins, {"table": 8})["table"]
    assert same.info.id == first.info.id
    with BpfObject(path) as bpf:
        larger = load_pinned(bpf, pins, {"table": 64})["table"]
    assert larger.info.id != first.info.id and larger.info.max_entries == 64
    entries = {key: value for key, value in larger.dump() if any(value)}
    if kind != "LRU_HASH":
        assert entries == {u32(n): u64(100 + n) for n in range(8)}
    else:  # free entries are dealt out per CPU: the first table may have held less than eight
        assert entries == dict(first.dump()) and len(entries) >= 4
    assert Map.pinned(pins / "table").info.id == larger.info.id
    with BpfObject(path) as bpf:
        smaller = load_pinned(bpf, pins, {"table": 4})["table"]
    left = {key: value for key, value in smaller.dump() if any(value)}
    assert smaller.info.max_entries == 4 and left.items() <= entries.items()
    assert len(left) == 4 if kind != "LRU_HASH" else left


def test_killed_while_a_map_is_replaced(tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it ends, there is a map with all entries under the name: the next start finds it."""
    path = compiled(tmp_path, TABLES % "HASH")
    with BpfObject(path) as bpf:
        old = load_pinned(bpf, pins, {"table": 8})["table"]
    old.update(u32(1), u64(101))
    for dying in ((Map, "pin"), (Path, "rename")):
        with monkeypatch.context() as patch, BpfObject(path) as bpf:
            patch.setattr(*dying, lambda *_: (_ for _ in ()).throw(KernelError("killed")))
            with pytest.raises(KernelError, match="killed"):
                load_pinned(bpf, pins, {"table": 16})
        assert Map.pinned(pins / "table").dump() == [(u32(1), u64(101))]
    with BpfObject(path) as bpf:
        assert load_pinned(bpf, pins, {"table": 16})["table"].dump() == [(u32(1), u64(101))]
    assert [pin.name for pin in pins.iterdir()] == ["table"]


def test_map_of_another_layout_is_replaced(tmp_path: Path, pins: Path) -> None:
    path = compiled(tmp_path, TABLES % "HASH")
    for kind, key_size, value_size in ((HASH, 8, 8), (HASH, 4, 16), (ARRAY, 4, 8), (LRU_HASH, 4, 8)):
        stranger = Map.create(kind, key_size, value_size, 8, "table")
        stranger.update((1).to_bytes(key_size, "little"), (7).to_bytes(value_size, "little"))
        (pins / "table").unlink(missing_ok=True)
        stranger.pin(pins / "table")
        with BpfObject(path) as bpf:
            table = load_pinned(bpf, pins, {})["table"]
        assert (table.info.type, table.key_size, table.value_size) == (HASH, 4, 8)
        assert table.dump() == []
        assert Map.pinned(pins / "table").info.id == table.info.id


# -- links -----------------------------------------------------------------------------------------------------------


class Pair:
    """Two network namespaces and a veth pair between them, `v0` in each."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.names = [f"wagld-{os.getpid()}-{number}-{side}" for side in "ab"]

    def __enter__(self) -> Pair:
        a, b = self.names
        for name in self.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        lines = [
            ["-n", a, "link", "add", "v0", "type", "veth", "peer", "v0", "netns", b],
            *(["-n", name, "addr", "add", f"192.0.2.{i}/24", "dev", "v0"] for i, name in enumerate(self.names, 1)),
            *(["-n", name, "link", "set", "v0", "up"] for name in self.names),
        ]
        for line in lines:
            subprocess.run(["ip", *line], check=True)
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def inside(self, function):
        return call_in_netns(f"/run/netns/{self.names[1]}", function)

    @property
    def ifindex(self) -> int:
        return self.inside(lambda: socket.if_nametoindex("v0"))


def loaded(path: Path, tag: int, seen: Map | None = None) -> tuple[syscall.Fd, Map]:
    with BpfObject(path) as bpf:
        bpf.configure({"tag": (0, 4)}, {"tag": u32(tag)})
        bpf.load({"seen": seen} if seen else None)
        return bpf.programs["count"], bpf.maps["seen"]


def test_attach_is_idempotent_and_detach_can_be_repeated(tmp_path: Path, pins: Path) -> None:
    path = compiled(tmp_path, COUNTER)
    pin = pins / "link"
    with Pair() as pair:
        first, seen = loaded(path, 1)
        second, _ = loaded(path, 2, seen)
        index = pair.ifindex

        def there() -> list[int]:
            return pair.inside(lambda: [n for n, _ in links.query_programs(index, AttachType.TCX_INGRESS)])

        for program, new in ((first, True), (first, False), (second, False)):
            made = pair.inside(lambda p=program: links.attach(p.number, index, AttachType.TCX_INGRESS, pin))
            assert made is new
            assert there() == [syscall.prog_info(program.number)[1]]
        assert links.detach(pin) is True
        assert there() == [] and not pin.exists()
        assert links.detach(pin) is False


def test_update_under_packets_loses_nothing(tmp_path: Path, pins: Path) -> None:
    """Each packet meets one of the programs: none is passed by, none is counted twice."""
    path = compiled(tmp_path, COUNTER)
    with Pair() as pair:
        first, seen = loaded(path, 1)
        second, _ = loaded(path, 2, seen)
        index, pin = pair.ifindex, pins / "link"
        pair.inside(lambda: links.attach(first.number, index, AttachType.TCX_INGRESS, pin))
        sender = call_in_netns(f"/run/netns/{pair.names[0]}", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sent, ended = 0, threading.Event()

        def send() -> None:
            nonlocal sent
            while not ended.is_set():
                for _ in range(50):
                    sender.sendto(b"x", ("192.0.2.2", 9))
                    sent += 1
                time.sleep(0.001)  # less than a queue holds

        with sender:
            sender.sendto(b"x", ("192.0.2.2", 9))  # the neighbour is resolved with this one
            time.sleep(0.3)
            for n in range(4):
                seen.update(u32(n), u64(0))
            thread = threading.Thread(target=send)
            thread.start()
            try:
                for turn in range(400):
                    program = (second, first)[turn % 2]
                    pair.inside(lambda p=program: links.attach(p.number, index, AttachType.TCX_INGRESS, pin))
            finally:
                ended.set()
                thread.join()
            time.sleep(0.2)
        counts = [int.from_bytes(raw, "little") for _, raw in seen.dump()]
        assert counts[1] + counts[2] == sent, counts
        assert counts[1] > 0 and counts[2] > 0


def test_pin_of_an_interface_that_is_gone(tmp_path: Path, pins: Path) -> None:
    path = compiled(tmp_path, COUNTER)
    pin = pins / "link"
    program, _ = loaded(path, 1)
    with Pair() as pair:
        index = pair.ifindex
        pair.inside(lambda: links.attach(program.number, index, AttachType.TCX_INGRESS, pin))
    deadline = time.monotonic() + 10
    while True:
        with syscall.obj_get(pin) as link:
            if links.link_target(link.number) == 0:
                break
        assert time.monotonic() < deadline, "the kernel detaches it with the interface"
        time.sleep(0.02)
    with Pair() as pair:
        index = pair.ifindex
        assert pair.inside(lambda: links.attach(program.number, index, AttachType.TCX_INGRESS, pin)) is True
        assert len(pair.inside(lambda: links.query_programs(index, AttachType.TCX_INGRESS))) == 1
        with pytest.raises(NotFound):
            pair.inside(lambda: links.attach(program.number, 9999, AttachType.TCX_INGRESS, pin))
    assert links.detach(pin) is False or not pin.exists()


@pytest.mark.parametrize("stands_there", ["directory", "symlink", "map"])
def test_what_is_no_link_gives_way(tmp_path: Path, pins: Path, stands_there: str) -> None:
    program, seen = loaded(compiled(tmp_path, COUNTER), 1)
    pin = pins / "link"

    def put() -> None:
        match stands_there:
            case "directory":
                pin.mkdir()
            case "symlink":
                pin.symlink_to(pins / "nowhere")
            case "map":
                seen.pin(pin)

    with Pair() as pair:
        put()
        index = pair.ifindex
        assert pair.inside(lambda: links.attach(program.number, index, AttachType.TCX_INGRESS, pin)) is True
        assert links.detach(pin) is True
    put()
    assert links.detach(pin) is True
    assert list(pins.iterdir()) == []


def test_a_directory_that_is_not_empty_is_named(pins: Path) -> None:
    (pins / "link").mkdir()
    (pins / "link" / "inner").mkdir()
    with pytest.raises(KernelError, match="link: Directory not empty"):
        links.detach(pins / "link")
    (pins / "link" / "inner").rmdir()
