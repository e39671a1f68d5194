"""Helpers without a subject of their own.

- `files`: whole files or none; JSON as what it is declared to be
- `disk`: which file system is full
- `console`: what the terminal shows
- `tables`: CSV files and terminal tables
- `signals`: requests to stop
- `processes`: whether the process that a record names lives; a pause of the garbage collector
- `ranks`: which rank this process is
- `timing`: seconds by phase
- `text`: small spellings
- `templates`: Jinja templates of a package
"""
