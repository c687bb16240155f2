"""Errors a user can cause and mend, and the exit codes that launchers and schedulers rely on."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # the recipe, the data or the machine must change first: never requeue
EXIT_REQUEUE = 75  # ended early, what was saved is whole (EX_TEMPFAIL): worth starting again


class UserError(Exception):
    """Something the user can mend. Printed as it is, without a traceback; the process exits with `EXIT_BAD_INPUT`."""


class RunError(Exception):
    """Why a run cannot go on, where neither its recipe nor a bug is to blame (a full disk, another writer).

    Printed as it is, without a traceback; the process exits with 1.
    """
