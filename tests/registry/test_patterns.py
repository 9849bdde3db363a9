"""Patterns of layers: as a text, a list, a card; nested, named, with settings for all; and what a mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltalab import registry
from deltalab.errors import UserError
from deltalab.recurrences import HybridSpec, RecurrenceSpec, spec_from_mapping


def names(spec: Any) -> list[str]:
    assert isinstance(spec, HybridSpec)
    return [layer.name for layer in spec.layers]


def test_a_text_of_cards() -> None:
    spec = registry.load("gdn gdn  gdn softmax\n")
    assert names(spec) == ["gdn", "gdn", "gdn", "softmax"]
    assert (spec.name, spec.about.source) == ("gdn gdn gdn softmax", "")
    assert spec.effective()["layers"][3] == registry.load("softmax").effective()
    assert isinstance(registry.load(" gdn".strip()), RecurrenceSpec)


def test_a_list_of_whatever_a_layer_can_be(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nequation: S\nsource: me\ngate: channel\n")
    entries = [
        "kda",
        str(file),
        file,
        {"card": "gdn", "gate": "none"},
        registry.load("softmax"),
        {"name": "own", "erase": "none"},
    ]
    spec = registry.load({"pattern": entries, "name": "mixed", "title": "Mixed", "caveats": ["beware"]})
    assert names(spec) == ["kda", "mine", "mine", "gdn", "softmax", "own"]
    assert (spec.name, spec.about.title, spec.about.caveats) == ("mixed", "Mixed", ("beware",))
    assert spec.layers[3].gate.name == "none"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "pattern",
    [
        {"pattern": ["gdn gdn", "softmax"]},
        {"pattern": [{"pattern": ["gdn", "gdn"]}, "softmax"]},
        {"pattern": "gdn gdn softmax"},
        {"card": "gdn gdn softmax"},
        {"kind": "hybrid", "pattern": [registry.load("gdn gdn"), "softmax"]},
    ],
)
def test_a_pattern_in_a_pattern_adds_its_layers(pattern: dict[str, Any]) -> None:
    spec = registry.load(pattern)
    assert names(spec) == ["gdn", "gdn", "softmax"] and spec.name == "gdn gdn softmax"
    assert spec.effective() == registry.load("gdn gdn softmax").effective()


def test_settings_of_the_block_reach_every_layer() -> None:
    for card in ({"pattern": ["gdn", "softmax"]}, {"card": "gdn softmax"}):
        spec = registry.load({**card, "block": {"short_conv": 0}})
        assert [layer.block.short_conv for layer in spec.layers] == [0, 0]


def test_the_effective_form_gives_the_pattern_back() -> None:
    spec = registry.load("gdn kda softmax")
    again = spec_from_mapping({"name": spec.name, **spec.effective()})
    assert again.effective() == spec.effective()
    assert registry.load({"name": "same", "source": "x", **spec.effective()}).effective() == spec.effective()


def test_a_card_of_a_pattern_reads_its_files_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "cards" / "inner"
    inner.mkdir(parents=True)
    (inner / "leaf.yaml").write_text("name: leaf\nequation: S\nsource: me\n")
    (inner / "pair.yaml").write_text("name: pair\nkind: hybrid\nsource: me\npattern: [leaf.yaml, gdn]\n")
    (inner.parent / "outer.yaml").write_text("name: outer\nkind: hybrid\nsource: me\npattern: [inner/pair.yaml, softmax]\n")
    monkeypatch.chdir(tmp_path)
    assert names(registry.load("cards/outer.yaml")) == ["leaf", "gdn", "softmax"]
    assert names(registry.load({"card": "cards/outer.yaml", "title": "other"})) == ["leaf", "gdn", "softmax"]
    spaced = tmp_path / "my cards.yaml"
    spaced.write_text("name: spaced\nequation: S\nsource: me\n")
    assert registry.load("my cards.yaml").name == "spaced"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("gdn gnd", "recurrence.pattern[1]: unknown recurrence 'gnd'. Did you mean 'gdn'?"),
        ({"card": "gdn gnd"}, "recurrence.pattern[1]: unknown recurrence 'gnd'."),
        ({"pattern": []}, "recurrence.pattern: expected a list of at least one card, such as [gdn, gdn, gdn, softmax], got []"),
        ({"pattern": " "}, "recurrence.pattern: expected a list of at least one card"),
        ({"pattern": None}, "recurrence.pattern: expected a list of at least one card"),
        ({"pattern": {"a": "gdn"}}, "recurrence.pattern: expected a list of at least one card"),
        (
            {"pattern": ["gdn", 3]},
            "recurrence.pattern[1]: expected a card's name, a YAML file, a pattern of them or a mapping, got 3",
        ),
        ({"pattern": ["gdn", ["softmax"]]}, "recurrence.pattern[1]: expected a card's name"),
        ({"pattern": ["gdn", {"gate": "none"}]}, "recurrence.pattern[1]: expected `card: NAME`"),
        ({"pattern": ["gdn", {"card": "gdn", "gate": "x"}]}, "recurrence.pattern[1].gate: unknown gate 'x'."),
        ({"pattern": [{"pattern": ["gdn", "gnd"]}]}, "recurrence.pattern[0].pattern[1]: unknown recurrence 'gnd'."),
        ({"pattern": ["gdn"], "gate": "none"}, "recurrence.gate: a hybrid has no gate of its own; turn it in a layer: "),
        ({"pattern": ["gdn"], "substeps": 2}, "recurrence.substeps: a hybrid has no substeps of its own;"),
        ({"pattern": ["gdn"], "patern": 2}, "recurrence.patern: unknown key 'patern'. Did you mean 'pattern'?"),
        ({"pattern": ["gdn"], "kind": "softmax"}, "recurrence.kind: 'softmax' has no `pattern`"),
        ({"pattern": ["gdn"], "name": 3}, "recurrence.name: 3 is not a text"),
        ({"pattern": ["gdn"], "block": [3]}, "recurrence.block: expected a mapping of settings for every layer, got [3]"),
        ({"pattern": ["gdn"], "block": {"short_con": 3}}, "recurrence.block.short_con: unknown key 'short_con'."),
        ({"kind": "hybrid", "name": "x"}, "recurrence.pattern: expected a list of at least one card"),
        ({"card": "gdn softmax", "pattern": ["gdn"]}, "recurrence.pattern: stands beside `card`, which is a pattern itself"),
    ],
)
def test_mistakes(card: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        registry.load(card)
    assert str(error.value).startswith(message)


def test_a_card_that_contains_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nkind: hybrid\nsource: me\npattern: [gdn, b.yaml]\n")
    (tmp_path / "b.yaml").write_text(f"name: b\nkind: hybrid\nsource: me\npattern: [../{tmp_path.name}/a.yaml]\n")
    with pytest.raises(UserError, match=r"a\.yaml', pattern\[1\]: in the card .*b\.yaml', pattern\[0\]: .* contains itself"):
        registry.load(str(tmp_path / "a.yaml"))


def test_a_mistake_in_the_card_of_a_pattern_names_file_and_entry(tmp_path: Path) -> None:
    file = tmp_path / "h.yaml"
    file.write_text("name: h\nkind: hybrid\nsource: me\npattern: [gdn, {card: gdn, gate: chanel}]\n")
    with pytest.raises(UserError) as error:
        registry.load(str(file), "axes.recurrence[1]")
    assert str(error.value).startswith(
        f"axes.recurrence[1]: in the card '{file}', pattern[1].gate: unknown gate 'chanel'. Did you mean 'channel'?"
    )
