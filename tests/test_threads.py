"""Work shared between threads: every piece once, errors to the caller, any number of callers."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from batches import run_script

import fastvgg.threads
from fastvgg.errors import UsageError
from fastvgg.threads import check_threads, usable_cores, work_on_all

PIECES = [f"piece {number}" for number in range(37)]


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 2, 37])
def test_every_piece_is_worked_on_once(threads, count):
    done = []
    work_on_all(PIECES[:count], done.append, threads)
    assert sorted(done) == sorted(PIECES[:count])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_error_in_a_piece_reaches_the_caller_and_the_next_call_works(threads):
    def fail_in_the_middle(piece):
        if piece == PIECES[20]:
            raise MemoryError("no memory to gather this piece in")

    with pytest.raises(MemoryError, match="gather this piece"):
        work_on_all(PIECES, fail_in_the_middle, threads)
    done = []
    work_on_all(PIECES, done.append, threads)
    assert sorted(done) == sorted(PIECES)


def test_an_error_ends_the_work():
    done = []

    def fail_at_once(piece):
        done.append(piece)
        raise MemoryError("no memory to gather this piece in")

    with pytest.raises(MemoryError, match="gather this piece"):
        work_on_all(PIECES, fail_at_once, threads=3)
    assert 1 <= len(done) <= 3


def test_an_error_on_another_thread_reaches_the_caller():
    caller, failed = threading.current_thread(), threading.Event()

    def fail_elsewhere(_piece):
        if threading.current_thread() is caller:
            assert failed.wait(60)  # the other thread has a piece, and needs the time to fail
        else:
            failed.set()
            raise MemoryError("no memory to gather this piece in")

    with pytest.raises(MemoryError, match="gather this piece"):
        work_on_all(PIECES, fail_elsewhere, threads=2)


def test_an_error_on_another_thread_ends_the_work_of_the_caller():
    caller, failed, done = threading.current_thread(), threading.Event(), []

    def fail_elsewhere(piece):
        if threading.current_thread() is caller:
            assert failed.wait(60)
            done.append(piece)
        else:
            failed.set()
            raise MemoryError("no memory to gather this piece in")

    many = range(1_000_000)  # more than the caller can do before the other thread has failed
    with pytest.raises(MemoryError, match="gather this piece"):
        work_on_all(many, fail_elsewhere, threads=2)
    assert len(done) < len(many) // 2


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_as_many_threads_as_asked_for_work_at_the_same_time(threads):
    met, workers = threading.Barrier(threads), set()

    def wait_for_the_others(_piece):
        workers.add(threading.current_thread())
        met.wait(60)

    work_on_all(range(threads), wait_for_the_others, threads)
    assert len(workers) == threads
    assert threading.current_thread() in workers


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_no_more_threads_work_than_were_asked_for(monkeypatch, threads):
    helpers, done = [], []

    class Recording(ThreadPoolExecutor):
        def submit(self, *work):
            helpers.append(work)
            return super().submit(*work)

    with Recording(max_workers=32) as pool:
        monkeypatch.setattr(fastvgg.threads, "_pool", lambda: pool)
        work_on_all(PIECES, done.append, threads)
    assert len(helpers) == threads - 1
    assert sorted(done) == sorted(PIECES)


def test_one_piece_or_one_thread_stays_with_the_caller():
    workers = []
    work_on_all([1], lambda _: workers.append(threading.current_thread()), threads=7)
    work_on_all(PIECES, lambda _: workers.append(threading.current_thread()), threads=1)
    assert set(workers) == {threading.current_thread()}


def test_many_threads_may_share_work_at_once_and_from_within():
    def sums(first):
        found = []
        work_on_all(range(first, first + 40), found.append, threads=5)
        return sum(found)

    with ThreadPoolExecutor(max_workers=40) as callers:
        results = list(callers.map(sums, range(200)))
    assert results == [sum(range(first, first + 40)) for first in range(200)]
    nested = []
    work_on_all(range(60), lambda first: nested.append(sums(first)), threads=50)
    assert sorted(nested) == [sum(range(first, first + 40)) for first in range(60)]


FORK = """
import os, signal
from fastvgg import threads

def done():
    found = []
    threads.work_on_all(range(100), found.append, threads=4)
    return sorted(found) == list(range(100))

assert done()
parents = threads._pool()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for a thread that it does not have would wait forever
    code = 1
    try:
        code = 0 if done() and threads._pool() is not parents else 2
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert done()
assert threads._pool() is parents
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_has_threads_of_its_own():
    run_script(FORK)


def test_the_usable_cores_are_those_that_the_process_may_run_on():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        one = min(os.sched_getaffinity(0))
        run_script(
            "import os\n"
            f"os.sched_setaffinity(0, [{one}])\n"
            "from fastvgg.threads import check_threads, usable_cores\n"
            "assert usable_cores() == check_threads(None) == 1\n"
        )


def test_a_system_without_affinity_counts_all_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_a_number_of_threads_is_taken_as_it_is():
    assert check_threads(3) == 3
    assert check_threads(1) == 1
    assert check_threads(None) == usable_cores()


@pytest.mark.parametrize("threads", [True, 1.5, "2", 0, -1])
def test_threads_are_a_whole_number_of_at_least_one(threads):
    with pytest.raises(UsageError, match="whole number") as caught:
        check_threads(threads)
    assert repr(threads) in caught.value.problem
