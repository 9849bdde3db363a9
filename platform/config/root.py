"""The data root: the one folder under which everything of a user's work lies.

ledger.db        the SQL ledger (unless another URL is given)
mlflow.db        MLflow's store; mlflow-artifacts/ its files
cache/           prepared datasets, shared by all studies
trials/HASH/     checkpoint and result of a trial
ray/             Ray Tune's own bookkeeping
locks/           one lock per running study
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError

ROOT_VARIABLE, LEDGER_VARIABLE, MLFLOW_VARIABLE = "DELTALAB_ROOT", "DELTALAB_LEDGER", "DELTALAB_MLFLOW"
DEFAULT_ROOT = "deltalab-data"


@dataclass(frozen=True)
class DataRoot:
    """Paths and URLs below one folder. `ledger` and `mlflow` may point to servers instead."""

    path: Path
    ledger: str
    mlflow: str

    @classmethod
    def find(cls, root: str | os.PathLike[str] | None = None) -> DataRoot:
        """`root`, or $DELTALAB_ROOT, or ./deltalab-data; stores are below, or where $DELTALAB_LEDGER, $DELTALAB_MLFLOW say."""
        path = Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser().absolute()
        ledger = os.environ.get(LEDGER_VARIABLE) or f"sqlite:///{path / 'ledger.db'}"
        return cls(path, ledger, os.environ.get(MLFLOW_VARIABLE) or f"sqlite:///{path / 'mlflow.db'}")

    def create(self) -> DataRoot:
        """Make the folders; `UserError` where that is impossible or nothing can be written."""
        try:
            for folder in (self.cache, self.trials, self.ray, self.locks):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(
                f"--root: cannot write to {str(self.path)!r}: {error.strerror}. Give another --root (or ${ROOT_VARIABLE})"
            ) from error
        return self

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    @property
    def locks(self) -> Path:
        return self.path / "locks"

    @property
    def artifacts(self) -> Path:
        return self.path / "mlflow-artifacts"
