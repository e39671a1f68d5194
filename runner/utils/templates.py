"""Jinja templates of a package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def template_environment(module: str, *, autoescape: bool, **options: Any) -> Environment:
    """Load templates from the folder `templates` beside a module. A line that holds only a tag
    leaves no line behind; a name that was given no value is an error.

    Args:
        module: its `__file__`.
        autoescape: whether what is put in is escaped for HTML.
        options: further ones of `jinja2.Environment`.
    """
    # Imported where something is drawn: `--help` and `check` need not wait for it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(module).with_name("templates")),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters["code_fence"] = _code_fence
    return environment


def _code_fence(text: str) -> str:
    """The fence of a Markdown code block that no line of `text` can end."""
    return "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
