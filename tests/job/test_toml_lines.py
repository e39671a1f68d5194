"""Lines of keys: by hand for each form of TOML, and for random documents against tomli's keys."""

from __future__ import annotations

import string

import pytest
import tomli
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from runner.job.toml_lines import key_lines, line_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# a = 1\n\na = 1 # b = 2\n", {("a",): 3}),
        ("a = 1\n[b]\nc = 2\n[d]\nc = 3", {("a",): 1, ("b",): 2, ("b", "c"): 3, ("d", "c"): 5}),
        ("[ a . b ]\nc = 1", {("a",): 1, ("a", "b"): 1, ("a", "b", "c"): 2}),
        ("[a.b]\n[a]\nc = 1", {("a",): 2, ("a", "b"): 1, ("a", "c"): 3}),
        ("a.b = 1\na.c = 2", {("a",): 1, ("a", "b"): 1, ("a", "c"): 2}),
        ("  \ta  =  1\n\t[b]\n  c=1", {("a",): 1, ("b",): 2, ("b", "c"): 3}),
        # quoted keys, with what could end them
        ('"a.b" = 1', {("a.b",): 1}),
        ("'a\"b' = 1\n\"'\" = 2", {('a"b',): 1, ("'",): 2}),
        ('["a ] #".\'b=\']\n"\\u00e4\\"\\n" = 1', {("a ] #", "b="): 1, ("a ] #", "b=", 'ä"\n'): 2}),
        # arrays of tables
        (
            "[[p]]\na = 1\n[[p]]\na = 2\n[p.q]\nb = 3\n[[p.r]]\nc = 4",
            {
                ("p",): 1,
                ("p", 0, "a"): 2,
                ("p", 1): 3,
                ("p", 1, "a"): 4,
                ("p", 1, "q", "b"): 6,
                ("p", 1, "r", 0, "c"): 8,
            },
        ),
        # values over several lines, holding what looks like keys and headers
        ('a = """\nb = 1\n[c]\n"""\nd = 1', {("a",): 1, ("d",): 5}),
        ("a = '''\nb = \"\"\"\n'''\nd = 1", {("a",): 1, ("d",): 4}),
        ('a = """x""""\nb = """x"""""\nc = """\\""""\nd = 1', {("b",): 2, ("c",): 3, ("d",): 4}),
        ('a = [""""]"""", """[""""]\nb = 1', {("a",): 1, ("b",): 2}),
        ("a = [''''[''', ''']''''']\nb = 1", {("a",): 1, ("b",): 2}),
        ("a = [\n 1, # ]\n [2,\n 3],\n]\nb = 1", {("a",): 1, ("b",): 6}),
        ('a = ["]", \'[\', "\\"]"]\nb = 1', {("a",): 1, ("b",): 2}),
        ('a = {b = "}", c = [1,\n2]}\nd = 1', {("a",): 1, ("d",): 3}),
        ("a = 1979-05-27 07:32:00 # [b\nc = 1", {("a",): 1, ("c",): 2}),
    ],
)
def test_lines_by_hand(text, expected):
    tomli.loads(text)
    lines = key_lines(text)
    assert {path: lines[path] for path in expected} == expected
    assert {path[0] for path in lines} == set(tomli.loads(text))


def test_a_key_without_a_line_gets_the_line_around_it():
    lines = key_lines("\n[[p]]\na = {b = [1]}\n")
    assert line_of(lines, ("p", 0, "a", "b", 0)) == 3
    assert line_of(lines, ("p", 0, "missing")) == line_of(lines, ("p",)) == 2
    assert line_of(lines, ("q",)) is line_of(lines, ()) is None


def test_a_key_of_very_many_parts_costs_little():
    # Every prefix of a path is kept: without a limit, this one line would take 16 MB.
    assert len(key_lines(".".join(["a"] * 1000) + " = 1\nb = 2")) < 100


# ---- random documents, written in random ways

BARE = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=6)
ANY = st.text(
    st.characters(codec="utf-8", exclude_characters="\x7f", min_codepoint=32), max_size=6
) | st.sampled_from(["a.b", "[", "]]", "=", "#", '"', "'", '"""', "'''", "\\", "\n", " "])
KEYS = st.one_of(BARE, ANY)
INLINE = "inline_"  # begins the keys inside values; longer than a random key can be
SCALARS = st.one_of(st.integers(-99, 99), st.booleans(), st.text(max_size=8), ANY)


