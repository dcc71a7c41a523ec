"""Written and committed on threads of their own: in order, none after an error, none left over.

Where a piece of work must still be under way, it waits for an event, or until signals find the main
thread waiting for it; nothing here waits for time to pass.
"""

from __future__ import annotations

import concurrent.futures
import functools
import signal
import threading

import pytest

from fastvgg.stream.commit_pipeline import CommitPipeline

LIMIT_SECONDS = 60  # for a test that would never end, and not for one that is slow


def come(event):
    """Wait until something has happened."""
    assert event.wait(LIMIT_SECONDS), "what a piece of work waits for does not happen"


class Main:
    """The main thread, as a piece of work sees it that sends it signals."""

    def __init__(self):
        self.has_left = threading.Event()
        self._handled = threading.Semaphore(0)
        self._codes = set()

    def handle(self, number, frame):
        """Look at what the main thread is doing, and interrupt that where it is asked for."""
        if number == signal.SIGUSR2:
            return
        self._codes = set()
        while frame is not None:
            self._codes.add(frame.f_code)
            frame = frame.f_back
        self._handled.release()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            raise SystemExit(7)

    def is_in(self, function, number=signal.SIGUSR1):
        """Whether a signal finds the main thread inside of a function."""
        signal.pthread_kill(threading.main_thread().ident, number)
        # A signal that comes just before the main thread blocks is noticed at the next one.
        while not self._handled.acquire(timeout=0.01):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
        return function.__code__ in self._codes

    def stays_in(self, function):
        """Come back when the main thread does not get any further than a function.

        That is when signals find it there again and again, each of which has let it go on.
        """
        found = 0
        while found < 5:
            assert not self.has_left.is_set(), "the block was left under work"
            found = found + 1 if self.is_in(function) else 0


@pytest.fixture
def main():
    main = Main()
    before = {
        number: signal.signal(number, main.handle)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)
    }
    yield main
    for number, handler in before.items():
        signal.signal(number, handler)


class Witness:
    """A piece of work that ends when the main thread waits for that in leaving the block."""

    def __init__(self, main, *before):
        self._main = main
        self._before = before
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.is_gone = threading.Event()

    def __call__(self):
        self.begun.set()
        try:
            for step in self._before:
                step()
            self._main.stays_in(CommitPipeline.__exit__)
            self.ended.set()
        finally:
            self.is_gone.set()


def threads():
    names = ("fastvgg-writer", "fastvgg-committer")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    earlier = set(threads())  # of pipelines that other tests keep
    yield
    assert set(threads()) <= earlier


def nothing():
    return None


STAGES = ("write", "commit")


def submit(working, stage, work):
    """Give a piece that does something when it is written, or when it is committed."""
    if stage == "write":
        done = []
        working.submit(lambda: done.append(work()), lambda: done[0])
    else:
        working.submit(nothing, work)


# In order


@pytest.mark.parametrize("stage", STAGES)
def test_results_come_in_the_order_in_which_the_work_was_given(stage):
    with CommitPipeline() as working:
        for number in range(67):
            submit(working, stage, lambda number=number: number * number)
        assert list(working.drain(0)) == [number * number for number in range(67)]
        assert list(working.drain(0)) == []


def test_a_piece_is_committed_when_it_is_written_and_when_the_one_before_it_is_committed():
    told = []
    with CommitPipeline() as working:
        for name in "abcdefg":
            working.submit(
                lambda name=name: told.append((name, "written")),
                lambda name=name: told.append((name, "committed")),
            )
        list(working.drain(0))
    for stage in ("written", "committed"):
        assert [name for name, what in told if what == stage] == list("abcdefg")
    for name in "abcdefg":
        assert told.index((name, "written")) < told.index((name, "committed"))


def test_a_piece_is_written_while_those_before_it_wait_to_be_committed():
    go = threading.Event()
    written = []
    with CommitPipeline() as working:
        working.submit(nothing, lambda: come(go))
        working.submit(nothing, go.is_set)
        working.submit(lambda: written.append(go.is_set()), lambda: go.set() or written)
        working.submit(lambda: go.set(), nothing)
        assert list(working.drain(0)) == [None, True, [False], None]


def test_a_commit_is_begun_when_the_one_before_it_has_ended():
    told, go = [], threading.Event()

    def piece(name):
        told.append(f"{name} begins")
        come(go)
        told.append(f"{name} ends")

    with CommitPipeline() as working:
        for name in "abc":
            working.submit(nothing, lambda name=name: piece(name))
        go.set()
        assert list(working.drain(0)) == [None, None, None]
    assert told == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]


