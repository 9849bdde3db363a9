"""Components of somebody else: by entry point, variable and `request`; imported late, and named when they cannot be."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from deltalab import plugins, registry
from deltalab.errors import UserError
from deltalab.recurrences import choose, components
from deltalab.recurrences.component import origin

SOUND = Path(__file__).parent / "third_party" / "sound_gates.py"
GATE = '''"""A module of somebody's."""

from deltalab.recurrences import Gate, GateOutput, component


@component("gate", "{name}")
class Mine(Gate):
    """log a_t = 0. Source: a test."""

    def forward(self, x):
        return GateOutput(None)
'''


@pytest.fixture
def here(tmp_path: Path, apart: pytest.MonkeyPatch) -> Path:
    """A current folder of its own."""
    apart.chdir(tmp_path)
    return tmp_path


def installed(site: Path, points: dict[str, str], name: str = "their-gates", version: str = "3.1") -> None:
    """What pip leaves of an installed package: its metadata."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = ["[deltalab.components]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (info / "top_level.txt").write_text("\n".join(sorted({value.split(".")[0] for value in points.values()})))


@pytest.fixture
def site(here: Path, apart: pytest.MonkeyPatch) -> Path:
    folder = here / "site"
    folder.mkdir()
    apart.syspath_prepend(folder)
    plugins._distribution.cache_clear()
    return folder


def test_a_module_of_the_current_folder(here: Path) -> None:
    shutil.copy(SOUND, here / "my_gates.py")
    registry.add_import("my_gates")
    spec = registry.load({"card": "gdn", "gate": {"name": "leaky", "rate": 2}})
    assert spec.gate.config.rate == 2.0
    assert plugins.imports() == [("my_gates", str(here))]
    assert sys.path[-1] == str(here), "where it shadows nothing"


def test_a_file_in_another_folder(here: Path) -> None:
    (here / "lib").mkdir()
    shutil.copy(SOUND, here / "lib" / "my_gates.py")
    registry.add_import("lib/my_gates.py")
    assert choose("gate", "leaky").name == "leaky"
    assert plugins.imports() == [("my_gates", str(here / "lib"))]


def test_components_lists_them_and_says_whose_they_are(here: Path, apart: pytest.MonkeyPatch) -> None:
    shutil.copy(SOUND, here / "my_gates.py")
    apart.setenv("DELTALAB_IMPORT", " my_gates , ")
    assert "leaky" in components("gate")
    whose = origin(components("gate")["leaky"])
    assert whose.startswith("my_gates 1.5 (") and len(whose) == len("my_gates 1.5 (12345678)")
    assert origin(components("gate")["scalar"]) == "deltalab"
    spec = registry.load({"pattern": ["gdn", {"card": "gdn", "gate": "leaky", "step_size": "halved"}]})
    assert registry.origins(spec) == {"gate leaky": whose, "step_size halved": whose}
    registry.check_origins(spec, registry.origins(spec))
    with pytest.raises(UserError, match=r"^gate leaky: planned with other 1, but this worker has my_gates 1\.5"):
        registry.check_origins(spec, {**registry.origins(spec), "gate leaky": "other 1"})
    assert registry.origins(registry.load("gdn softmax")) == {}


def test_an_edited_component_has_another_origin(here: Path) -> None:
    (here / "my_gates.py").write_text(GATE.format(name="mine"))
    registry.add_import("my_gates")
    before = origin(components("gate")["mine"])
    (here / "my_gates.py").write_text(GATE.format(name="mine").replace("log a_t = 0", "log a_t = 0 "))
    del sys.modules["my_gates"]
    plugins._digest.cache_clear()
    plugins._state.imported.clear()
    registry.add_import("my_gates")
    assert origin(components("gate")["mine"]) != before


def test_an_installed_package(site: Path) -> None:
    (site / "their_gates").mkdir()
    (site / "their_gates" / "__init__.py").write_text("")
    shutil.copy(SOUND, site / "their_gates" / "gates.py")
    installed(site, {"gates": "their_gates.gates"})
    assert registry.load({"card": "gdn", "gate": "leaky"}).gate.name == "leaky"
    assert origin(components("gate")["leaky"]).startswith("their-gates 3.1 (")
    assert plugins.imports() == [], "a worker's installation has it"


def test_a_worker_adopts_what_was_imported(here: Path) -> None:
    (here / "lib").mkdir()
    shutil.copy(SOUND, here / "lib" / "my_gates.py")
    plugins.adopt([["my_gates", str(here / "lib")]])
    assert "leaky" in components("gate") and plugins.imports() == [("my_gates", str(here / "lib"))]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("import absent_dependency\n", r"ModuleNotFoundError: No module named 'absent_dependency' \(.*my_gates\.py, line 1\)"),
        ("x = (\n", r"SyntaxError: "),
        ("raise SystemExit(3)\n", r"SystemExit: 3"),
        ("def f():\n    1 / 0\n\nf()\n", r"ZeroDivisionError: division by zero \(.*my_gates\.py, line 2\)"),
        (
            GATE.format(name="scalar"),
            r"gate 'scalar' of my_gates is already registered, by deltalab\.recurrences\.gates\.ScalarGate",
        ),
        (GATE.format(name="x").replace("Gate)", "object)"), r"gate my_gates\.Mine: is no Gate; derive it from"),
    ],
)
def test_a_module_that_fails(content: str, cause: str, here: Path, apart: pytest.MonkeyPatch) -> None:
    (here / "my_gates.py").write_text(content)
    apart.setenv("DELTALAB_IMPORT", "my_gates")
    assert "my_gates" not in sys.modules, "nothing is imported before a name is looked up"
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^\$DELTALAB_IMPORT: cannot import 'my_gates': {cause}"):
            registry.load("gdn")
    assert len(plugins.attempt()) == 1 and "scalar" in components("gate")
    with pytest.raises(UserError, match=r"^gate: 'skalar': \$DELTALAB_IMPORT: cannot import 'my_gates'"):
        choose("gate", "skalar")
    assert choose("gate", "scalar").name == "scalar"


def test_an_import_that_fails_is_forgotten(here: Path) -> None:
    (here / "my_gates.py").write_text("import absent_dependency\n")
    with pytest.raises(UserError, match="^--import: cannot import 'my_gates': ModuleNotFoundError: .*my_gates.py, line 1"):
        registry.add_import("my_gates", "--import")
    assert registry.load("gdn").name == "gdn"
    (here / "my_gates.py").write_text(GATE.format(name="mine"))
    registry.add_import("my_gates")
    assert choose("gate", "mine").name == "mine"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("no/such.py", "there is no such file"),
        ("a-b", "that is no module's name"),
        ("[red]", "that is no module's name"),
        ("..gates", "that is no module's name"),
    ],
)
def test_names_that_are_no_modules(module: str, words: str, here: Path, apart: pytest.MonkeyPatch) -> None:
    apart.setenv("DELTALAB_IMPORT", module)
    with pytest.raises(UserError) as error:
        registry.load("gdn")
    assert str(error.value).startswith(f"$DELTALAB_IMPORT: cannot import {module!r}: {words}")


def test_a_name_that_is_taken_by_another_module(here: Path) -> None:
    (here / "json.py").write_text(GATE.format(name="mine"))
    with pytest.raises(UserError, match="a module 'json' is loaded already, from .*; rename yours"):
        registry.add_import("json")


def test_two_packages_with_the_same_component(site: Path) -> None:
    for name in ("first", "second"):
        (site / f"{name}_gates.py").write_text(GATE.format(name="mine"))
        installed(site, {name: f"{name}_gates"}, f"{name}-package", "1.0")
    words = (
        "^entry point deltalab.components 'second' of second-package 1.0: cannot import 'second_gates': "
        r"gate 'mine' of second_gates is already registered, by first_gates\.Mine; give it another name"
    )
    with pytest.raises(UserError, match=words):
        registry.load("gdn")


def test_a_plugin_that_looks_up_components_itself(here: Path) -> None:
    (here / "my_gates.py").write_text(
        "from deltalab import registry\nfrom deltalab.recurrences import components\n"
        "assert 'scalar' in components('gate') and registry.load('gdn').name == 'gdn'\n" + GATE.format(name="mine")
    )
    registry.add_import("my_gates")
    assert choose("gate", "mine").name == "mine"
