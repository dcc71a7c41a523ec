"""The commit pipeline: order, errors, signals, and no thread left running.

Work that must still be running waits for an event, or until signals show that the main thread is
blocked. No test depends on a delay.
"""

from __future__ import annotations

import concurrent.futures
import functools
import signal
import threading

import pytest

from fastvgg.stream.commit_pipeline import CommitPipeline

LIMIT_SECONDS = 60  # ends a test that hangs; not a performance limit


def wait_for(event):
    """Wait until something has happened."""
    assert event.wait(LIMIT_SECONDS), "timed out waiting for an event"


class MainThread:
    """The main thread, observed from another thread by signals."""

    def __init__(self):
        self.has_exited = threading.Event()
        self._handled = threading.Semaphore(0)
        self._codes = set()

    def handle(self, number, frame):
        """Record the main thread's stack, and raise for SIGINT and SIGTERM."""
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

    def signal_and_check(self, function, number=signal.SIGUSR1):
        """Send a signal; return whether the main thread was inside `function`."""
        signal.pthread_kill(threading.main_thread().ident, number)
        # A signal just before the main thread blocks is handled only after the next signal.
        while not self._handled.acquire(timeout=0.01):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
        return function.__code__ in self._codes

    def wait_until_blocked_in(self, function):
        """Wait until the main thread is blocked inside a function.

        Five consecutive signals, each of which lets the thread continue, must find it there.
        """
        found = 0
        while found < 5:
            assert not self.has_exited.is_set(), "the block was left under work"
            found = found + 1 if self.signal_and_check(function) else 0


@pytest.fixture
def main():
    main = MainThread()
    before = {
        number: signal.signal(number, main.handle)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)
    }
    yield main
    for number, handler in before.items():
        signal.signal(number, handler)


class ExitWitness:
    """A work item that ends once the main thread waits for it in `__exit__`."""

    def __init__(self, main, *before):
        self._main = main
        self._before = before
        self.started = threading.Event()
        self.ended = threading.Event()
        self.finished = threading.Event()

    def __call__(self):
        self.started.set()
        try:
            for step in self._before:
                step()
            self._main.wait_until_blocked_in(CommitPipeline.__exit__)
            self.ended.set()
        finally:
            self.finished.set()


def pipeline_threads():
    names = ("fastvgg-writer", "fastvgg-committer")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.fixture(autouse=True)
def no_thread_is_left_running():
    earlier = set(pipeline_threads())  # of pipelines that other tests keep
    yield
    assert set(pipeline_threads()) <= earlier


def noop():
    return None


STAGES = ("write", "commit")


def submit(pipeline, stage, work):
    """Submit an item whose write or commit stage calls `work`."""
    if stage == "write":
        done = []
        pipeline.submit(lambda: done.append(work()), lambda: done[0])
    else:
        pipeline.submit(noop, work)


# In order


@pytest.mark.parametrize("stage", STAGES)
def test_results_are_in_submission_order(stage):
    with CommitPipeline() as pipeline:
        for number in range(67):
            submit(pipeline, stage, lambda number=number: number * number)
        assert list(pipeline.drain(0)) == [number * number for number in range(67)]
        assert list(pipeline.drain(0)) == []


def test_item_is_committed_after_its_write_and_after_the_previous_commit():
    events = []
    with CommitPipeline() as pipeline:
        for name in "abcdefg":
            pipeline.submit(
                lambda name=name: events.append((name, "written")),
                lambda name=name: events.append((name, "committed")),
            )
        list(pipeline.drain(0))
    for stage in ("written", "committed"):
        assert [name for name, what in events if what == stage] == list("abcdefg")
    for name in "abcdefg":
        assert events.index((name, "written")) < events.index((name, "committed"))


def test_writes_continue_while_earlier_commits_are_pending():
    release = threading.Event()
    written = []
    with CommitPipeline() as pipeline:
        pipeline.submit(noop, lambda: wait_for(release))
        pipeline.submit(noop, release.is_set)
        pipeline.submit(lambda: written.append(release.is_set()), lambda: release.set() or written)
        pipeline.submit(lambda: release.set(), noop)
        assert list(pipeline.drain(0)) == [None, True, [False], None]


def test_commits_do_not_overlap():
    events, release = [], threading.Event()

    def record_chunk(name):
        events.append(f"{name} begins")
        wait_for(release)
        events.append(f"{name} ends")

    with CommitPipeline() as pipeline:
        for name in "abc":
            pipeline.submit(noop, lambda name=name: record_chunk(name))
        release.set()
        assert list(pipeline.drain(0)) == [None, None, None]
    assert events == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]


def test_each_stage_runs_on_its_own_thread():
    with CommitPipeline() as pipeline:
        for stage in STAGES * 5:
            submit(pipeline, stage, threading.get_ident)
        found = list(pipeline.drain(0))
    assert set(found[::2]) == {found[0]}
    assert set(found[1::2]) == {found[1]}
    assert len({found[0], found[1], threading.get_ident()}) == 3