def test_each_stage_is_on_one_thread_that_is_not_the_callers():
    with CommitPipeline() as working:
        for stage in STAGES * 5:
            submit(working, stage, threading.get_ident)
        found = list(working.drain(0))
    assert set(found[::2]) == {found[0]}
    assert set(found[1::2]) == {found[1]}
    assert len({found[0], found[1], threading.get_ident()}) == 3


def test_giving_waits_until_what_was_given_before_is_written(main):
    written = []

    def write():
        main.stays_in(CommitPipeline.submit)
        written.append("first")

    with CommitPipeline() as working:
        working.submit(write, nothing)
        working.submit(nothing, nothing)
        main.has_left.set()
        assert written == ["first"]
        list(working.drain(0))


def test_giving_does_not_wait_until_anything_is_committed():
    go = threading.Event()
    with CommitPipeline() as working:
        for _ in range(5):
            working.submit(nothing, lambda: come(go))
        go.set()
        assert list(working.drain(0)) == [None] * 5


def test_no_more_is_waited_for_than_is_asked_for():
    go = threading.Event()
    with CommitPipeline() as working:
        working.submit(nothing, lambda: "first")
        working.submit(nothing, lambda: "second")
        working.submit(nothing, lambda: come(go))
        assert list(working.drain(3)) == []
        assert list(working.drain(1)) == ["first", "second"]
        go.set()
        assert list(working.drain(0)) == [None]


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_waited_for_before_the_next_result_is_asked_for(stage):
    go = threading.Event()
    with CommitPipeline() as working:
        submit(working, stage, lambda: come(go))
        results = working.drain(0)
        go.set()
        assert list(results) == [None]


@pytest.mark.parametrize("stage", STAGES)
def test_a_result_is_handed_over_while_the_next_piece_is_under_way(stage):
    go = threading.Event()
    with CommitPipeline() as working:
        working.submit(nothing, lambda: "first")
        submit(working, stage, lambda: come(go))
        results = working.drain(0)
        assert next(results) == "first"
        go.set()
        assert list(results) == [None]


# After an error


class Torn(BaseException):
    """An error that no Exception is."""


ERRORS = [OSError(5, "torn"), ValueError("wrong"), Torn("torn"), KeyboardInterrupt(), SystemExit(7)]


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_raised_by_whatever_comes_next_and_nothing_else_is_begun(error, stage):
    begun = []

    def fail():
        raise error

    def raised_by(call, *arguments):
        with pytest.raises(type(error)) as caught:
            call(*arguments)
        assert caught.value is error

    with CommitPipeline() as working:
        working.submit(nothing, lambda: "before")
        submit(working, stage, fail)
        results = working.drain(0)
        assert next(results) == "before"
        raised_by(next, results)
        for later in STAGES:
            raised_by(submit, working, later, lambda: begun.append("after it was known"))
        assert list(working.drain(0)) == []
    assert begun == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_after_an_error_what_was_given_meanwhile_is_not_committed(error):
    begun, go = [], threading.Event()

    def fail():
        come(go)
        raise error

    with CommitPipeline() as working:
        working.submit(nothing, fail)
        for _ in range(2):
            working.submit(nothing, lambda: begun.append("while it was under way"))
        go.set()
        for _ in range(3):
            with pytest.raises(type(error)) as caught:
                next(working.drain(0))
            assert caught.value is error
    assert begun == []


def test_giving_raises_the_error_of_what_was_given_before():
    with CommitPipeline() as working:
        working.submit(failing(OSError(5, "torn")), nothing)
        with pytest.raises(OSError, match="torn"):
            working.submit(nothing, nothing)


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_of_the_work_ends_the_block_that_waits_for_it(stage):
    begun = []

    def run():
        with CommitPipeline() as working:
            submit(working, stage, failing(OSError(5, "torn")))
            begun.extend(working.drain(0))

    with pytest.raises(OSError, match="torn"):
        run()
    assert begun == []


def test_what_is_not_written_is_not_committed():
    begun = []
    with CommitPipeline() as working:
        working.submit(failing(ValueError("wrong")), lambda: begun.append("committed"))
        with pytest.raises(ValueError, match="wrong"):
            next(working.drain(0))
    assert begun == []


# Leaving


