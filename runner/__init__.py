"""spantune's runner: from a job file to a fine-tuned extractive question-answering model.

Reading order: `job` (what a job file may say) and `jobfile` (reading it) - `rundir` (where a run
writes) - `train` (the loop, top to bottom) - `dataset`, `features`, `batches`, `model`, `engine`,
`scoring`, `spans`, `evaluation`, `metrics` (what the loop uses) - `predict` (answers), `report` (a
run's page) - `cli` (the command). Importing this package never imports torch.
"""

__version__ = "0.1.0"
