"""Errors of libraries, without the credentials that their texts repeat."""

from __future__ import annotations

import traceback

from ray_ckpt.storage.address import Address

__all__ = ["without_secrets"]


def without_secrets(error: Exception, address: Address) -> Exception:
    """The error itself when nothing in it, or in what it was raised from, tells a secret; else one of the same class
    whose text is redacted, and which was raised from nothing."""
    told = "".join(traceback.format_exception(error)) + repr(error)
    if address.redact(told) == told:
        return error
    text = address.redact(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, address.redact(error.strerror or ""))
    try:
        return type(error)(text)
    except Exception:  # a class of its own, with arguments that nobody here knows
        return OSError(text)
