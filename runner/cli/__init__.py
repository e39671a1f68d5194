"""The command `spantune`.

- `command`: reads arguments, calls one verb, turns errors into exit codes
- `run`: the verbs that train here: check, run, rank, reproduce, schema
- `init`: init, which writes a job file for somebody's data
- `prune`: prune
- `predict`: predict and evaluate
- `report`: report
- `slurm`: submit, status, logs, cancel, may-requeue
- `output`: what verbs print, and the options that several have
"""

from runner.cli.command import main

__all__ = ["main"]
