"""Cards of one's own: folders, their names, what is broken in them; and cards of installed packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deltalab import registry
from deltalab.errors import UserError
from deltalab.registry import sources

GOOD = "name: {name}\nequation: S_t = ...\nsource: me\ngate: channel\n"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, apart: pytest.MonkeyPatch) -> Write:
    """`write("a", name="mine")`: a card in the folder `cards`, or any text under a file's name."""

    def _write(file: str, text: str = GOOD, name: str = "", folder: str = "cards") -> Path:
        place = tmp_path / folder / (file if "." in file else f"{file}.yaml")
        place.parent.mkdir(exist_ok=True)
        place.write_text(text.format(name=name or file) if text is GOOD else text)
        return place

    return _write


@pytest.fixture
def cards(tmp_path: Path, write: Write) -> Path:
    """A folder of one's own that is in use."""
    (tmp_path / "cards").mkdir()
    registry.add_folder(tmp_path / "cards")
    return tmp_path / "cards"


def refused(words: str, card: object = "gdn") -> None:
    with pytest.raises(UserError, match=words):
        registry.load(card)  # type: ignore[arg-type]


def test_cards_of_a_folder_are_used_by_name(cards: Path, write: Write) -> None:
    write("mine"), write("other.yml", GOOD.format(name="other")), write("notes.txt", "no card"), write(".hidden", "no: card")
    assert {"mine", "other", "gdn"} <= set(registry.names()) and registry.names() == sorted(registry.names())
    assert registry.load("mine").gate.name == "channel"
    assert registry.load({"card": "mine", "gate": "none"}).gate.name == "none"
    assert registry.load("mine gdn other").name == "mine gdn other"
    assert registry.read_card("mine")["source"] == "me"


def test_cards_of_ones_own_name_each_other(cards: Path, write: Write) -> None:
    write("mine")
    write("pair", "name: pair\nkind: hybrid\nsource: me\npattern: [mine, other]\n")
    write("other", "name: other\nkind: hybrid\nsource: me\npattern: [gdn, mine.yaml]\n")
    assert [layer.name for layer in registry.load("pair").layers] == ["mine", "gdn", "mine"]


def test_a_file_that_changes_is_read_again(cards: Path, write: Write) -> None:
    file = write("mine")
    assert registry.load("mine").gate.name == "channel"
    file.write_text(GOOD.format(name="mine").replace("channel", "none"))
    assert registry.load("mine").gate.name == "none"
    file.unlink()
    assert "mine" not in registry.names()


def test_the_variable_names_several_folders(tmp_path: Path, write: Write, apart: pytest.MonkeyPatch) -> None:
    write("one", folder="a"), write("two", folder="b")
    apart.setenv("DELTALAB_REGISTRY", f"{tmp_path / 'a'}{os.pathsep}{os.pathsep}{tmp_path / 'b'}")
    assert {"one", "two"} <= set(registry.names())
    registry.add_folder(tmp_path / "b" / ".." / "b")  # the same once more
    assert sources.folders() == [tmp_path / "a", tmp_path / "b"]


def test_folders_that_are_none(tmp_path: Path, write: Write, apart: pytest.MonkeyPatch) -> None:
    file = write("mine")
    for folder, reason in (
        (tmp_path / "no", "does not exist"),
        (file, "is a file; give the folder it is in"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(UserError, match=f"^--registry: the folder .* {reason}"):
            registry.add_folder(folder, "--registry")
    apart.setenv("DELTALAB_REGISTRY", str(tmp_path / "no"))
    refused(r"^\$DELTALAB_REGISTRY: the folder .*no' does not exist")


def test_two_cards_of_one_name(cards: Path, write: Write) -> None:
    first, second = write("a", name="mine"), write("b", name="mine")
    refused(f"^the card '{second}': its name 'mine' is another card's, '{first}'; give it a name of its own")
    second.unlink()
    assert registry.load("mine").name == "mine"


def test_the_name_of_a_shipped_card(cards: Path, write: Write) -> None:
    file = write("gdn")
    refused(rf"^the card '{file}': its name 'gdn' is a shipped card's, '.*cards/gdn\.yaml'; give it a name of its own")
    with pytest.raises(UserError):
        registry.names()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no mapping; a card has `name`"),
        ("- gdn\n", "holds no mapping"),
        ("name: [x\n", "line 2, column 1: not valid YAML"),
        ("equation: S\nsource: me\n", "does not say its `name`"),
        ("name: x\nsource: me\n", "does not say its `equation`"),
        ("name: x\nequation: S\n", "does not say its `source`"),
        ("name: 'two words'\nequation: S\nsource: me\n", "its name 'two words' cannot be used by name; letters, digits"),
        ("name: x.yaml\nequation: S\nsource: me\n", "its name 'x.yaml' cannot be used by name"),
        ("name: '[red]x'\nequation: S\nsource: me\n", r"its name '\[red\]x' cannot be used by name"),
        ("name: x\nname: y\n", "the key 'name' stands twice"),
        (b"\xff\xfe\x00binary", "is not UTF-8 text"),
        (None, "^cannot read .*: Is a directory"),
    ],
)
def test_a_broken_file_is_named(text: object, words: str, cards: Path) -> None:
    file = cards / "broken.yaml"
    file.mkdir() if text is None else file.write_bytes(text if isinstance(text, bytes) else str(text).encode())
    refused(words)
    refused(str(file))
    found = sources.sources()
    assert len(found.problems) == 1 and str(file) in found.problems[0] and "gdn" in found.cards


