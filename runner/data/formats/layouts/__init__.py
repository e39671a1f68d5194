"""What rows may look like in a table, whatever kind of file it is from: one file a format.

A layout is a function of a file's name, its table, the names of columns and whether right answers
must be there; it gives a `Reading`, or None where the table is not its own. LAYOUTS are asked in
order; the last one takes what is left, or says what is missing.

- `squad`: articles with paragraphs with questions (SQuAD, XQuAD, MLQA, TyDiQA-GoldP, GermanQuAD,
  Haystack's annotation tool), and paragraphs without articles (simpletransformers)
- `mrqa`: MRQA's lines
- `label_studio`: Label Studio's JSON, JSON-MIN and CSV
- `doccano`: doccano's lines
- `flat`: a question a row, in named columns
"""

from __future__ import annotations

from typing import Protocol

from runner.data.formats.layouts.doccano import doccano_rows
from runner.data.formats.layouts.flat import flat_rows
from runner.data.formats.layouts.label_studio import label_studio_rows
from runner.data.formats.layouts.mrqa import mrqa_rows
from runner.data.formats.layouts.squad import paragraph_rows, squad_rows
from runner.data.formats.rows import RawTable, Reading
from runner.job.schema import Columns


class Layout(Protocol):
    def __call__(
        self, file: str, table: RawTable, columns: Columns, *, answers: bool
    ) -> Reading | None: ...


LAYOUTS: tuple[Layout, ...] = (
    squad_rows,
    mrqa_rows,
    paragraph_rows,
    label_studio_rows,
    doccano_rows,
    flat_rows,
)
