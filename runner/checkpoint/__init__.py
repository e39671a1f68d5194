"""What is saved so that a run can go on: by all ranks, or by none.

- `manager`: saves and loads a run's checkpoints, and settles which of them count
- `best`: the best evaluation so far, with its exported model
- `commit`: all ranks save, or none does
- `store`: checkpoints in a folder: staged, hashed, read back, renamed
- `files`: each file operation as one method, so that each can be made to fail
- `prune`: removes what a finished run has no more use for
- `deepspeed_io`: DeepSpeed's shards through our store
"""
