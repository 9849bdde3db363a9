"""Tasks of somebody else: found by entry point and import, in a trial's hash, certified; each fault is caught by its check."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from deltalab import plugins, registry
from deltalab.errors import UserError
from deltalab.platform.cli import catalogue, certify
from deltalab.platform.config import load_study
from deltalab.platform.study.plan import Plan, plan_study
from deltalab.platform.tasks import build_task, prepare_task, task_class, task_names
from deltalab.platform.tasks.registry import check_origin, identity, origin, origins
from deltalab.tests.conformance.checks import TASK_CHECKS, CheckError, TaskSubject, checks_for, run_check
from deltalab.tests.conformance.subjects import parse, subjects

HERE = Path(__file__).parent / "third_party"
SOUND = ["task:maximum", "task:{name: maximum, vocab: 2, length: 5}", "task:countdown"]
SHIPPED = [
    "mqar",
    "mad_recall",
    "mad_noisy_recall",
    "mad_fuzzy_recall",
    "mad_selective_copy",
    "mad_compression",
    "mad_memorisation",
    "recall_text",
    "{name: recall_text, reading: twice}",
    "niah_text",
]
FAULTS = {
    "unexplained": ("declared", r"Config\.depth: says nothing of itself"),
    "broken_preset": ("declared", r"preset 'quick': task\.length: 1 is out of range"),
    "anything_goes": ("settings", r"mode: \[\] is accepted; give the field a type"),
    "divides_by_zero": ("settings", r"stride: 0 is ZeroDivisionError: .*; raise a UserError that names it"),
    "narrow": ("rows", "train: inputs are int32, expected int64"),
    "lends_its_arrays": ("rows", "train: inputs are others after the arrays of an earlier call were overwritten"),
    "one_token_too_many": ("targets", r"train: the target 64 is neither -100 \(IGNORE\) nor one of the 64 tokens"),
    "nothing_asked": ("targets", r"train: row \d+ has nothing that is scored"),
    "sees_the_clock": ("seeded", "train: inputs are others a second time"),
    "ignores_its_seed": ("seeded", "train: data_seed 1 gives the inputs of data_seed 0"),
    "hashes_text": ("elsewhere", "digest: another one in another process"),
    "counts_its_block": ("blocks", "train: inputs are others made one by one"),
    "tests_on_its_training": ("splits", r"validation: \d+ of its inputs are trained on as well"),
    "forgets_a_setting": ("fingerprint", r"vocab \d+: has that of 64"),
    "one_cache_for_all": ("fingerprint", r"train: \w+ are others in a cache that others use \(length 4\)"),
    "chance_in_percent": ("chance", "chance is 50; expected from 1 / vocab = 0.015625 to below 1"),
    "asks_the_unknowable": ("oracle", r"the oracle answers 0\.\d+ of what is asked, and must answer 1"),
    "labels_everything": ("facets", "train: position puts a position that is not scored into a bucket"),
    "stays_short": ("longer", r"longer\(2\): 32 positions, and the task itself has 32"),
    "no_length": ("longer", r"longer\(2\): .*length.*; define `longer`, or call the setting `length`"),
}


@pytest.fixture
def here(tmp_path: Path, apart: pytest.MonkeyPatch) -> Path:
    """A current folder of its own, with the sound tasks in it as `my_tasks`."""
    apart.chdir(tmp_path)
    shutil.copy(HERE / "sound_tasks.py", tmp_path / "my_tasks.py")
    return tmp_path


@pytest.fixture
def site(here: Path, apart: pytest.MonkeyPatch) -> Path:
    folder = here / "site"
    folder.mkdir()
    apart.syspath_prepend(folder)
    plugins._distribution.cache_clear()
    return folder


def installed(site: Path, name: str, group: str, module: str) -> None:
    """What pip leaves of an installed package: its metadata."""
    info = site / f"{name.replace('-', '_')}-3.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\ntasks = {module}\n")
    (info / "top_level.txt").write_text(module.split(".")[0])


def edit(here: Path, old: str, new: str) -> None:
    """Another version of the module, as the next process would import it."""
    file = here / "my_tasks.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    del sys.modules["my_tasks"]
    plugins._digest.cache_clear()
    plugins._state.imported.clear()
    registry.add_import("my_tasks")


def plan(here: Path, task: str) -> Plan:
    study = {
        "name": "mine",
        "base": {
            "recurrence": "deltanet",
            "task": {"name": task, "length": 8},
            "model": {"width": 16, "layers": 1, "heads": 2},
            "training": {"steps": 2, "batch": 4},
        },
        "seeds": [0],
    }
    (here / "study.yaml").write_text(yaml.safe_dump(study))
    return plan_study(load_study("study.yaml"), here / "cache")


# --- found -------------------------------------------------------------------------------------------------------------------


def test_a_module_of_the_current_folder(here: Path) -> None:
    with pytest.raises(UserError, match=r"task\.name: unknown task 'maximum'"):
        build_task("maximum")
    registry.add_import("my_tasks")
    assert {"maximum", "countdown", "mqar"} <= set(task_names())
    task = build_task({"name": "maximum", "preset": "quick"})
    whose = origin(type(task))
    assert whose.startswith("my_tasks 1.5 (") and len(whose) == len("my_tasks 1.5 (12345678)")
    assert origins(task) == {"task maximum": whose}
    assert origin(task_class("mqar")) == "deltalab" and origins(build_task("mqar")) == {}
    inputs, targets = prepare_task(task, here / "cache").train.rows(np.arange(2))
    assert (targets[:, 1:] == np.maximum.accumulate(inputs, axis=1)[:, 1:]).all()


def test_the_variable_names_it_as_well(here: Path, apart: pytest.MonkeyPatch) -> None:
    apart.setenv("DELTALAB_IMPORT", "my_tasks")
    assert task_class("maximum").__module__ == "my_tasks"


@pytest.mark.parametrize("group", ["deltalab.tasks", "deltalab.components"])
def test_an_installed_package(group: str, site: Path) -> None:
    shutil.copy(HERE / "sound_tasks.py", site / "their_tasks.py")
    installed(site, "their-package", group, "their_tasks")
    assert origin(task_class("countdown")).startswith("their-package 3.1 (")
    assert plugins.imports() == [], "a worker's installation has it"


def test_a_package_that_cannot_be_imported_is_named(site: Path) -> None:
    (site / "their_tasks.py").write_text("import absent_dependency\n")
    installed(site, "their-package", "deltalab.tasks", "their_tasks")
    words = r"entry point deltalab\.tasks 'tasks' of their-package 3\.1: cannot import 'their_tasks': ModuleNotFoundError"
    with pytest.raises(UserError, match=rf"^task\.name: 'maximum': {words}"):
        build_task("maximum")
    assert build_task("mqar").name == "mqar", "what is not its own can be used"


def test_two_packages_with_one_task(site: Path) -> None:
    for name in ("first_tasks", "second_tasks"):
        shutil.copy(HERE / "sound_tasks.py", site / f"{name}.py")
        installed(site, name.replace("_", "-"), "deltalab.tasks", name)
    [problem] = (task_names(), plugins.attempt())[1]
    assert "task 'maximum' of second_tasks is already registered, by first_tasks.Maximum; give it another name" in problem


FROZEN = "    @dataclass(frozen=True)\n    class Config(SyntheticConfig)"
RESERVED = '"symbols")\n        lengths: int = option(1, "x")'
QUICK = 'presets: ClassVar = {"quick"'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name: ClassVar[str] = "maximum"', "", "does not say its `name` (str)"),
        ("version: ClassVar[int] = 1", 'version = "one"', "does not say its `version` (int)"),
        ('summary: ClassVar[str] = "the largest symbol so far"', "", "does not say its `summary` (str)"),
        ("def generate(", "def generates(", "does not define generate"),
        ("class Maximum(SyntheticTask)", "class Maximum(dict)", "is no Task; derive it from deltalab.platform.tasks.Task"),
        ('"symbols", min=2, max=1024)', RESERVED, "has a setting 'lengths', which is a key"),
        ("option(8, ", "option(help=", "every field of its Config needs a default"),
        (FROZEN, "    class Config", "its Config is no frozen dataclass"),
        (QUICK, f'metric = "acuracy"\n    {QUICK}', "unknown metric 'acuracy'. Did you mean"),
    ],
)
def test_a_task_that_cannot_be_used_says_so_when_it_is_declared(old: str, new: str, message: str, here: Path) -> None:
    text = (here / "my_tasks.py").read_text()
    assert text.count(old) >= 1
    (here / "my_tasks.py").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        registry.add_import("my_tasks")
    assert "cannot import 'my_tasks': task my_tasks." in str(error.value) and message in str(error.value)


# --- a trial ---------------------------------------------------------------------------------------------------------------


def test_a_trial_holds_whose_task_it_is(here: Path) -> None:
    registry.add_import("my_tasks")
    [trial] = plan(here, "maximum").trials
    assert trial.config["plugins"] == {"task maximum": origin(task_class("maximum"))}
    [ours] = plan(here, "mad_compression").trials
    assert "plugins" not in ours.config, "the hash of a shipped task does not depend on plug-ins"


def test_other_code_is_another_trial_and_other_data(here: Path) -> None:
    registry.add_import("my_tasks")
    [trial] = plan(here, "maximum").trials
    before = identity(build_task("maximum")), build_task("maximum").fingerprint()
    edit(here, "np.maximum.accumulate", "np.minimum.accumulate")  # and the author forgot to raise the version
    edit(here, ".max(axis=1)", ".min(axis=1)")
    after, [edited] = build_task("maximum"), plan(here, "maximum").trials
    assert edited.hash != trial.hash and identity(after) != before[0]
    assert after.fingerprint() != before[1], "the cache of the old code is not the new one's"
    targets = prepare_task(after, here / "cache").test.rows(np.arange(4))[1]
    assert (np.diff(targets[:, 1:], axis=1) <= 0).all()
    with pytest.raises(UserError, match=r"^task maximum: planned with my_tasks 1\.5 \(.*, but this worker has my_tasks 1\.5 \("):
        check_origin(after, trial.config["plugins"])
    check_origin(after, edited.config["plugins"])
    check_origin(after, {**edited.config["plugins"], "gate leaky": "of another check"})
    with pytest.raises(UserError, match=r"^task maximum: planned with deltalab, but"):
        check_origin(after, {})


def test_components_are_checked_apart(here: Path) -> None:
    registry.check_origins(registry.load("gdn"), {"task maximum": "my_tasks 1.5 (12345678)"})


# --- the command line --------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    app = typer.Typer()
    catalogue.register(app)
    certify.register(app)
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "140"})


def test_list_describe_and_certify(here: Path) -> None:
    listed = run("list", "tasks", "--import", "my_tasks")
    assert listed.exit_code == 0 and "maximum" in listed.output and "my_tasks 1.5 (" in listed.output
    described = run("describe", "maximum", "--import", "my_tasks")
    assert (
        described.exit_code == 0
        and "the largest symbol so far" in described.output
        and "symbols of an example" in described.output
    )
    certified = run("certify", "task:{name: maximum, length: 6}", "--import", "my_tasks")
    assert certified.exit_code == 0 and "certified: task:{name: maximum, length: 6}" in certified.output, certified.output
    assert all(f"holds   {name}" in certified.output for name in TASK_CHECKS)


def test_certify_says_what_failed(here: Path) -> None:
    shutil.copy(HERE / "sound_tasks.py", here / "sound_tasks.py")
    shutil.copy(HERE / "faulty_tasks.py", here / "faulty_tasks.py")
    failed = run("certify", "task:chance_in_percent", "--import", "faulty_tasks")
    assert failed.exit_code == 1
    assert failed.output.count("FAILED") == 1 and "chance is 50" in failed.output
    assert "not certified: task:chance_in_percent" in failed.output


def test_list_shows_a_broken_package(site: Path) -> None:
    (site / "their_tasks.py").write_text("x = (\n")
    installed(site, "their-package", "deltalab.tasks", "their_tasks")
    listed = run("list", "tasks")
    assert listed.exit_code == 0
    assert "broken entry point deltalab.tasks 'tasks' of their-package 3.1" in " ".join(listed.output.split())


# --- certification -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, forgetting: Any) -> Iterator[None]:
    """Both packages in a folder on the path, their tasks known while these tests run."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("sound_tasks.py", "faulty_tasks.py"):
        shutil.copy(HERE / name, folder)
    with forgetting() as patch:
        patch.syspath_prepend(folder)
        registry.add_import("sound_tasks")
        registry.add_import("faulty_tasks")
        yield


