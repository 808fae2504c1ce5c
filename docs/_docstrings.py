"""Docstrings for the API reference: "Example:" is a section of examples, as doctest and a reader take it."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """griffe knows the section as "Examples:", and no block of code that is begun by two colons."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change what is rendered, and nothing in the sources."""
        if obj.docstring:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^(\s*)Example::$", r"\1**Example:**", text, flags=re.MULTILINE)
