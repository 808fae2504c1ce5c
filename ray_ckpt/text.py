"""Text for messages."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence

__all__ = ["first_line", "is_unicode", "listed", "message_of", "printable", "quoted", "told", "without_credentials"]

_LONGEST_QUOTE = 80


def listed(items: Sequence[object], *, at_most: int = 5, separator: str = ", ") -> str:
    """The first items, and how many more there are: `a, b, and 3 more`."""
    more = len(items) - at_most
    return separator.join([*map(str, items[:at_most]), *([f"and {more} more"] if more > 0 else [])])


def printable(value: object, *, at_most: int = 10_000) -> str:
    """One line without control characters."""
    text = str(value)
    text = text if len(text) <= at_most else f"{text[: at_most - 3]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(value: object) -> str:
    """A value out of a file, for a message: as `repr` shows it, cut to 80 characters, at a cost that the value cannot
    drive up."""
    try:
        text = _shortener.repr(value[: 2 * _LONGEST_QUOTE] if isinstance(value, (str, bytes)) else value)
    except Exception:  # an integer of too many digits, or somebody's own `__repr__`
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST_QUOTE else f"{text[: _LONGEST_QUOTE - 4]}...{text[-1]}"


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: it holds no half of a surrogate pair, as what was decoded leniently may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def message_of(error: BaseException) -> str:
    """What somebody's exception says, even if its `__str__` fails."""
    try:
        return str(error)
    except BaseException as failure:
        return f"its message cannot be had: {type(failure).__name__}"


def first_line(error: BaseException) -> str:
    """The first line with text of what an exception says; the name of its class where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def told(error: BaseException) -> str:
    """An exception of somebody else's code, for a message: `KeyError: 'no such setting'`."""
    return f"{type(error).__name__}: {message_of(error)}"


def without_credentials(text: str) -> str:
    """What a person typed, for a message: cut behind the scheme of a URI that may hold credentials.

    For text that no storage's address was made of, whose own `redact` knows what is secret.
    """
    return _MAY_HOLD_CREDENTIALS.sub(r"\1...", text)


_MAY_HOLD_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?=.*[@?]).*", re.DOTALL)

_shortener = reprlib.Repr()
_shortener.maxlevel = 3
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = _LONGEST_QUOTE
