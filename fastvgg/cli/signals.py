"""Signals that end a command: Ctrl-C, SIGTERM and a closed terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from fastvgg.cli.errors import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    Handler = Callable[[int, FrameType | None], object]

# Enough for the callback that lost an interrupt to return.
SECONDS_TO_REPEAT = 0.001


def catch_signals() -> None:
    """Interrupt a run by SIGINT, SIGTERM and SIGHUP.

    A signal that is ignored stays ignored, as SIGHUP under nohup.
    """
    sys.unraisablehook = repeat_lost_interrupt
    _handle_signals(interrupt)


def interrupt(number: int, _frame: FrameType | None) -> None:
    """Interrupt the run after its current write or sync; exit at once on a second signal."""
    _handle_signals(lambda _number, _frame: os._exit(INTERRUPTED))
    raise KeyboardInterrupt(number)


def repeat_lost_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again if its exception was raised where Python discards exceptions.

    Python runs a signal's handler wherever the main thread is, which may be in a finalizer or in
    the callback of a weak reference: their exceptions go to `sys.unraisablehook` and no further.
    """
    number = _signal_of(unraisable.exc_value)
    if number is None:
        sys.__unraisablehook__(unraisable)
        return
    _handle_signals(interrupt)
    main_thread = threading.main_thread().ident
    threading.Timer(SECONDS_TO_REPEAT, signal.pthread_kill, [main_thread, number]).start()


def _signal_of(error: BaseException | None) -> signal.Signals | None:
    """Return the signal that `interrupt` turned into an exception; None for any other."""
    if not isinstance(error, KeyboardInterrupt) or not error.args:
        return None
    return signal.Signals(error.args[0])


def _handle_signals(handler: Handler) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not every system has SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
