"""Errors a user can cause and mend, and the exit codes that launchers and schedulers rely on."""

from turbolm.redaction import redact

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # the recipe, the data or the machine must change first: never requeue
EXIT_REQUEUE = 75  # ended early, what was saved is whole (EX_TEMPFAIL): worth starting again


class UserError(Exception):
    """Something the user can mend. Printed as it is, without a traceback; the process exits with `EXIT_BAD_INPUT`.

    Its message may quote the recipe or another library, so secrets are taken out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class RunError(Exception):
    """Why a run cannot go on, where neither its recipe nor a bug is to blame (a full disk, another writer).

    Printed as it is, without a traceback and without secrets; the process exits with 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))
