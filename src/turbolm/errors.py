"""User-fixable errors, and the exit codes that launchers and schedulers rely on."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

from turbolm.redaction import redact

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # the recipe, the data or the machine must change first: never requeue
EXIT_REQUEUE = 75  # stopped early, and what was saved is complete (EX_TEMPFAIL): worth starting again
EXIT_SIGNAL = 128  # plus the number of the signal that killed it
EXIT_STOPPED = 130  # by Ctrl-C or `turbolm stop`: neither done nor to be started again


class _CleanError(Exception):
    """Printed as it is, without a traceback; its message may quote a recipe or a library, so secrets are taken out."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class UserError(_CleanError):
    """Something the user can fix. The process exits with `EXIT_BAD_INPUT`."""


class RunError(_CleanError):
    """A run cannot continue, and neither its recipe nor a bug is the cause: a full disk, another writer.

    The process exits with `EXIT_FAILED`.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: "; did you mean 'llama'?", or nothing where none is near."""
    near = difflib.get_close_matches(name[:100], sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


_CURES = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some of your quota, or choose another folder",
    errno.EROFS: "it is mounted read-only; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "something else has that name, perhaps a link that leads nowhere; choose another one",
    errno.EACCES: "this user may not do that; choose another folder",
    errno.EPERM: "this user may not do that; choose another folder",
    errno.ELOOP: "its links lead in a circle; choose another folder",
    errno.ENOENT: "check the name, and that no link leads nowhere",
}


def explain_os_error(error: OSError) -> str:
    """What the file system says, about which file, and what to do."""
    cure = _CURES.get(error.errno or 0)
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}" + (f"; {cure}" if cure else "")


def exit_code_of(command: Callable[[], int]) -> int:
    """The exit code that `command` returns.

    A UserError, and what the file system refuses, become a message and `EXIT_BAD_INPUT`.
    """
    try:
        return command()
    except UserError as error:
        print(f"turbolm: {error}" if "\n" not in str(error) else str(error), file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in _CURES:
            raise
        print(f"turbolm: {redact(explain_os_error(error))}", file=sys.stderr)
    return EXIT_BAD_INPUT
