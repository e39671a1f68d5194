"""The official SQuAD scores, and what chance does to them; numpy only.

- `normalise`: what of an answer is compared, by language
- `squad`: exact match and F1 of v1.1 and v2.0, the search for the null threshold
- `statistics`: intervals, and tests between models
"""
