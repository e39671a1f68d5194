"""Jinja templates that lie in a package's folder `templates`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def template_environment(folder: Path, *, autoescape: bool, **options: Any) -> Environment:
    """Load templates from `folder`. A line of nothing but a tag leaves no line behind; a name that
    was given no value is an error.

    Args:
        folder: of the templates.
        autoescape: whether what is put in is escaped for HTML.
        options: further ones of `jinja2.Environment`.
    """
    # Half of a short command's time, so it is spent only where something is drawn.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters["code_fence"] = code_fence
    return environment


def code_fence(text: str) -> str:
    """The fence of a Markdown code block that no line of `text` can end."""
    return "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
