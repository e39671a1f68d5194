"""A split of a hub repository."""

from __future__ import annotations

import sys

from runner.data.formats import table_rows
from runner.data.formats.rows import RawTable, Reading
from runner.data.hub import snapshot
from runner.errors import DataError, StorageError
from runner.job.schema import Columns
from runner.job.sources import DataSource
from runner.utils.disk import full_disk, no_room
from runner.utils.text import first_line


def hub_rows(source: DataSource, columns: Columns) -> tuple[Reading, str]:
    """Rows of a hub data set's split, and the commit that they are from.

    The repository is fetched first and read as a folder: `datasets` by itself, when it cannot reach
    the hub, takes whatever revision its cache holds and says so in a log line only.

    Raises:
        AssetError, StorageError: as `snapshot`; the latter also if its own cache has no room.
        DataError: if it cannot be read, or the name is not one split's.
    """
    import datasets
    from datasets.config import HF_DATASETS_CACHE

    found = snapshot("dataset", source.location, source.revision)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(str(found.folder), source.config, split=source.split)
    except Exception as error:
        full = full_disk(error)
        if full is not None:
            raise StorageError(no_room(full, full.filename or HF_DATASETS_CACHE)) from None
        if isinstance(error, OSError) and "disk space" in str(error):  # its own look beforehand
            raise StorageError(f"{HF_DATASETS_CACHE}: {first_line(error)}") from None
        # Whatever it is, datasets could not make rows of the repository.
        why = first_line(error.__cause__ or error).replace(f"{found.folder}", source.location)
        raise DataError(f"{source.text}: datasets cannot read it: {why}") from None
    if not isinstance(table, datasets.Dataset):
        raise DataError(f"{source.text}: names no single split")
    rows = RawTable(table.to_list(), table.column_names)
    return table_rows(source.text, rows, columns), found.commit
