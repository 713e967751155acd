"""Reading manifest files: what Kubernetes' own YAML reads, and what is refused."""

import math

import pytest

from mesh.sources.manifest import MAX_DEPTH, MAX_FILE, UnreadableError, read_documents


def value(text: str):
    (document,) = read_documents(text.encode())
    assert document.errors == ()
    return document.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", "x"),
        ("yes", True),
        ("y", True),
        ("On", True),
        ("NO", False),
        ("off", False),
        ("yEs", "yEs"),
        ("'yes'", "yes"),
        ('"1"', "1"),
        ("1", 1),
        ("-12", -12),
        ("010", 8),
        ("0o10", 8),
        ("08", 8.0),
        ("0x1F", 31),
        ("0b11", 3),
        ("1_000", 1000),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("-.inf", -math.inf),
        ("~", None),
        ("null", None),
        ("2024-01-02", "2024-01-02"),
        ("2024-01-02T03:04:05Z", "2024-01-02T03:04:05Z"),
        ("12:30:45", "12:30:45"),
        ("1.2.3", "1.2.3"),
        ("+", "+"),
        ("0x", "0x"),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("!!binary aGk=", "hi"),
        ("!!timestamp 2024-01-02", "2024-01-02"),
        ("9" * 500, "9" * 500),
    ],
)
def test_scalars_as_kubernetes_reads_them(text, expected):
    assert value(f"a: {text}") == {"a": expected}


def test_keys_are_text():
    assert value("{1: a, true: b, 2024-01-01: c, ~: d}") == {
        "1": "a",
        "true": "b",
        "2024-01-01": "c",
        "~": "d",
    }


def test_anchors_aliases_and_merges():
    assert value("a: &x {p: 1, q: 2}\nb: *x\nc: {<<: *x, q: 3}\nd: {<<: [*x, {r: 4}]}\n") == {
        "a": {"p": 1, "q": 2},
        "b": {"p": 1, "q": 2},
        "c": {"p": 1, "q": 3},
        "d": {"p": 1, "q": 2, "r": 4},
    }


def test_documents_are_numbered_as_they_stand_and_empty_ones_are_left_out():
    found = read_documents(b"# only a comment\n---\na: 1\n---\n---\n{b: 2}\n...\n")
    assert [(d.number, d.value) for d in found] == [(1, {"a": 1}), (3, {"b": 2})]


@pytest.mark.parametrize("data", [b"", b"\n", b"# nothing\n", b"---\n", b"\xef\xbb\xbf"])
def test_a_file_without_documents(data):
    assert read_documents(data) == []


def test_duplicate_keys_are_errors_of_their_document_alone():
    found = read_documents(b"a: 1\na: 2\n---\nb: {c: [x, {d: 1, d: 2}]}\n---\ne: 1\n")
    assert [d.errors for d in found] == [
        (("a", "given twice in the same mapping"),),
        (("b.c[1].d", "given twice in the same mapping"),),
        (),
    ]
    assert found[0].value == {"a": 1}


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("a: !thing x", "a", "tag !thing is not supported"),
        ("a: {<<: 1}", "a.<<", "a merge (<<) takes a mapping or a list of them"),
        ("a: !!binary '*'", "a", "!!binary is not base64 of UTF-8 text"),
    ],
)
def test_what_a_document_must_not_say(text, path, message):
    (document,) = read_documents(text.encode())
    assert document.errors == ((path, message),)


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: b: c", "not YAML at line 1, column 5: mapping values are not allowed"),
        (b"a: [1, 2", "not YAML at line 2, column 1"),
        (b"a: 'x", "not YAML"),
        (b"a: \0", "not YAML: control characters are not allowed"),
        (b"a: \xff", "not UTF-8 at byte 3"),
        ("a: 1".encode("utf-16"), "not UTF-8 at byte 0"),
        (b"a: *nothing", "line 1: no anchor &nothing before this"),
        (b"a: &a [*a]", "line 1: no anchor &a before this"),
        (b"? [a]\n: b", "line 1: a key must be text"),
        (b"[" * 100_000, f"nested deeper than {MAX_DEPTH}"),
        (BOMB.encode(), "aliases expand to too much"),
        (CHAIN.encode(), "aliases expand to too much"),
        (b"#" * (MAX_FILE + 1), "larger than 16 MiB"),
    ],
)
def test_files_that_cannot_be_read(data, message):
    with pytest.raises(UnreadableError) as caught:
        read_documents(data)
    assert message in str(caught.value)


def test_a_broken_tail_spoils_the_file():
    """Nobody knows what else the file would have said, so the caller must not take half of it."""
    with pytest.raises(UnreadableError, match="line 4, column 1"):
        read_documents(b"a: 1\n---\nb: [")


def test_every_prefix_of_a_manifest_is_read_or_refused_as_a_whole():
    """Half-written files: nothing but the documented error comes out."""
    text = "a: &x {b: [1, 'two', \"three\"], c: |\n  text\n}\n".replace("|\n  text\n", "t")
    text += "---\nd: {<<: {e: f}}\n"
    for end in range(len(text)):
        try:
            found = read_documents(text[:end].encode())
        except UnreadableError:
            continue
        assert len(found) <= 2


def test_json():
    (document,) = read_documents(
        b'{"a": "\\ud83d\\ude00", "b": [1, 2.5, true, null]}', is_json=True
    )
    assert document.value == {"a": "😀", "b": [1, 2.5, True, None]}
    assert read_documents(b" \n", is_json=True) == []
    (document,) = read_documents(b'{"a": 1, "a": 2}', is_json=True)
    assert document.errors == (("a", "given twice"),)


@pytest.mark.parametrize("data", [b'{"a": 1} x', b"{", b"[" * 100_000, b"{'a': 1}"])
def test_what_is_not_json(data):
    with pytest.raises(UnreadableError, match="not JSON"):
        read_documents(data, is_json=True)
