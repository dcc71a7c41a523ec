"""Signals that end a command: Ctrl-C, SIGTERM and a closed terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from _thread import start_new_thread
from typing import TYPE_CHECKING, Final

from fastvgg.cli.errors import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    Handler = Callable[[int, FrameType | None], object]

SECONDS_TO_LEAVE: Final = 0.001


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
    start_new_thread(_resend, (number,))  # threading would wait here for its start


def _resend(number: int) -> None:
    """Send a signal to the main thread once it has left the hook, which would lose it again."""
    main_thread = threading.main_thread().ident or 0
    while _is_in_hook(sys._current_frames().get(main_thread)):  # noqa: SLF001
        time.sleep(SECONDS_TO_LEAVE)
    signal.pthread_kill(main_thread, number)


def _is_in_hook(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not repeat_lost_interrupt.__code__:
        frame = frame.f_back
    return frame is not None


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
