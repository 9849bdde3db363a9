"""Tasks of lm-eval on a finished trial: which there are, what they found, and under which names it is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError, unknown
from ..tasks.tokenizers import load_tokenizer
from .trial import Trained

OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"
"""Task files that ship with deltalab and need no network."""


@dataclass(frozen=True)
class TaskOutcome:
    """One task: its version, and per metric the value, its standard error and whether higher is better."""

    task: str
    version: str
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)

    def measurements(self) -> dict[str, float]:
        """`lm_eval/fda.v1/contains`: the version is in the name, so that two versions never stand in one column."""
        start = f"lm_eval/{_safe(self.task)}.v{_safe(self.version)}"
        found = {f"{start}/{metric}": value for metric, value in self.metrics.items()}
        return found | {f"{start}/{metric}_stderr": value for metric, value in self.errors.items()}


def run_tasks(
    trained: Trained,
    names: Sequence[str],
    cache: Path,
    include: Sequence[Path] = (),
    limit: int | None = None,
    fewshot: int | None = None,
    batch: int = 8,
) -> list[TaskOutcome]:
    """Run the tasks. `UserError` for a trial that reads no text, an unknown task, a folder without tasks, missing data."""
    if "tokenizer" not in trained.data.details:
        raise UserError(
            f"tasks: {trained.name} was trained on {trained.task.name}, whose tokens are no text; lm-eval asks in text"
        )
    from lm_eval.evaluator import simple_evaluate

    from .harness import TrialModel

    with _quiet():
        manager = _manager(include, everything=False)
        if not set(names) <= set(manager.all_tasks):  # reading the thousands of files that lm-eval brings takes seconds
            manager = _manager(include)
        check_names(names, manager.all_tasks)
        model = TrialModel(trained.model, load_tokenizer(trained.data.details, cache), trained.hardware, batch)
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(names),
                num_fewshot=fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,
                log_samples=False,
            )
        except (ConnectionError, FileNotFoundError, OSError) as error:
            raise UserError(f"tasks: the data of {', '.join(names)} cannot be read: {_first_line(error)}") from error
    assert found is not None
    return [_outcome(task, found) for task in found["results"] if task in found["versions"]]


def task_names(include: Sequence[Path] = ()) -> tuple[list[str], list[str]]:
    """(tasks in our folder and in `include`, all that lm-eval knows)."""
    with _quiet():
        return sorted(_manager(include, everything=False).all_tasks), sorted(_manager(include).all_tasks)


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """`UserError` (with the nearest name) for a task that there is none of. `name*` patterns are left to lm-eval."""
    if not names:
        raise UserError("tasks: none given; --tasks recall_text_once,recall_text_twice")
    for name in names:
        if name not in known and "*" not in name:
            error = unknown("task", name, sorted(known), "tasks")
            raise UserError(str(error).split(" Valid: ")[0] + f" lm-eval knows {len(known)} tasks: deltalab eval --list")


def _manager(include: Sequence[Path], everything: bool = True) -> Any:
    """lm-eval's table of tasks: ours, those of `include`, and (`everything`) its own."""
    from lm_eval.tasks import TaskManager

    for folder in include:
        if not folder.is_dir():
            raise UserError(f"include-path: {str(folder)!r} is no folder")
        if not any(folder.rglob("*.yaml")):
            raise UserError(f"include-path: the folder {str(folder)!r} holds no task (a .yaml file with `task:`)")
    folders: list[str | Path] = [str(folder.absolute()) for folder in (OWN_TASKS, *include)]
    return TaskManager(include_path=folders, include_defaults=everything)


def _outcome(task: str, found: dict[str, Any]) -> TaskOutcome:
    """Names such as `exact_match,strict-match` become `exact_match_strict_match`; the filter `none` has no part in them."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    better: dict[str, bool] = {}
    directions = found.get("higher_is_better", {}).get(task, {})
    for key, value in found["results"][task].items():
        if "," not in key or not isinstance(value, (int, float)):
            continue
        metric, _, applied = key.partition(",")
        stderr = metric.endswith("_stderr")
        plain = metric.removesuffix("_stderr")
        name = plain if applied == "none" else f"{plain}_{_safe(applied)}"
        (errors if stderr else metrics)[name] = float(value)
        if not stderr and directions.get(plain) is not None:
            better[name] = bool(directions[plain])
    samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
    return TaskOutcome(task, str(found["versions"][task]), int(samples), metrics, errors, better)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name.replace("-", "_"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's hints about its own options are not for our users."""
    logger = logging.getLogger("lm_eval")
    level, logger.level = logger.level, logging.ERROR
    try:
        yield
    finally:
        logger.level = level