def leave(main, witness, stage, error=None, wait=False, give_more=False, finishes=False):
    """Leave a block in which a piece of work is under way, and see whether it is the last."""
    begun = []
    try:
        with CommitPipeline() as working:
            later = functools.partial(begun.append, "later")
            if stage == "write":  # its own commit comes later
                working.submit(witness, later)
            else:
                working.submit(nothing, witness)
                working.submit(nothing, later)
            come(witness.begun)
            if give_more:
                working.submit(later, later)
            if wait:
                begun += working.drain(0)
            if error is not None:
                raise error
    finally:
        ended = witness.ended.is_set()
        main.has_left.set()
        come(witness.is_gone)  # before its signals have nobody who handles them
        assert ended, "the block was left under work"
        assert begun == ["later"] * finishes


@pytest.mark.parametrize("stage", STAGES)
def test_leaving_finishes_what_was_given(main, stage):
    leave(main, Witness(main), stage, finishes=True)


def test_leaving_waits_for_both_threads(main):
    writing = Witness(main)
    committing = Witness(main, lambda: come(writing.is_gone))
    try:
        with CommitPipeline() as working:
            working.submit(nothing, committing)
            working.submit(writing, nothing)
            come(writing.begun)
            come(committing.begun)
    finally:
        ended = writing.ended.is_set() and committing.ended.is_set()
        main.has_left.set()
        come(writing.is_gone)
        come(committing.is_gone)
        assert ended, "the block was left under work"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_leaving_by_an_error_finishes_what_was_given_and_by_an_interruption_what_is_under_way(
    main, error, stage
):
    with pytest.raises(type(error)) as caught:
        leave(main, Witness(main), stage, error, finishes=isinstance(error, Exception))
    assert caught.value is error


def test_what_was_written_before_a_write_that_fails_is_committed():
    go, committed = threading.Event(), []

    def fail():
        go.set()
        raise OSError(28, "no room")

    def run():
        with CommitPipeline() as working:
            working.submit(nothing, lambda: come(go))
            working.submit(nothing, lambda: committed.append("before"))
            working.submit(fail, lambda: committed.append("that"))
            working.submit(nothing, lambda: committed.append("later"))

    with pytest.raises(OSError, match="no room"):
        run()
    assert committed == ["before"]


def test_a_disk_that_fails_is_told_of_before_what_the_main_thread_fails_at_later():
    def run():
        with CommitPipeline() as working:
            working.submit(nothing, failing(OSError(5, "torn")))
            raise ValueError("wrong")

    with pytest.raises(OSError, match="torn") as caught:
        run()
    assert isinstance(caught.value.__context__, ValueError)


ENDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("number", "kind"), ENDS, ids=["interrupt", "exit"])
def test_a_signal_while_a_result_is_waited_for_leaves_when_the_piece_under_way_has_ended(
    main, number, kind, stage
):
    def interrupt():
        main.stays_in(CommitPipeline.drain)
        assert main.is_in(CommitPipeline.drain, number)

    with pytest.raises(kind):
        leave(main, Witness(main, interrupt), stage, wait=True)


@pytest.mark.parametrize(("number", "kind"), ENDS, ids=["interrupt", "exit"])
def test_a_signal_while_a_piece_is_given_leaves_when_the_one_under_way_has_ended(
    main, number, kind
):
    def interrupt():
        main.stays_in(concurrent.futures.wait)  # and not in starting a thread
        assert main.is_in(CommitPipeline.submit, number)

    with pytest.raises(kind):
        leave(main, Witness(main, interrupt), "write", give_more=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [None, ValueError("wrong")], ids=["well", "by an error"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("number", "kind"), ENDS, ids=["interrupt", "exit"])
def test_a_signal_while_the_block_is_left_is_raised_when_the_piece_under_way_has_ended(
    main, number, kind, count, error, stage
):
    def interrupt():
        main.stays_in(CommitPipeline.__exit__)
        assert main.is_in(CommitPipeline.__exit__, number)

    with pytest.raises(kind) as caught:
        leave(main, Witness(main, *[interrupt] * count), stage, error)
    # Whoever looks at the signal still finds the error.
    found = caught.value
    while found is not None and found is not error:
        found = found.__context__
    assert found is error


@pytest.mark.parametrize("stage", STAGES)
def test_results_that_nobody_waited_for_do_not_keep_the_block(stage):
    with CommitPipeline() as working:
        for number in range(5):
            submit(working, stage, lambda number=number: number)


def test_without_work_there_is_no_thread():
    earlier = threads()
    with CommitPipeline() as working:
        assert list(working.drain(0)) == []
        assert threads() == earlier
