"""W&B, TensorBoard and MLflow, each in a process of its own.

- `client`: starts them and sends rows
- `process`: the process of one tracker
"""
