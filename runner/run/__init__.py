"""A run's folder and its starts.

- `folder`: the names of all its files
- `ownership`: whose a folder is
- `attempts`: the ledger of its starts
- `lease`: one start at a time
- `resume`: which folder a start goes on in
- `launch`: starts the ranks
- `sweep`: a sweep's folder and its trials
- `provenance`: what could make a second run differ
- `reproduce`: runs it again and compares
"""
