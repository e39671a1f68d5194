"""Runs on a cluster.

- `script`: the batch script
- `defaults`: a site's defaults
- `client`: SLURM's commands
- `request`: a job that is to be submitted, checked
- `submit`: gives it to SLURM
- `status`: how runs stand
- `control`: logs and cancelling
"""
