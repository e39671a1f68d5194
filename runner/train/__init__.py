"""The training loop: what it is built from, how it goes, how it ends.

- `trainer`: the loop
- `setup`: data, model and engine of a rank
- `plan`: how a run computes, with reasons
- `state`: what a run remembers
- `nan_monitor`: finds the step where numbers were lost
- `run_log`: terminal, tables, curves and trackers of a run that goes on
- `summary`: rows of tables and lines of the log
- `finish`: export proved, result.json last
- `preflight`: what `check --data` tells
"""
