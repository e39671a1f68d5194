"""spantune as it is called from outside: installed as the package `spantune` (pyproject.toml).

    from spantune import Predictor, pipeline, train

The code itself is the package `runner`, which is a common name: a runner.py on PYTHONPATH or in the
current folder would take its place. Whoever comes through here gets ours, whatever stands first.

- `__main__`: the command, as `python -m spantune`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.predict import Predictor, pipeline

__all__ = ["JOBS", "Predictor", "__version__", "main", "pipeline", "train"]


def _ours(folder: Path) -> Any:
    """Import the package in this folder as `runner`.

    Raises:
        ImportError: if another one has that name already.
    """
    found = sys.modules.get("runner")
    if found is None:
        spec = spec_from_file_location("runner", folder / "__init__.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{folder}: spantune's code is not there; install it again")
        found = sys.modules["runner"] = module_from_spec(spec)
        spec.loader.exec_module(found)
    elif Path(found.__file__ or "").resolve().parent != folder.resolve():
        raise ImportError(
            f"{found.__file__} was imported as `runner`, the name of spantune's own code; import"
            " spantune before it, or rename it"
        )
    return found


_HERE = Path(__file__).parent
_BESIDE = _HERE.parent / "runner"  # where a wheel was installed; in a checkout we stand in it
_IN_CHECKOUT = not _BESIDE.is_dir()
__version__: str = _ours(_HERE.parent if _IN_CHECKOUT else _BESIDE).__version__

# The jobs that come with spantune, and their data.
JOBS = _HERE.parents[1] / "jobs" if _IN_CHECKOUT else _HERE / "jobs"


def main(argv: Sequence[str] | None = None) -> int:
    """The command `spantune`; returns its exit code."""
    return import_module("runner.cli.command").main(argv)


def train(
    job: str | Path,
    *,
    run_dir: str | Path,
    ranks: int | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Run a job to its end as `spantune run` does, in processes of its own, or go on with it.

    Args:
        job: the job file.
        run_dir: the run's own folder.
        ranks: processes; None: one for each GPU, or one.
        overrides: as of --set, e.g. "train.epochs=2".

    Returns:
        The run's folder: for `Predictor.load`.

    Raises:
        RuntimeError: if it did not succeed; what was wrong has been printed.
    """
    words = ["run", str(job), "--run-dir", str(run_dir)]
    words += [] if ranks is None else ["--ranks", str(ranks)]
    code = main([*words, *(word for value in overrides for word in ("--set", value))])
    if code != 0:
        raise RuntimeError(f"{job}: ended with exit code {code}; see above, or {run_dir}/log.txt")
    return Path(run_dir)


def __getattr__(name: str) -> Any:
    """What brings torch, imported when it is first wanted."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("runner.predict"), name)
