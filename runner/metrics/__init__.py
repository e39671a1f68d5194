"""The official SQuAD scores, and what chance does to them; numpy only.

- `squad`: exact match and F1 of v1.1 and v2.0
- `statistics`: intervals, and tests between models
"""