@pytest.mark.parametrize("target", [*SOUND, *(f"task:{name}" for name in SHIPPED)])
def test_sound_tasks_conform(target: str, packages: None) -> None:
    [subject] = parse(target)
    for name in checks_for(subject):
        if name != "elsewhere" or target in SOUND:  # two processes each
            run_check(name, subject)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_the_check_that_is_meant_for_it(name: str, packages: None) -> None:
    [subject] = parse(f"task:{name}")
    check, message = FAULTS[name]
    with pytest.raises(CheckError, match=message):
        run_check(check, subject)


def test_every_check_is_meant_for_a_fault() -> None:
    assert {check for check, _ in FAULTS.values()} == set(TASK_CHECKS)


def test_what_only_a_generated_task_has(packages: None) -> None:
    [generated, other] = subjects([], [], ["maximum", "{name: countdown, length: 4}"])
    assert set(checks_for(generated)) - set(checks_for(other)) == {"blocks", "oracle"}
    assert isinstance(other, TaskSubject) and other.task().config.length == 4
    assert dataclasses.asdict(other.task().config)["count"] == 64


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("task:maximun", "task.name: unknown task 'maximun'. Did you mean 'maximum'?"),
        ("task:{name: maximum, lenght: 4}", "task.lenght: unknown key 'lenght'. Did you mean 'length'?"),
        ("task:{length: 4}", "task.name: missing."),
        ("task:[maximum", "task:[maximum, line 1"),
        ("tasks:maximum", "tasks:maximum: unknown axis 'tasks'. Did you mean 'task'?"),
    ],
)
def test_mistakes_in_a_target(target: str, message: str, packages: None) -> None:
    with pytest.raises(UserError) as error:
        parse(target)
    assert str(error.value).startswith(message)