def basic(text: str) -> str:
    """Spell `text` as a TOML string in double quotes."""
    escaped = "".join(f"\\u{ord(c):04x}" if c < " " or c in '"\\\x7f' else c for c in text)
    return f'"{escaped}"'


@st.composite
def spelled_keys(draw, key: str) -> str:
    """Spell one part of a key: bare, in single or in double quotes."""
    forms = [basic(key)]
    if key and all(c in string.ascii_letters + string.digits + "_-" for c in key):
        forms.append(key)
    if "'" not in key and all(" " <= c != "\x7f" for c in key):
        forms.append(f"'{key}'")
    return draw(st.sampled_from(forms))


@st.composite
def spelled_values(draw, depth: int = 0) -> str:
    """Spell a value: a scalar, a string over several lines, a list, an inline table."""
    kind = draw(st.sampled_from(["scalar", "lines", "literal", "list", "table"][: 5 - 2 * depth]))
    if kind == "scalar":
        value = draw(SCALARS)
        return basic(value) if isinstance(value, str) else str(value).lower()
    if kind == "lines":
        body = draw(st.lists(st.sampled_from(["a = 1", "[b]", "#", '\\"', "'''", ""]), max_size=3))
        return '"""' + "\n".join(body) + draw(st.sampled_from(["", '"', '""'])) + '"""'
    if kind == "literal":
        body = draw(st.lists(st.sampled_from(["a = 1", "[[b", "#", "\\", '"""', "{"]), max_size=3))
        return "'''" + "\n".join(body) + draw(st.sampled_from(["", "'", "''"])) + "'''"
    items = draw(st.lists(spelled_values(depth=depth + 1), max_size=3))
    if kind == "list":
        gap = draw(st.sampled_from([", ", ",\n", ", # ]}\n"]))
        return draw(st.sampled_from(["[", "[\n"])) + gap.join(items) + "]"
    pairs = [f"{INLINE}{place} = {item}" for place, item in enumerate(items)]
    return "{" + draw(st.sampled_from([", ", ",\n"])).join(pairs) + "}"  # the second: TOML 1.1


@st.composite
def documents(draw) -> str:
    """Write tables, arrays of tables and dotted keys; may be no valid TOML (keys given twice)."""
    lines = []
    for _ in range(draw(st.integers(0, 8))):
        parts = [draw(spelled_keys(key)) for key in draw(st.lists(KEYS, min_size=1, max_size=3))]
        key = draw(st.sampled_from([".", " . "])).join(parts)
        kind = draw(st.sampled_from(["key", "key", "key", "table", "array", "blank"]))
        indent = draw(st.sampled_from(["", "  ", "\t"]))
        tail = draw(st.sampled_from(["", " # x = 1", "\t#[x]"]))
        if kind == "key":
            lines.append(f"{indent}{key} = {draw(spelled_values())}{tail}")
        elif kind == "blank":
            lines.append(draw(st.sampled_from(["", "# [a]", "   "])))
        else:
            # a few names only, so that the same array grows and gets tables inside
            name = draw(st.sampled_from(["p", "p.q", "p.q.r", key]))
            lines.append(f"{indent}{f'[[{name}]]' if kind == 'array' else f'[{name}]'}{tail}")
    return "\n".join(lines) + draw(st.sampled_from(["", "\n"]))


def paths(value, path=()):
    """All paths of keys below `value`."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def holds_key(line: str, key: str) -> bool:
    """Whether a line holds a key in one of its spellings."""
    return key in line or basic(key)[1:-1] in line


@pytest.mark.parametrize("examples", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_every_key_of_a_random_document_is_found(examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(documents())
    def holds(text):
        try:
            table = tomli.loads(text)
        except tomli.TOMLDecodeError:
            reject()  # a key given twice
        check_lines(text, table)

    holds()


def check_lines(text: str, table: dict) -> None:
    found, written = key_lines(text), text.split("\n")
    for path in paths(table):
        line = line_of(found, path)
        assert line is not None
        names = [part for part in path if isinstance(part, str) and not part.startswith(INLINE)]
        if path[-1] == names[-1]:
            assert path in found
            assert holds_key(written[line - 1], names[-1])
    assert set(found) <= set(paths(table))