def test_submit_waits_for_earlier_writes(main):
    written = []

    def write():
        main.wait_until_blocked_in(CommitPipeline.submit)
        written.append("first")

    with CommitPipeline() as pipeline:
        pipeline.submit(write, noop)
        pipeline.submit(noop, noop)
        main.has_exited.set()
        assert written == ["first"]
        list(pipeline.drain(0))


def test_submit_does_not_wait_for_commits():
    release = threading.Event()
    with CommitPipeline() as pipeline:
        for _ in range(5):
            pipeline.submit(noop, lambda: wait_for(release))
        release.set()
        assert list(pipeline.drain(0)) == [None] * 5


def test_drain_waits_only_until_max_pending():
    release = threading.Event()
    with CommitPipeline() as pipeline:
        pipeline.submit(noop, lambda: "first")
        pipeline.submit(noop, lambda: "second")
        pipeline.submit(noop, lambda: wait_for(release))
        assert list(pipeline.drain(3)) == []
        assert list(pipeline.drain(1)) == ["first", "second"]
        release.set()
        assert list(pipeline.drain(0)) == [None]


@pytest.mark.parametrize("stage", STAGES)
def test_drain_does_not_wait_before_the_next_result_is_requested(stage):
    release = threading.Event()
    with CommitPipeline() as pipeline:
        submit(pipeline, stage, lambda: wait_for(release))
        results = pipeline.drain(0)
        release.set()
        assert list(results) == [None]


@pytest.mark.parametrize("stage", STAGES)
def test_drain_yields_a_result_while_the_next_item_is_running(stage):
    release = threading.Event()
    with CommitPipeline() as pipeline:
        pipeline.submit(noop, lambda: "first")
        submit(pipeline, stage, lambda: wait_for(release))
        results = pipeline.drain(0)
        assert next(results) == "first"
        release.set()
        assert list(results) == [None]


# After an error


class NonException(BaseException):
    """An error that is not an Exception."""


ERRORS = [
    OSError(5, "torn"),
    ValueError("wrong"),
    NonException("torn"),
    KeyboardInterrupt(),
    SystemExit(7),
]


def raising(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_is_raised_by_the_next_call_and_stops_later_work(error, stage):
    started = []

    def fail():
        raise error

    def assert_raised_by(call, *arguments):
        with pytest.raises(type(error)) as caught:
            call(*arguments)
        assert caught.value is error

    with CommitPipeline() as pipeline:
        pipeline.submit(noop, lambda: "before")
        submit(pipeline, stage, fail)
        results = pipeline.drain(0)
        assert next(results) == "before"
        assert_raised_by(next, results)
        for later in STAGES:
            assert_raised_by(submit, pipeline, later, lambda: started.append("after it was known"))
        assert list(pipeline.drain(0)) == []
    assert started == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_items_submitted_before_an_error_is_raised_are_not_committed(error):
    started, release = [], threading.Event()

    def fail():
        wait_for(release)
        raise error

    with CommitPipeline() as pipeline:
        pipeline.submit(noop, fail)
        for _ in range(2):
            pipeline.submit(noop, lambda: started.append("while it was under way"))
        release.set()
        for _ in range(3):
            with pytest.raises(type(error)) as caught:
                next(pipeline.drain(0))
            assert caught.value is error
    assert started == []


def test_submit_raises_the_error_of_an_earlier_write():
    with CommitPipeline() as pipeline:
        pipeline.submit(raising(OSError(5, "torn")), noop)
        with pytest.raises(OSError, match="torn"):
            pipeline.submit(noop, noop)


@pytest.mark.parametrize("stage", STAGES)
def test_drain_raises_the_error_of_a_work_item(stage):
    started = []

    def run():
        with CommitPipeline() as pipeline:
            submit(pipeline, stage, raising(OSError(5, "torn")))
            started.extend(pipeline.drain(0))

    with pytest.raises(OSError, match="torn"):
        run()
    assert started == []


def test_failed_write_is_not_committed():
    started = []
    with CommitPipeline() as pipeline:
        pipeline.submit(raising(ValueError("wrong")), lambda: started.append("committed"))
        with pytest.raises(ValueError, match="wrong"):
            next(pipeline.drain(0))
    assert started == []


# Leaving


def exit_while_running(
    main, witness, stage, error=None, wait=False, submit_more=False, is_finished=False
):
    """Exit the context while an item is running, and check which later work was done."""
    started = []
    try:
        with CommitPipeline() as pipeline:
            later = functools.partial(started.append, "later")
            if stage == "write":  # its own commit comes later
                pipeline.submit(witness, later)
            else:
                pipeline.submit(noop, witness)
                pipeline.submit(noop, later)
            wait_for(witness.started)
            if submit_more:
                pipeline.submit(later, later)
            if wait:
                started += pipeline.drain(0)
            if error is not None:
                raise error
    finally:
        ended = witness.ended.is_set()
        main.has_exited.set()
        wait_for(witness.finished)  # before the signal handlers are restored
        assert ended, "the block was left under work"
        assert started == ["later"] * is_finished


@pytest.mark.parametrize("stage", STAGES)
def test_exit_finishes_submitted_work(main, stage):
    exit_while_running(main, ExitWitness(main), stage, is_finished=True)


def test_exit_waits_for_both_threads(main):
    writing = ExitWitness(main)
    committing = ExitWitness(main, lambda: wait_for(writing.finished))
    try:
        with CommitPipeline() as pipeline:
            pipeline.submit(noop, committing)
            pipeline.submit(writing, noop)
            wait_for(writing.started)
            wait_for(committing.started)
    finally:
        ended = writing.ended.is_set() and committing.ended.is_set()
        main.has_exited.set()
        wait_for(writing.finished)
        wait_for(committing.finished)
        assert ended, "the block was left under work"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_exit_on_error_finishes_all_work_and_on_interrupt_only_running_work(main, error, stage):
    with pytest.raises(type(error)) as caught:
        exit_while_running(
            main, ExitWitness(main), stage, error, is_finished=isinstance(error, Exception)
        )
    assert caught.value is error


def test_writes_completed_before_a_failed_write_are_committed():
    release, committed = threading.Event(), []

    def fail():
        release.set()
        raise OSError(28, "no room")

    def run():
        with CommitPipeline() as pipeline:
            pipeline.submit(noop, lambda: wait_for(release))
            pipeline.submit(noop, lambda: committed.append("before"))
            pipeline.submit(fail, lambda: committed.append("that"))
            pipeline.submit(noop, lambda: committed.append("later"))

    with pytest.raises(OSError, match="no room"):
        run()
    assert committed == ["before"]


def test_worker_error_takes_precedence_over_a_later_error_in_the_body():
    def run():
        with CommitPipeline() as pipeline:
            pipeline.submit(noop, raising(OSError(5, "torn")))
            raise ValueError("wrong")

    with pytest.raises(OSError, match="torn") as caught:
        run()
    assert isinstance(caught.value.__context__, ValueError)


EXIT_SIGNALS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("number", "kind"), EXIT_SIGNALS, ids=["interrupt", "exit"])
def test_signal_during_drain_exits_after_the_running_item(main, number, kind, stage):
    def interrupt():
        main.wait_until_blocked_in(CommitPipeline.drain)
        assert main.signal_and_check(CommitPipeline.drain, number)

    with pytest.raises(kind):
        exit_while_running(main, ExitWitness(main, interrupt), stage, wait=True)