def test_a_card_is_checked_when_it_is_used(cards: Path, write: Write) -> None:
    for name, line, words in (
        ("unknown", "gat: none", r"gat: unknown key 'gat'\. Did you mean 'gate'\?"),
        ("option", "gate: {name: scalar, rate: 1}", r"gate\.rate: unknown key 'rate'"),
        ("conflict", "step_size: dt", "step_size: 'dt' is the time step of the scalar gate, but the gate is 'none'"),
    ):
        file = write(name, f"name: {name}\nequation: S\nsource: me\n{line}\n")
        refused(f"^recurrence: in the card '{file}', {words}", name)
    assert registry.load("gdn").name == "gdn"


def test_a_folder_in_place_of_a_card(tmp_path: Path, apart: pytest.MonkeyPatch) -> None:
    apart.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    refused("^recurrence: 'mine' is a folder; use its cards by name with --registry mine", "mine")


def test_a_whole_card_of_the_name_of_ones_own(cards: Path, write: Write) -> None:
    write("mine")
    refused("^recurrence.name: 'mine' is a card that there is; write `card: mine`", {"name": "mine", "gate": "none"})


def packaged(folder: Path, group: str, points: dict[str, str], name: str = "their-cards") -> None:
    """What pip leaves of an installed package: its metadata."""
    info = folder / f"{name.replace('-', '_')}-2.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    lines = [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, apart: pytest.MonkeyPatch) -> Path:
    """A folder of the Python path, with a package of cards in it."""
    package = tmp_path / "site" / "their_cards"
    package.mkdir(parents=True)
    (package / "theirs.yaml").write_text(GOOD.format(name="theirs"))
    apart.syspath_prepend(tmp_path / "site")
    sources._of_packages.cache_clear()
    return tmp_path / "site"


@pytest.fixture(autouse=True)
def _packages_as_they_are() -> object:
    yield
    sources._of_packages.cache_clear()
    for name in [name for name in sys.modules if name.startswith("their_cards")]:
        del sys.modules[name]


@pytest.mark.parametrize("init", [True, False], ids=["package", "namespace"])
def test_cards_of_an_installed_package(site: Path, init: bool) -> None:
    if init:
        (site / "their_cards" / "__init__.py").write_text("")
    packaged(site, "deltalab.cards", {"theirs": "their_cards"})
    assert registry.load("theirs").gate.name == "channel"
    assert sources.sources().cards["theirs"].origin == "their-cards 2.0"


def test_packages_of_cards_that_are_broken(site: Path) -> None:
    (site / "their_cards" / "bad.yaml").write_text("name: bad\n")
    (site / "no_cards").mkdir()
    (site / "no_cards" / "__init__.py").write_text("")
    packaged(site, "deltalab.cards", {"absent": "absent_module", "empty": "no_cards", "theirs": "their_cards"})
    problems = sources.sources().problems
    where = "entry point deltalab.cards '{}' of their-cards: "
    assert len(problems) == 3
    assert problems[0].startswith(where.format("absent") + "cannot read the package 'absent_module': ModuleNotFoundError")
    assert problems[1].startswith(where.format("empty") + "the package 'no_cards' holds no YAML file")
    assert problems[2].startswith(where.format("theirs")) and "does not say its `equation`" in problems[2]
    refused("^entry point deltalab.cards 'absent' of their-cards")
