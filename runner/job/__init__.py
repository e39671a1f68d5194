"""The job file: what may stand in it, and what it means.

- `schema`: every key with its unit and range
- `load`: reads a file and reports all problems at once
- `messages`: a problem as a sentence
- `toml_lines`: the line of a key
- `sources`: names of data: files, hub, slices
- `sweep`: axes as trials
- `inference`: the settings that a trained model answers with
- `assets`: what a job needs of the hub
- `slurm_values`: what [slurm] may say
- `deepspeed_keys`: what [zero.deepspeed] may say
"""
