"""Signals that arrive while nobody is ready for them."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class HeldSignal:
    """Holds a signal, whose default would end the process, for the time of a `with` block.

    It is not delivered at the end of the block, where perhaps still nobody is ready for it, but by `deliver`. A handler
    that is there already is left in place, and so is the signal in other threads than the main one, which alone may
    change its handler.

    Args:
        number: The signal, for example `signal.SIGUSR1`; None, where the system has no such signal, holds nothing.

    Example:
        >>> with HeldSignal(signal.SIGUSR1) as held:
        ...     os.kill(os.getpid(), signal.SIGUSR1)
        >>> held.arrived
        True
    """

    def __init__(self, number: int | None) -> None:
        self.number = number
        self.arrived = False
        self._mine = False

    def __enter__(self) -> "HeldSignal":
        main = threading.current_thread() is threading.main_thread()
        # Not a mask: threads that exist already would take the signal, and the process would end all the same.
        if main and self.number is not None and signal.getsignal(self.number) is signal.SIG_DFL:
            signal.signal(self.number, self._hold)
            self._mine = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._mine and self.number is not None:
            signal.signal(self.number, signal.SIG_DFL)
            self._mine = False

    def deliver(self) -> None:
        """Send the signal to this process if it has arrived, once."""
        if self.arrived and self.number is not None:
            self.arrived = False
            os.kill(os.getpid(), self.number)

    def _hold(self, number: int, frame: FrameType | None) -> Any:
        self.arrived = True