@pytest.mark.parametrize(("number", "kind"), EXIT_SIGNALS, ids=["interrupt", "exit"])
def test_signal_during_submit_exits_after_the_running_item(main, number, kind):
    def interrupt():
        main.wait_until_blocked_in(concurrent.futures.wait)  # and not in starting a thread
        assert main.signal_and_check(CommitPipeline.submit, number)

    with pytest.raises(kind):
        exit_while_running(main, ExitWitness(main, interrupt), "write", submit_more=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [None, ValueError("wrong")], ids=["well", "by an error"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("number", "kind"), EXIT_SIGNALS, ids=["interrupt", "exit"])
def test_signal_during_exit_is_raised_after_the_running_item(
    main, number, kind, count, error, stage
):
    def interrupt():
        main.wait_until_blocked_in(CommitPipeline.__exit__)
        assert main.signal_and_check(CommitPipeline.__exit__, number)

    with pytest.raises(kind) as caught:
        exit_while_running(main, ExitWitness(main, *[interrupt] * count), stage, error)
    # The error is in the context chain of the signal's exception.
    found = caught.value
    while found is not None and found is not error:
        found = found.__context__
    assert found is error


@pytest.mark.parametrize("stage", STAGES)
def test_undrained_results_do_not_block_exit(stage):
    with CommitPipeline() as pipeline:
        for number in range(5):
            submit(pipeline, stage, lambda number=number: number)


def test_no_thread_starts_without_work():
    earlier = pipeline_threads()
    with CommitPipeline() as pipeline:
        assert list(pipeline.drain(0)) == []
        assert pipeline_threads() == earlier


@pytest.mark.parametrize("allowed", [0, 1])
def test_items_are_committed_in_order_without_threads(monkeypatch, allowed):
    start, left = threading.Thread.start, iter(range(allowed))

    def start_if_allowed(thread):
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_allowed)
    steps = []
    with CommitPipeline() as pipeline:
        for item in range(5):
            pipeline.submit(lambda item=item: steps.append(("write", item)), lambda item=item: item)
            list(pipeline.drain(max_pending=2))
        assert list(pipeline.drain(max_pending=0)) == [3, 4]
    assert steps == [("write", item) for item in range(5)]
    with CommitPipeline() as pipeline:
        pipeline.submit(lambda: 1 // 0, lambda: steps.append("committed"))
        with pytest.raises(ZeroDivisionError):
            pipeline.submit(lambda: steps.append("later"), lambda: None)
    assert len(steps) == 5
