"""Maps for people: every entry decoded by the types that were generated from BTF."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from waggle.abi._generated import MAPS, U32, U64, Address, Counter, Hook
from waggle.abi.address import protocol_name, unpack_address
from waggle.errors import KernelError, NotFound
from waggle.kernel import maps
from waggle.kernel.maps import Map
from waggle.observe.reasons import hook_name, reason_name, verdict_name

_TYPES = {
    1: "hash",
    2: "array",
    5: "percpu_hash",
    6: "percpu_array",
    9: "lru_hash",
    11: "lpm_trie",
    24: "sk_storage",
    27: "ringbuf",
}
_ADDRESS_FIELDS = {"addr", "src", "dst", "frontend", "backend"}
_TEXT_FIELDS = {"namespace", "name"}


def list_maps(bpf_root: Path) -> list[dict[str, Any]]:
    """Name, type, size and memory of every pinned map."""
    directory = bpf_root / "maps"
    rows = []
    try:
        pins = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise KernelError(f"cannot read {directory}: {error.strerror}: run as root", error.errno or 0) from error
    for pin in pins:
        item = maps.open_pinned(pin)
        if item is None:
            continue
        info = item.info
        rows.append(
            {
                "name": pin.name,
                "type": _TYPES.get(info.type, str(info.type)),
                "keySize": info.key_size,
                "valueSize": info.value_size,
                "maxEntries": info.max_entries,
                "memoryBytes": item.memory_bytes(),
            }
        )
    return rows


def dump_map(bpf_root: Path, name: str) -> list[dict[str, Any]]:
    """All entries, decoded into flat rows. Arrays leave out entries that are all zero. NotFound: no such map."""
    full = name if name.startswith("wag_") else f"wag_{name}"
    if "/" in full:
        raise NotFound(f"no map {name}")
    item = Map.pinned(bpf_root / "maps" / full)
    key_type, value_type = MAPS.get(full, (None, None))
    if item.info.type in (maps.SK_STORAGE, maps.RINGBUF):
        raise NotFound(f"map {full} holds no entries that can be listed ({_TYPES[item.info.type]})")
    rows = []
    for key, value in item.dump():
        if item.info.type in (maps.ARRAY, maps.PERCPU_ARRAY) and not any(value):
            continue
        if item.info.type == maps.PERCPU_ARRAY and hasattr(value_type, "unpack"):
            rows += _per_cpu(value_type, int.from_bytes(key, "little"), value, item.info.value_size)
            continue
        row = _decode(key_type, key, "key")
        if item.info.type == maps.PERCPU_ARRAY:
            row = _label_counter(full, int.from_bytes(key, "little"))
            row["value"] = sum(struct.unpack(f"={len(value) // 8}Q", value))
        else:
            row |= _decode(value_type, value, "value")
        rows.append(row)
    return rows


def _per_cpu(kind: Any, index: int, raw: bytes, size: int) -> list[dict[str, Any]]:
    """A row for every CPU that has written something. A CPU's value takes a multiple of eight bytes."""
    step = (size + 7) // 8 * 8
    parts = [raw[at : at + size] for at in range(0, len(raw), step)]
    return [{"index": index, "cpu": cpu} | _decode(kind, part, "value") for cpu, part in enumerate(parts) if any(part)]


def _label_counter(name: str, index: int) -> dict[str, Any]:
    if name == "wag_drops":
        return {"reason": reason_name(index // Hook.MAX), "hook": hook_name(index % Hook.MAX)}
    if name == "wag_flow_counts":
        return {"hook": hook_name(index)}
    try:
        return {"counter": Counter(index).name.lower()}
    except ValueError:
        return {"counter": str(index)}


def _decode(kind: Any, raw: bytes, role: str) -> dict[str, Any]:
    if kind is None:
        return {role: raw.hex()}
    if kind is Address:
        return {"address": unpack_address(raw)}
    if kind in (U32, U64):
        return {"index" if role == "key" else role: int.from_bytes(raw, "little")}
    return _flatten(kind.unpack(raw))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {}
    for field, item in zip(value._fields, value, strict=True):
        label = f"{prefix}{field}"
        if hasattr(item, "_fields"):
            row |= _flatten(item, f"{label}_")
        elif field in _ADDRESS_FIELDS and isinstance(item, bytes):
            row[label] = unpack_address(item)
        elif field in _TEXT_FIELDS and isinstance(item, bytes):
            row[label] = item.rstrip(b"\0").decode(errors="replace")
        elif isinstance(item, bytes):
            row[label] = item.hex(":")
        elif field == "proto":
            row[label] = protocol_name(item)
        elif field == "verdict":
            row[label] = verdict_name(item)
        else:
            row[label] = item
    return row
