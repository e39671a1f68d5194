"""What is named on the command line: whether it is there, told before torch is imported."""

from __future__ import annotations

from pathlib import Path

from runner.errors import AssetError, DataError
from runner.job.sources import is_hub_model
from runner.run.folder import RunDir


def locate_model(name: str) -> str:
    """Where a model's files are, as [model] of a job names it: of a run folder, its model/.

    Raises:
        AssetError: if the name points to nothing.
        DataError: if a folder holds no model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        run = RunDir(folder)
        if run.job.is_file():
            if not run.model.is_dir():
                raise DataError(
                    f"{name}: this run has no model yet; it writes one after each evaluation that"
                    " is the best so far"
                )
            return str(run.model)
        if not (folder / "config.json").is_file():
            raise DataError(f"{name}: is neither a run (job.toml) nor a model (config.json)")
        return str(folder.absolute())
    if name.startswith("package:"):
        return name
    if folder.exists() or not is_hub_model(name):
        raise AssetError(
            f"{name}: no folder of a run or of a model, no hub id such as"
            " deepset/roberta-base-squad2, and no package:NAME/SUBFOLDER"
        )
    return name
