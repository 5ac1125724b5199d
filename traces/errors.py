"""The errors that a user sees, each with its exit code; the command line catches them in one place.

A message is one line: what is wrong, where, and what to do. Everything else that is raised is a
defect of tokentape and may show its traceback.
"""


class TokentapeError(Exception):
    """Something that the user can act on; exit code 1."""

    exit_code = 1


class UsageError(TokentapeError):
    """An argument that cannot be right; exit code 2."""

    exit_code = 2


class TapeError(TokentapeError):
    """Bad data: names the file, and where in it; exit code 1."""


class GateNotMet(TokentapeError):
    """A check that the user asked for failed (`--fail-on`, `--fail-if`); exit code 3."""

    exit_code = 3


class CannotKeepUp(TokentapeError):
    """tokentape itself was too slow for the load; exit code 4."""

    exit_code = 4
