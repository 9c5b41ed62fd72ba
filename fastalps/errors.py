"""The two kinds of failure that fastalps raises on purpose besides ValueError and TypeError."""

from __future__ import annotations


class UserError(ValueError):
    """Something outside the program is wrong: a file, a folder, an option.

    Its text is one line: what was expected, what came, what to do. Commands print it and end with
    exit code 2.
    """


class BackendUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run here; the text says why."""
