"""The command line: parse, call one function, print. No logic of a room lives here.

Start at `grammar.py` (the verbs and where they are), then `record.py`, `drive.py` and `read.py`
(the verbs), `units.py` (values with units), `output.py` (stdout: results), `progress.py` (stderr).
Rooms are imported when a verb runs, never before: `tokentape --help` must stay fast. `run` is the
only place that turns errors into one line and an exit code.
"""

import contextlib
import errno
import os
import sys
from typing import NoReturn

from tokentape.traces.errors import TokentapeError, UsageError

# Without a file's name, only these of the system's errors are the user's to act on.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
_INTERRUPTED = 130
_FAILED = 1


def run() -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    code = _outcome(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.exit(code)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has no reader
    sys.exit(code or _FAILED)


def _outcome(arguments: list[str]) -> int:
    import typer

    from tokentape.cli.grammar import parse_and_call

    try:
        code = parse_and_call(arguments)
        sys.stdout.flush()
    except TokentapeError as error:
        return _complain(str(error), error.exit_code)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "tokentape"
        said = error.format_message().replace("Value error, ", "").rstrip(".")
        return _complain(f"{said}; see {command} --help", UsageError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        return _FAILED
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise  # a defect of tokentape: its traceback says where
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return _complain(f"{where}{error.strerror}", _FAILED)
    return code


def _complain(message: str, code: int) -> int:
    """One line on stderr, whatever the message holds."""
    sys.stderr.write(f"tokentape: {' '.join(message.split())}\n")
    return code
