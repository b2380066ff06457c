"""From whatever happens in a command to its exit code: the one place that catches everything.

Exit codes: 0 done, 1 failed after work began, 2 refused before, 3 a quality gate failed, 130 interrupted.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer

from moeprune import _files
from moeprune._cli_options import verbosity
from moeprune._cli_output import say
from moeprune.errors import MoePruneError, first_line

_FULL = {errno.ENOSPC, errno.EDQUOT}


def exit_code(command: Callable[[], Any]) -> int:
    """Run a command; an error is one line and a hint on stderr."""
    _files.reset_work()
    _files.quiet.set(False)
    verbosity.set(0)
    try:
        code = command()
    except MoePruneError as error:
        return _fail(error, error.message, error.hint)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        hint = "free some space or choose another -o" if error.errno in _FULL else ""
        return _fail(error, f"{error.strerror or error}{where}", hint)
    except Exception as error:
        if hasattr(error, "format_message"):  # how the parser reports a wrong option
            return _fail(error, error.format_message(), _usage_hint(error))
        what = f"unexpected {type(error).__name__}: {first_line(error)}"
        return _fail(error, what, "run again with -vv and report the traceback")
    if code == 130:
        say("interrupted")
    return code if isinstance(code, int) else 0


def _usage_hint(error: Exception) -> str:
    context: Any = getattr(error, "ctx", None)
    return f"see `{context.command_path if context else 'moeprune'} --help`"


def _fail(error: BaseException, message: str, hint: str) -> int:
    if verbosity.get() >= 2:
        traceback.print_exception(error)
    say(f"error: {' '.join(message.split())}")
    for cause in _causes(error) if verbosity.get() == 1 else ():
        say(f"because: {type(cause).__name__}: {first_line(cause)}")
    if hint:
        say(f"hint: {hint}")
    return 1 if _files.work_begun() else 2


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield cause
        yield from _causes(cause)
