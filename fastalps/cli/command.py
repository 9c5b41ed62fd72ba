"""What every command does alike: exit codes, one-line errors, warnings, log lines."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from fastalps.cli.entry import INTERRUPTED, USAGE_ERROR
from fastalps.errors import BackendUnavailable, UserError
from fastalps.files import discard_output
from fastalps.memory import memory_text


class Interrupted(Exception):
    """Ctrl-C, with what the user should know about the work so far."""


class Told(Exception):
    """The command has failed, and another process of it says why."""


def run(name: str, body: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code.

    0: done; 2: an error that the user can mend, told in one line; 130: Ctrl-C. Whatever else goes
    wrong is a fault of the program and keeps its traceback. FASTALPS_TRACEBACK=1 shows the
    traceback of the others, too.

    Args:
        name: of the command, in front of each message.
        body: takes the arguments; raises to fail.
        arguments: None = the process's own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may hold bytes that the terminal's encoding has no characters for.
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format=f"{name}: %(message)s")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(name, f"warning: {message}")
        try:
            body(sys.argv[1:] if arguments is None else arguments)
        except BrokenPipeError:
            discard_output()
            return USAGE_ERROR
        except (KeyboardInterrupt, Interrupted) as stop:
            _say(name, str(stop) or "stopped")
            return INTERRUPTED
        except Told:
            return USAGE_ERROR
        except (UserError, ValueError, BackendUnavailable, OSError) as error:
            return _fail(name, str(error) or type(error).__name__)
        except (MemoryError, RuntimeError) as error:
            text = memory_text(error)
            if text is None:
                raise
            return _fail(name, text)
    return 0


def _fail(name: str, text: str) -> int:
    if os.environ.get("FASTALPS_TRACEBACK"):
        raise
    _say(name, f"error: {text}")
    return USAGE_ERROR


def _say(name: str, text: str) -> None:
    print(f"{name}: " + " ".join(text.split()), file=sys.stderr)
