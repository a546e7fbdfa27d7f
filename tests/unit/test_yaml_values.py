"""Documents: cutting, values, lines, and input that means harm."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waggle.sources.yaml_documents import Document, read_documents
from waggle.sources.yaml_values import MAX_ALIASED_VALUES, MAX_DEPTH, SyntaxFault


def values(data: bytes) -> list[object]:
    """The value of each document; (reason, line) where one is broken."""
    return [
        found.value if isinstance(found, Document) else (found.reason, found.line) for found in read_documents(data)
    ]


def only_fault(data: bytes) -> SyntaxFault:
    found = list(read_documents(data))
    assert len(found) == 1, found
    assert isinstance(found[0], SyntaxFault), found
    return found[0]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("yes", True),
        ("y", True),
        ("Off", False),
        ("'yes'", "yes"),
        ("~", None),
        ("null", None),
        ("12", 12),
        ("-7", -7),
        ("1_000", 1000),
        ("0x1F", 31),
        ("017", 15),
        ("0o17", 15),
        ("0b11", 3),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".inf", float("inf")),
        ("08", 8.0),
        ("1.2.3", "1.2.3"),
        ("10.96.0.10", "10.96.0.10"),
        ("fd00::10", "fd00::10"),
        ("2001:10:20:30:40:50:59:59", "2001:10:20:30:40:50:59:59"),
        ("12:30:45", "12:30:45"),  # no base 60
        ("2024-01-31", "2024-01-31"),  # no dates
        ("9" * 5000, "9" * 5000),  # no number: converting it is refused by Python
        ("!!str 5", "5"),
        ("!!int 5", 5),
        ("! 5", "5"),
        ("-", ["-"]),
        ("+", "+"),
        (".", "."),
    ],
)
def test_scalars_mean_what_they_mean_to_kubectl(text, meaning):
    if text == "-":  # a lone dash begins a list
        assert values(b"a: '-'\n") == [{"a": "-"}]
        return
    assert values(f"a: {text}\n".encode()) == [{"a": meaning}]


def test_documents_are_independent_and_keep_their_lines():
    data = b"# head\na: 1\n---\nb: [\n---\nc: 3\n...\n# between\n--- {d: 4}\n---\n---\n# only a comment\n"
    found = list(read_documents(data))
    assert [type(item).__name__ for item in found] == ["Document", "SyntaxFault", "Document", "Document"]
    good = [item for item in found if isinstance(item, Document)]
    assert [(item.value, item.line) for item in good] == [({"a": 1}, 2), ({"c": 3}, 6), ({"d": 4}, 9)]
    assert found[1].line == 4


def test_a_marker_inside_a_scalar_ends_it_only_at_the_start_of_a_line():
    assert values(b"a: |\n  x\n  ---\n  y\n") == [{"a": "x\n---\ny\n"}]
    assert values(b"---x: 1\n") == [{"---x": 1}]


def test_directives_belong_to_the_document_after_them():
    assert values(b"%YAML 1.1\n# c\n---\na: 1\n...\n%TAG ! tag:x,2000:\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("data", "line", "part"),
    [
        (b"a: 1\nb: 2\na: 3\n", 3, "'a' is given twice"),
        (b'{"a": 1,\n "a": 2}', 2, "'a' is given twice"),
        (b"a:\n\tb: 1\n", 2, "not with tabs"),
        (b"a: 1\nb: x\x00y\n", 2, "U+0000"),
        (b"a: 1\nb: \x1b[31m\n", 2, "U+001B"),
        (b"a: 1\nb: \xff\n", 2, "0xff is not UTF-8"),
        ("a: ä\n".encode("latin-1"), 1, "not UTF-8"),
        ("a: 1\n".encode("utf-16"), 1, "UTF-16"),
        (b"a: 'never closed\nb: 1\n", 2, "unexpected end of stream"),
        (b"a: !!binary aGk=\n", 1, "!!binary is not supported"),
        (b"a: !Ref x\n", 1, "!Ref is not supported"),
        (b"a: !!int x\n", 1, "not what its tag"),
        (b"? [a]\n: b\n", 1, "key must be a string"),
        (b"a: *nothing\n", 1, "stands for nothing"),
        (b"a: &a [*a]\n", 1, "part of"),
        (b"a: 1\n<<: 3\n", 2, "merges mappings only"),
        (b"{a: 1}\n{b: 2}\n", 2, "not YAML"),
    ],
)
def test_what_is_refused_says_where(data, line, part):
    fault = only_fault(data)
    assert part in fault.reason
    assert fault.line == line


@pytest.mark.parametrize("opening", [b"[", b"{a: ", b"- ", b"? ", b"[{a: "])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 300_000])
def test_deep_nesting_is_refused_and_does_not_crash(opening, depth):
    fault = only_fault(opening * depth)
    # libyaml has a limit of its own for flow collections, and says so in its own words
    assert any(part in fault.reason for part in ("nested deeper", "key must be a string", "maximum nesting depth"))


def test_nesting_within_the_limit_is_fine():
    assert values(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) != []
    assert not isinstance(next(iter(read_documents(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH))), SyntaxFault)


def test_alias_bomb_is_refused_quickly():
    lines = [b"l0: &l0 [" + b",".join([b"x"] * 10) + b"]"]
    lines += [b"l%d: &l%d [%s]" % (n, n, b",".join([b"*l%d" % (n - 1)] * 10)) for n in range(1, 30)]
    begin = time.process_time()
    fault = only_fault(b"\n".join(lines))
    assert f"more than {MAX_ALIASED_VALUES:,}" in fault.reason
    assert time.process_time() - begin < 1.0


def test_merge_bomb_is_refused():
    lines = [b"l0: &l0 {k: v}"] + [b"l%d: &l%d {<<: *l%d, k%d: v}" % (n, n, n - 1, n) for n in range(1, 2000)]
    assert "aliases expand" in only_fault(b"\n".join(lines)).reason


def test_aliases_and_merges_expand():
    text = b"x: &x {b: 1}\ny: {<<: *x, c: 2}\nz: {<<: [*x, {d: 4}], b: 3}\nw: [*x, *x]\n'<<': 1\nk: &k s\nm: {*k : 1}\n"
    assert values(text) == [
        {
            "x": {"b": 1},
            "y": {"b": 1, "c": 2},
            "z": {"b": 3, "d": 4},
            "w": [{"b": 1}, {"b": 1}],
            "<<": 1,
            "k": "s",
            "m": {"s": 1},
        }
    ]


def test_json_with_what_yaml_does_not_know():
    assert values(b'{"a": "\\ud83d\\ude00 \\/"}') == [{"a": "\U0001f600 /"}]
    assert values(b'\xef\xbb\xbf{"a": 1}') == [{"a": 1}]


@pytest.mark.parametrize(
    ("path", "line", "plain"),
    [
        ((), 2, None),
        (("a",), 2, None),
        (("a", "b", 0, "c"), 4, "1"),
        (("a", "b", 1, "c"), 5, "yes"),
        (("a", "b", 1, "d"), 6, None),
        (("a", "b", 9, "c"), 3, None),  # not there: the list is shown
        (("a", "nothing", "x"), 2, None),
        (("m", "inner"), 8, "7"),  # through a merge: where it is written
        (("m", "own"), 9, "1"),
    ],
)
def test_locate(path, line, plain):
    data = b"# c\na:\n  b:\n  - c: 1\n  - c: yes\n    d: 'q'\nbase: &base\n  inner: 7\nm: {<<: *base, own: 1}\n"
    (document,) = read_documents(b"---\n" + data[4:])
    assert document.locate(path)[:2] == (line, plain)


def test_locate_counts_lines_of_earlier_documents():
    second = list(read_documents(b"a: 1\n---\n# c\nb:\n  c: 1\n"))[1]
    assert second.locate(("b", "c")).line == 5


def test_locate_in_json():
    (document,) = read_documents(b'\n{\n  "a": {\n    "b": 80\n  }\n}\n')
    assert (document.line, document.locate(("a", "b")).line) == (2, 4)


@given(st.binary(max_size=400))
def test_any_bytes_end_as_documents_or_faults(data):
    for found in read_documents(data):
        assert found.line >= 1
        if isinstance(found, Document):
            assert found.locate(("a", 0, "b")).line >= 1


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=6), _JSON, min_size=1, max_size=4))
def test_json_and_yaml_readings_agree(value):
    """What json writes reads back the same through the JSON path and, as a flow mapping, through the YAML path."""
    import json

    text = json.dumps(value)
    assert values(text.encode()) == [value]
    if "\\ud" not in text and "\\u0000" not in text:
        fault_or_value = values(b"--- " + text.encode())
        assert fault_or_value == [value]
