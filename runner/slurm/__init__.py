"""Runs on a cluster.

- `script`: the batch script, by `templates/submit.sh.j2`
- `defaults`: a site's defaults
- `client`: SLURM's commands
- `request`: a job that is to be submitted, checked
- `submit`: gives it to SLURM
- `starts`: the newest start of a run, and its words
- `status`: how runs stand
- `control`: logs and cancelling
"""
