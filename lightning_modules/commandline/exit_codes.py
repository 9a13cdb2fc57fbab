"""The end of a command that does not succeed: what there is to say in one line, and the exit code."""

import errno
import signal

from clafusion.errors import FusionError
from clafusion.lightning import MisconfigurationException, SIGTERMException
from clafusion.lightning_modules.distributed import is_lost
from clafusion.statistics.memory import is_out_of_memory

#: What a disk or a folder refuses.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def ended_by(error: BaseException) -> int | None:
    """Return the signal behind the end of a command; None if there is none."""
    if isinstance(error, SIGTERMException):
        return signal.SIGTERM
    # Lightning puts an exit in the place of the interruption of a training.
    interrupted = error.__context__ if isinstance(error, SystemExit) else error
    return signal.SIGINT if isinstance(interrupted, KeyboardInterrupt) else None


def user_message(error: BaseException | None) -> tuple[str, int] | None:
    """Return what the user can put right about an error, and the exit code; None for a bug.

    Args:
        error: It counts, or the first error behind it that has an explanation.
    """
    while error is not None:
        if isinstance(error, (FusionError, MisconfigurationException)):
            return str(error), 2
        if isinstance(error, OSError) and error.errno in _REFUSED:
            return (
                f"Expected to use {error.filename or 'a file'}, got {error.strerror}; make room or choose another",
                2,
            )
        if is_out_of_memory(error):
            return (
                f"Expected what is computed to fit into memory, got {_first_line(error)}; lower --data.batch_size or "
                "--data.eval_batch_size, or choose another device"
            ), 2
        if is_lost(error):
            return (
                f"Expected all processes to go on, got one that is gone ({_first_line(error)}); give the same command "
                "again, fit with --ckpt_path last"
            ), 1
        error = error.__cause__
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
