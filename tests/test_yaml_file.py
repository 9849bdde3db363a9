"""YAML as people mean it, and files that are none."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.yaml_file import parse, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("012", 12),
        ("0", 0),
        ("-07", -7),
        ("+3", 3),
        ("0x1F", 31),
        ("1_000", 1000),
        ("0o17", "0o17"),
        ("0b11", "0b11"),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("1E+3", 1000.0),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("1.0.0", "1.0.0"),
        ("1e400", math.inf),
        ("-.inf", -math.inf),
        (".inf", math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("N", "N"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("none", "none"),
        ("2024-01-02", "2024-01-02"),
        ("=", "="),
        ("'012'", "012"),
        ("!!str 012", "012"),
        ("[1, on, 1e-3, 1:30]", [1, "on", 1e-3, "1:30"]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("a: &x {p: 1}\nc: &y {q: 2}\nb: {<<: [*x, *y]}", {"a": {"p": 1}, "c": {"q": 2}, "b": {"p": 1, "q": 2}}),
    ],
)
def test_scalars_and_structures(text: str, value: Any) -> None:
    found = parse(text, "f")
    assert (found, type(found)) == (value, type(value))


def test_nan() -> None:
    assert math.isnan(parse(".nan", "f"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "f, line 2, column 1: not valid YAML: the key 'a' stands twice"),
        ("{a: 1, 'a': 2}", "f, line 1, column 8: not valid YAML: the key 'a' stands twice"),
        ("x:\n  - a: 1\n    a: 2", "f, line 3, column 5: not valid YAML: the key 'a' stands twice"),
        ("a:\n\t- b", "f, line 2, column 1: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: [1", "f, line 1, column 6: not valid YAML: "),
        ("a: b: c", "f, line 1, column 5: not valid YAML: mapping values are not allowed here"),
        ("a: *x", "f, line 1, column 4: not valid YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 2", "f, line 2, column 1: not valid YAML: but found another document"),
        ("a: \0", "f: not valid YAML: unacceptable character"),
        ("!!python/object:os.system {}", "f, line 1, column 1: not valid YAML: could not determine a constructor"),
        ("a: !custom 3", "f, line 1, column 4: not valid YAML: could not determine a constructor"),
        ("? [a]\n: 1", "f, line 1, column 3: not valid YAML: found unhashable key"),
        ("a: !!bool 3", "f: not valid YAML: "),
        ("a: !!int x", "f: not valid YAML: "),
        ("a: !!timestamp x", "f: not valid YAML: "),
        ("a: !!timestamp 2024-01-02", "f: datetime.date(2024, 1, 2) is a date; expected a text, a number, true, false or null"),
        ("a: !!binary aGk=", "f: b'hi' is a bytes; expected a text,"),
        ("a: !!set {x}", "f: {'x'} is a set; expected a text,"),
        ("9" * 5000, "f: not valid YAML: "),
        ("[" * 60 + "]" * 60, "f: nested more than 50 levels deep"),
        ("[" * 20_000 + "]" * 20_000, "f: nested too deeply"),
        ("{a: " * 20_000, "f: nested too deeply"),
        ("a: &a [*a]", "f: nested more than 50 levels deep"),
        ("a: &a {b: *a}", "f: nested more than 50 levels deep"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text, "f")
    assert str(error.value).startswith(message)


def test_aliases_cannot_stand_for_gigabytes() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match="more than 100000 values, aliases counted"):
        parse("\n".join(lines), "f")


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("a: ü\n", encoding="utf-8")
    assert read(file) == {"a": "ü"}
    file.write_text("")
    assert read(file) is None
    file.write_text("a: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"^study: .*s\.yaml, line 1, column 5: not valid YAML"):
        read(file, "study")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"^study: .*s\.yaml' is not UTF-8 text"):
        read(file, "study")
    with pytest.raises(UserError, match=r"^cannot read .*absent\.yaml': No such file or directory"):
        read(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)
    with pytest.raises(UserError, match="null byte"):
        read(Path("a\0b"))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="ab:-?[]{},&*!|>'\"%@#<~0.1eE \n\t\0", max_size=30))
def test_any_text_is_a_value_or_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        parse(text, "f")
