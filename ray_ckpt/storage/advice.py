"""What to do about errors of object stores whose own words do not say it."""

from __future__ import annotations

import re

__all__ = ["advice_on"]

_ADVICE = (
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|HTTP status 301",
        "the bucket seems to be in another region: name it with ?region=",
    ),
    (
        r"ExpiredToken|TokenRefreshRequired|RequestExpired|InvalidToken|token (?:has|is) expired",
        "the credentials have expired: renew them, in every process of the cluster",
    ),
    (
        r"HTTP status 400\) during (?:Head|Get)Object operation",  # answers to which pyarrow shows no text
        "the credentials may have expired, or the bucket may be in another region",
    ),
    (
        r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|HTTP status 403"
        r"|AuthorizationFailure|AuthenticationFailed",
        "look whether these processes have credentials, and whether those may do this here",
    ),
    (r"NO_SUCH_BUCKET|NoSuchBucket|ContainerNotFound", "create the bucket first; a save does not"),
)


def advice_on(text: str) -> str:
    """What to do about an error with this text; empty where that is not known."""
    return next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), "")
