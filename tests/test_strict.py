"""Strict configuration: nothing is converted in silence, and an error names the field, the value and what would be valid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError, nearest, shown, unknown
from deltalab.strict import build, check_ascending, item, join, option, plain


@dataclass(frozen=True)
class Inner:
    size: int = option(3, "a size", min=1, max=9)


@dataclass(frozen=True)
class Config:
    lr: float = option(1e-3, "learning rate", above=0)
    share: float = option(0.5, "a share", min=0, below=1)
    limit: float = option(math.inf, "may be infinite", finite=False)
    steps: int = option(10, "steps", min=1)
    tied: bool = option(True, "tied")
    name: str = option("a", "name")
    mode: Literal["slow", "fast"] = option("slow", "mode")
    filler: str = option("zero", "filler", choices=("zero", "random"))
    betas: tuple[float, float] = option((0.9, 0.95), "moments", min=0, below=1)
    words: tuple[str, ...] = option((), "words")
    sizes: list[int] = option(factory=list, help="sizes", min=0)
    maybe: int | None = option(None, "an integer or nothing")
    free: dict[str, Any] = option(factory=dict, help="anything")
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Needs:
    corpus: str = option(help="a file.")


@dataclass(frozen=True)
class Ranged:
    span: tuple[float, float] = option((0.0, 1.0), "a range")
    strict: tuple[float, float] = option((0.0, 1.0), "a range")

    def __post_init__(self) -> None:
        check_ascending("span", self.span)
        check_ascending("strict", self.strict, equal=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lr": "abc"}, "t.lr: 'abc' is not a number (above 0)"),
        ({"lr": "1e-3"}, "t.lr: '1e-3' is not a number (above 0)"),
        ({"lr": True}, "t.lr: True is not a number (above 0)"),
        ({"lr": None}, "t.lr: None is not a number (above 0)"),
        ({"lr": [1]}, "t.lr: [1] is not a number (above 0)"),
        ({"lr": 0}, "t.lr: 0.0 is out of range (above 0)"),
        ({"lr": -1.5}, "t.lr: -1.5 is out of range (above 0)"),
        ({"lr": math.nan}, "t.lr: nan is not a finite number (above 0)"),
        ({"lr": math.inf}, "t.lr: inf is not a finite number (above 0)"),
        ({"lr": "inf"}, "t.lr: 'inf' is not a number (above 0)"),
        ({"lr": 10**400}, "t.lr: inf is not a finite number (above 0)"),
        ({"lr": -(10**400)}, "t.lr: -inf is not a finite number (above 0)"),
        ({"share": 1}, "t.share: 1.0 is out of range (at least 0 and below 1)"),
        ({"limit": math.nan}, "t.limit: nan is not a finite number"),
        ({"steps": 8.0}, "t.steps: 8.0 is not an integer (at least 1)"),
        ({"steps": True}, "t.steps: True is not an integer (at least 1)"),
        ({"steps": "8"}, "t.steps: '8' is not an integer (at least 1)"),
        ({"steps": 0}, "t.steps: 0 is out of range (at least 1)"),
        ({"tied": 1}, "t.tied: 1 is not true or false"),
        ({"tied": "yes"}, "t.tied: 'yes' is not true or false"),
        ({"name": 3}, "t.name: 3 is not a text"),
        ({"name": True}, "t.name: True is not a text"),
        ({"mode": "fats"}, "t.mode: unknown value 'fats'. Did you mean 'fast'? Valid: slow, fast"),
        ({"mode": True}, "t.mode: unknown value True. Valid: slow, fast"),
        ({"mode": []}, "t.mode: unknown value []. Valid: slow, fast"),
        ({"filler": "randon"}, "t.filler: unknown value 'randon'. Did you mean 'random'? Valid: zero, random"),
        ({"betas": 0.9}, "t.betas: expected a list, got 0.9"),
        ({"betas": "ab"}, "t.betas: expected a list, got 'ab'"),
        ({"betas": [0.9]}, "t.betas: expected 2 values, got 1: [0.9]"),
        ({"betas": [0.9, 1]}, "t.betas[1]: 1.0 is out of range (at least 0 and below 1)"),
        ({"words": ["a", 3]}, "t.words[1]: 3 is not a text"),
        ({"sizes": [1, -1]}, "t.sizes[1]: -1 is out of range (at least 0)"),
        ({"sizes": [1.0]}, "t.sizes[0]: 1.0 is not an integer (at least 0)"),
        ({"maybe": "x"}, "t.maybe: 'x' is not an integer"),
        ({"free": [1]}, "t.free: expected a mapping, got [1]"),
        ({"inner": 3}, "t.inner: expected a mapping of size, got 3"),
        ({"inner": {"size": 10}}, "t.inner.size: 10 is out of range (from 1 to 9)"),
        ({"inner": {"sise": 1}}, "t.inner.sise: unknown key 'sise'. Did you mean 'size'? Valid: size"),
        ({"stepz": 1}, "t.stepz: unknown key 'stepz'. Did you mean 'steps'? Valid: lr, share, limit, steps, "),
        ({3: 1}, "t.3: unknown key 3. Valid: lr, "),
        ({None: 1}, "t.None: unknown key None."),
        ("lr", "t: expected a mapping of lr, share, "),
        (None, "t: expected a mapping of lr, share, "),
        ([], "t: expected a mapping of lr, share, "),
    ],
)
def test_what_is_refused(content: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        build(Config, content, "t")
    assert str(error.value).startswith(message)


def test_what_is_accepted() -> None:
    content = {
        "lr": 1,
        "limit": "-inf",
        "steps": 10**30,
        "betas": [0, 0.5],
        "words": ("a",),
        "sizes": [1, 2],
        "maybe": None,
        "free": {"x": [1]},
        "inner": None,
    }
    config = build(Config, content, "t")
    assert (config.lr, type(config.lr), config.limit) == (1.0, float, -math.inf)
    assert (config.betas, config.words, config.sizes, config.inner) == ((0.0, 0.5), ("a",), [1, 2], Inner())
    assert build(Config, config, "t") is config
    assert build(Config, {}, "t") == Config()
    assert build(Config, {"maybe": 3, "inner": {"size": 9}}, "t") == Config(maybe=3, inner=Inner(9))


def test_a_field_without_a_default_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"^t\.corpus: missing\. a file\.$"):
        build(Needs, {}, "t")


def test_keys_taken_out_before_are_listed_as_valid() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'preset'\? Valid: size, preset$"):
        build(Inner, {"preste": 1}, "t", extra=("preset",))


def test_without_a_path_the_field_alone_is_named() -> None:
    with pytest.raises(UserError, match=r"^size: 0 is out of range"):
        build(Inner, {"size": 0}, "")
    with pytest.raises(UserError, match=r"^study: expected a mapping"):
        build(Inner, 3, "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"span": [1, 0.5]}, "t.span: [1, 0.5] is empty; the first number must not be above the second"),
        ({"strict": [1, 1]}, "t.strict: [1, 1] is empty; the first number must be below the second"),
    ],
)
def test_a_contradiction_between_fields_has_its_path(content: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        build(Ranged, content, "t")
    assert str(error.value) == message
    assert build(Ranged, {"span": [1, 1]}, "t").span == (1.0, 1.0)


def test_plain_is_jsonable_and_reads_back() -> None:
    config = Config(limit=math.inf, betas=(0.1, 0.2), free={"x": (1, -math.inf)})
    found = plain(config)
    assert (found["limit"], found["betas"], found["free"], found["inner"]) == ("inf", [0.1, 0.2], {"x": [1, "-inf"]}, {"size": 3})
    assert build(Config, {**found, "free": {}}, "t") == Config(limit=math.inf, betas=(0.1, 0.2))


def test_paths() -> None:
    assert (join("a", "b"), join("", "b"), item("a", 2)) == ("a.b", "b", "a[2]")


def test_the_nearest_name() -> None:
    assert nearest("GDN", ["gdn", "kda"]) == "gdn"
    assert nearest("zzz", ["gdn", "kda"]) is None
    assert nearest("x" * 100_000, ["gdn"]) is None
    assert nearest(None, []) is None


def test_a_long_value_does_not_drown_the_message() -> None:
    assert shown([0] * 1000) == repr([0] * 1000)[:100] + "..."
    assert len(str(unknown("key", "k" * 10_000, ["a"]))) < 200
    with pytest.raises(UserError) as error:
        build(Config, {"lr": ["x"] * 10_000}, "t")
    assert len(str(error.value)) < 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["inf", "-inf", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(content=st.dictionaries(st.sampled_from([*Config.__dataclass_fields__, "x", 3]), VALUES, max_size=4) | VALUES)
def test_whatever_comes_in_a_configuration_or_a_user_error_comes_out(content: Any) -> None:
    try:
        config = build(Config, content, "t")
    except UserError:
        return
    assert isinstance(content, Mapping)
    assert build(Config, plain(config), "t") == config or config.free
