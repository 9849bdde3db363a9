"""Cards by name, by mapping, by file; and what a mistake in one is told: the path, the value, the nearest valid one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deltalab import registry
from deltalab.errors import UserError
from deltalab.recurrences import AttentionSpec, RecurrenceSpec

MINE = {"name": "mine", "equation": "S_t = ...", "source": "unpublished", "gate": "channel", "step_size": "kaczmarz"}


def write(folder: Path, content: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(content)
    return str(file)


@pytest.mark.parametrize("name", registry.names())
def test_a_shipped_card_documents_itself(name: str) -> None:
    spec = registry.load(name)
    assert spec.name == name
    assert spec.about.title
    assert spec.about.equation.strip()
    assert "arXiv" in spec.about.source
    assert all(caveat.strip() for caveat in spec.about.caveats)
    assert spec.warnings() == []
    assert isinstance(spec, AttentionSpec if name in ("softmax", "sliding_window") else RecurrenceSpec)


def test_names_are_sorted_and_ones_own_copy() -> None:
    names = registry.names()
    assert names == sorted(names)
    names.clear()
    assert registry.names()


def test_a_card_with_axes_turned() -> None:
    spec = registry.load(
        {"card": "gdn", "gate": "channel", "step_size": {"name": "sigmoid", "range": [0, 2]}, "block": {"short_conv": 0}}
    )
    assert (spec.name, spec.gate.name, spec.step_size.config.range) == ("gdn", "channel", (0.0, 2.0))
    assert (spec.erase.name, spec.block.short_conv) == ("delta", 0)


def test_options_without_a_name_are_those_of_the_cards_component() -> None:
    spec = registry.load({"card": "osdn", "preconditioner": {"eta": 0.003, "box": [0.5, 1.5]}})
    assert spec.preconditioner.name == "hypergradient"
    assert (spec.preconditioner.config.eta, spec.preconditioner.config.box) == (0.003, (0.5, 1.5))
    assert registry.load({"card": "pgdn", "preconditioner": {"x": 2}}).preconditioner.config.x == 2.0


def test_a_component_named_anew_has_its_own_defaults() -> None:
    spec = registry.load({"card": "osdn", "preconditioner": {"name": "hypergradient", "initial": 1.0}})
    assert spec.preconditioner.config.eta == 1.0
    assert registry.load({"card": "osdn", "preconditioner": "diagonal"}).preconditioner.config.x == 1.5
    assert registry.load({"card": "osdn", "preconditioner": None}).preconditioner.name == "none"
    assert registry.load({"card": "gdn", "erase": None}).erase.name == "none"


def test_settings_of_qk_and_block_are_merged_one_by_one() -> None:
    spec = registry.load({"card": "mamba2", "qk": {"normalise_q": "l2"}, "block": {"expand_v": 2.0}})
    assert (spec.qk.normalise_q, spec.qk.normalise_k) == ("l2", "none")
    assert (spec.block.skip, spec.block.expand_v) == (True, 2.0)


def test_a_card_file(tmp_path: Path) -> None:
    file = write(tmp_path, "name: mine\nequation: S\nsource: me\ngate: channel\nstep_size: {name: kaczmarz, eps: 1e-5}\n")
    for card in (file, Path(file), {"card": file}):
        spec = registry.load(card)
        assert (spec.name, spec.gate.name, spec.step_size.config.eps) == ("mine", "channel", 1e-5)
    assert registry.load({"card": file, "gate": "none"}).gate.name == "none"


def test_a_whole_card_as_a_mapping_and_a_spec_as_it_is() -> None:
    spec = registry.load(MINE)
    assert (spec.name, spec.gate.name, spec.preconditioner.name) == ("mine", "channel", "none")
    assert registry.load(spec) is spec
    assert registry.load({"name": "mine"}).effective() == registry.load("deltanet").effective()


def test_settings_that_attention_does_not_have_are_named() -> None:
    spec = registry.load({"card": "softmax", "block": {"output_gate": "silu", "short_conv": 0}})
    assert spec.warnings() == ["block.output_gate has no effect on softmax attention"]
    assert spec.effective() == registry.load({"card": "softmax", "block": {"short_conv": 0}}).effective()


SHAPES = "recurrence: expected `card: NAME` (with axes to turn), a whole card with its own `name`, or `pattern: [...]` of layers"
VALID = "Valid: " + ", ".join(registry.names())


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("gnd", f"recurrence: unknown recurrence 'gnd'. Did you mean 'gdn'? {VALID}"),
        ("", f"recurrence: unknown recurrence ''. {VALID}"),
        ({"card": "gnd", "gate": "none"}, f"recurrence.card: unknown recurrence 'gnd'. Did you mean 'gdn'? {VALID}"),
        ({"card": ["gdn"]}, f"recurrence.card: unknown recurrence ['gdn']. Did you mean 'gdn'? {VALID}"),
        (
            {"gate": "none"},
            SHAPES,
        ),
        (
            {},
            SHAPES,
        ),
        (
            {"card": None},
            SHAPES,
        ),
        (
            {"name": "gdn", "gate": "channel"},
            "recurrence.name: 'gdn' is a shipped recurrence; write `card: gdn` (a card of your own gives its `source`)",
        ),
        (3, "recurrence: expected a card's name, a YAML file, a pattern of them or a mapping, got 3"),
        (None, "recurrence: expected a card's name, a YAML file, a pattern of them or a mapping, got None"),
        (["gdn"], "recurrence: expected a card's name, a YAML file, a pattern of them or a mapping, got ['gdn']"),
        ({**MINE, "gat": "none"}, "recurrence.gat: unknown key 'gat'. Did you mean 'gate'?"),
        ({**MINE, 3: "none"}, "recurrence.3: unknown key 3."),
        (
            {**MINE, "gate": "chanel"},
            "recurrence.gate: unknown gate 'chanel'. Did you mean 'channel'? Valid: none, fixed, scalar, channel,",
        ),
        ({**MINE, "gate": {"name": "scalar", "rank": 3}}, "recurrence.gate.rank: unknown key 'rank'. Did you mean 'a_range'?"),
        ({**MINE, "step_size": {"eps": 1e-3}}, "recurrence.step_size.name: missing. Valid: constant, dt, efla,"),
        (
            {**MINE, "step_size": {"name": "kaczmarz", "eps": "small"}},
            "recurrence.step_size.eps: 'small' is not a number (at most 1 and above 0)",
        ),
        (
            {**MINE, "step_size": {"name": "kaczmarz", "eps": 0}},
            "recurrence.step_size.eps: 0.0 is out of range (at most 1 and above 0)",
        ),
        ({**MINE, "title": 3}, "recurrence.title: 3 is not a text"),
        ({**MINE, "name": 3}, "recurrence.name: 3 is not a text"),
        ({**MINE, "caveats": "none"}, "recurrence.caveats: expected a list, got 'none'"),
        ({**MINE, "caveats": [3]}, "recurrence.caveats[0]: 3 is not a text"),
        (
            {**MINE, "erase": "dleta"},
            "recurrence.erase: unknown erase 'dleta'. Did you mean 'delta'? Valid: delta, none, scaled, channel",
        ),
        (
            {**MINE, "kind": "soft"},
            "recurrence.kind: unknown kind 'soft'. Did you mean 'softmax'? Valid: recurrence, softmax, hybrid",
        ),
        ({**MINE, "block": {"skip": 1}}, "recurrence.block.skip: 1 is not true or false"),
        ({**MINE, "block": {"short_conv": True}}, "recurrence.block.short_conv: True is not an integer (from 0 to 64)"),
        ({**MINE, "rope_base": 2}, "recurrence.rope_base: unknown key 'rope_base'."),
        ({"card": "softmax", "gate": "none"}, "recurrence.gate: unknown key 'gate'."),
        ({"card": "softmax", "rope_base": 1}, "recurrence.rope_base: 1.0 is out of range (at most 1000000000000.0 and above 1)"),
        ({"card": "softmax", "rope_base": float("nan")}, "recurrence.rope_base: nan is not a finite number"),
        ({"card": "softmax", "rope_base": 10**400}, "recurrence.rope_base: inf is not a finite number"),
    ],
)
def test_mistakes(card: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        registry.load(card)
    assert str(error.value).startswith(message)


def test_the_path_is_the_callers() -> None:
    with pytest.raises(UserError, match=r"^axes\.recurrence\[2\]\.gate: unknown gate 'x'"):
        registry.load({"card": "gdn", "gate": "x"}, "axes.recurrence[2]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "",
            "recurrence: 'FILE' holds no mapping; a card has `name`, `equation`, `source` and a choice per axis (or a `pattern`)",
        ),
        ("- gdn\n", "recurrence: 'FILE' holds no mapping;"),
        ("name: mine\nequation: S\n", "recurrence: the card 'FILE' does not say its `source`"),
        ("name: mine\nsource: 3\nequation: S\n", "recurrence: the card 'FILE' does not say its `source`"),
        ("source: me\nequation: S\n", "recurrence: the card 'FILE' does not say its `name`"),
        ("name: mine\nsource: me\nequation: ' '\n", "recurrence: the card 'FILE' does not say its `equation`"),
        (
            "name: a\nsource: b\nequation: c\ngate: chanel\n",
            "recurrence: in the card 'FILE', gate: unknown gate 'chanel'. Did you mean 'channel'?",
        ),
        (
            "name: a\nsource: b\nequation: c\nstep_size: dt\n",
            "recurrence: in the card 'FILE', step_size: 'dt' is the time step of the scalar gate",
        ),
        ("name: a\nname: b\n", "recurrence: FILE, line 2, column 1: not valid YAML: the key 'name' stands twice"),
        ("name: [a\n", "recurrence: FILE, line 2, column 1: not valid YAML: "),
    ],
)
def test_mistakes_in_a_file(content: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        registry.load(file)
    assert str(error.value).replace(file, "FILE").startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(os.urandom(16) + b"\xff\xfe\xff")
    (tmp_path / "folder.yaml").mkdir()
    for file, words in (
        (binary, "is not UTF-8 text"),
        (tmp_path / "folder.yaml", "directory"),
        (tmp_path / "no.yaml", "No such file"),
    ):
        with pytest.raises(UserError, match=words):
            registry.load(str(file))
    for name in ("a\0b.yaml", "~nobody-at-all/x.yaml", "x" * 5000 + ".yaml"):
        with pytest.raises(UserError, match=r"^recurrence: cannot read"):
            registry.load(name)
