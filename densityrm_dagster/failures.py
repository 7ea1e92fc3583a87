"""Errors a person must act on become failures with that message alone, and are not retried."""

import contextlib
from collections.abc import Iterator

import dagster as dg


@contextlib.contextmanager
def clear_failures() -> Iterator[None]:
    """ValueErrors and RuntimeErrors that the core raises on purpose -> dg.Failure with their message."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("densityrm_core"):
            raise
        raise dg.Failure(str(error), allow_retries=False) from None
