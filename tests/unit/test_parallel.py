"""parallel_for and TaskQueue: items run once, errors reach the caller, calls may be concurrent."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

import fastvgg.parallel
from fastvgg.errors import UsageError
from fastvgg.parallel import (
    TaskQueue,
    ThreadSlot,
    available_cpus,
    check_threads,
    parallel_for,
    try_submit,
)
from tests.helpers.batches import run_script

ITEMS = [f"item {number}" for number in range(37)]


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 2, 37])
def test_every_item_runs_once(threads, count):
    done = []
    parallel_for(ITEMS[:count], done.append, threads)
    assert sorted(done) == sorted(ITEMS[:count])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_parallel_for_reraises_an_error_and_remains_usable(threads):
    def fail_in_the_middle(item):
        if item == ITEMS[20]:
            raise MemoryError("no memory to gather this item in")

    with pytest.raises(MemoryError, match="gather this item"):
        parallel_for(ITEMS, fail_in_the_middle, threads)
    done = []
    parallel_for(ITEMS, done.append, threads)
    assert sorted(done) == sorted(ITEMS)


def test_error_stops_remaining_items():
    done = []

    def fail_at_once(item):
        done.append(item)
        raise MemoryError("no memory to gather this item in")

    with pytest.raises(MemoryError, match="gather this item"):
        parallel_for(ITEMS, fail_at_once, threads=3)
    assert 1 <= len(done) <= 3


def test_error_on_a_worker_thread_reaches_the_caller():
    caller, failed = threading.current_thread(), threading.Event()

    def fail_elsewhere(_item):
        if threading.current_thread() is caller:
            assert failed.wait(60)  # the other thread has an item and is about to fail
        else:
            failed.set()
            raise MemoryError("no memory to gather this item in")

    with pytest.raises(MemoryError, match="gather this item"):
        parallel_for(ITEMS, fail_elsewhere, threads=2)


def test_error_on_a_worker_thread_stops_the_caller():
    caller, failed, done = threading.current_thread(), threading.Event(), []

    def fail_elsewhere(item):
        if threading.current_thread() is caller:
            assert failed.wait(60)
            done.append(item)
        else:
            failed.set()
            raise MemoryError("no memory to gather this item in")

    many = range(1_000_000)  # more than the caller can do before the other thread has failed
    with pytest.raises(MemoryError, match="gather this item"):
        parallel_for(many, fail_elsewhere, threads=2)
    assert len(done) < len(many) // 2


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_parallel_for_runs_on_the_requested_number_of_threads(threads):
    barrier, workers = threading.Barrier(threads), set()

    def wait_for_the_others(_item):
        workers.add(threading.current_thread())
        barrier.wait(60)

    parallel_for(range(threads), wait_for_the_others, threads)
    assert len(workers) == threads
    assert threading.current_thread() in workers


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_parallel_for_uses_at_most_the_requested_threads(monkeypatch, threads):
    helpers, done = [], []

    class Recording(ThreadPoolExecutor):
        def submit(self, *work):
            helpers.append(work)
            return super().submit(*work)

    with Recording(max_workers=32) as pool:
        monkeypatch.setattr(fastvgg.parallel, "_pool", lambda: pool)
        parallel_for(ITEMS, done.append, threads)
    assert len(helpers) == threads - 1
    assert sorted(done) == sorted(ITEMS)


def test_single_item_or_thread_runs_on_the_caller():
    workers = []
    parallel_for([1], lambda _: workers.append(threading.current_thread()), threads=7)
    parallel_for(ITEMS, lambda _: workers.append(threading.current_thread()), threads=1)
    assert set(workers) == {threading.current_thread()}


def test_parallel_for_supports_concurrent_and_nested_calls():
    def sums(first):
        found = []
        parallel_for(range(first, first + 40), found.append, threads=5)
        return sum(found)

    with ThreadPoolExecutor(max_workers=40) as callers:
        results = list(callers.map(sums, range(200)))
    assert results == [sum(range(first, first + 40)) for first in range(200)]
    nested = []
    parallel_for(range(60), lambda first: nested.append(sums(first)), threads=50)
    assert sorted(nested) == [sum(range(first, first + 40)) for first in range(60)]


FORK = """
import os, signal
from fastvgg import parallel

def done():
    found = []
    parallel.parallel_for(range(100), found.append, threads=4)
    return sorted(found) == list(range(100))

assert done()
parents = parallel._pool()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for a thread that it does not have would wait forever
    code = 1
    try:
        code = 0 if done() and parallel._pool() is not parents else 2
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert done()
assert parallel._pool() is parents
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_forked_child_creates_its_own_thread_pool():
    run_script(FORK)


def test_available_cpus_respects_the_affinity_mask():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        one = min(os.sched_getaffinity(0))
        run_script(
            "import os\n"
            f"os.sched_setaffinity(0, [{one}])\n"
            "from fastvgg.parallel import check_threads, available_cpus\n"
            "assert available_cpus() == check_threads(None) == 1\n"
        )


def test_available_cpus_without_affinity_is_the_cpu_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert available_cpus() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1


def test_check_threads_returns_valid_counts_unchanged():
    assert check_threads(3) == 3
    assert check_threads(1) == 1
    assert check_threads(None) == available_cpus()


@pytest.mark.parametrize("threads", [True, 1.5, "2", 0, -1])
def test_threads_must_be_an_integer_of_at_least_one(threads):
    with pytest.raises(UsageError, match="integer") as caught:
        check_threads(threads)
    assert repr(threads) in caught.value.problem


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 40])
def test_every_item_of_every_group_runs_once(threads):
    done = []
    with TaskQueue(threads) as tasks:
        sizes = [1, 37, 0, 2, 19, 5]
        started = [
            tasks.submit([(group, item) for item in range(size)], done.append)
            for group, size in enumerate(sizes)
        ]
        for group in started:
            group.wait()
            assert group.is_done()
        expected = [(group, item) for group, size in enumerate(sizes) for item in range(size)]
        assert sorted(done) == expected


def test_items_and_groups_start_in_order():
    order = []
    with TaskQueue(1) as tasks:
        started = [
            tasks.submit(range(10 * group, 10 * group + 7), order.append) for group in range(5)
        ]
        started[-1].wait()  # and thus for all earlier groups
    assert order == [10 * group + item for group in range(5) for item in range(7)]


def test_items_of_a_later_group_start_after_those_of_earlier_ones():
    started, counted = [], itertools.count()

    def take(item):
        started.append((next(counted), item))

    with TaskQueue(3) as tasks:
        made = [tasks.submit([group] * 50, take) for group in range(4)]
        for group in made:
            group.wait()
    # A thread takes an item before it records it, so items of other threads may come between.
    late = [item for _, item in sorted(started)]
    for group in range(4):
        assert late.index(group) >= 50 * group - 3


def test_no_thread_waits_for_the_slowest_item_of_a_group():
    reached, order = threading.Event(), []

    def slow(item):
        if item == 0:
            assert reached.wait(60)  # until the other thread is in the next group
        order.append(item)

    def next_group(item):
        order.append(item)
        reached.set()

    with TaskQueue(2) as tasks:
        first, second = tasks.submit(range(3), slow), tasks.submit([10], next_group)
        second.wait()
        first.wait()
    assert order.index(10) < order.index(0)
    assert sorted(order) == [0, 1, 2, 10]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_task_group_runs_on_all_threads(threads):
    barrier, workers = threading.Barrier(threads), set()

    def meet(_item):
        workers.add(threading.current_thread())
        barrier.wait(60)

    with TaskQueue(threads) as tasks:
        tasks.submit(range(threads), meet).wait()
        tasks.submit(range(threads), meet).wait()
    assert len(workers) == threads
    assert threading.current_thread() not in workers


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_task_queue_uses_at_most_its_threads(threads):
    workers = set()
    with TaskQueue(threads) as tasks:
        started = [
            tasks.submit(range(20), lambda _: workers.add(threading.current_thread()))
            for _ in range(20)
        ]
        for group in started:
            group.wait()
    assert 1 <= len(workers) <= threads


def test_group_error_stops_the_group_and_is_raised_by_wait():
    done = []

    def fail_in_the_middle(item):
        if item == ITEMS[20]:
            raise MemoryError("no memory to decode this image in")
        done.append(item)

    with TaskQueue(1) as tasks:
        first = tasks.submit(ITEMS, fail_in_the_middle)
        second = tasks.submit(range(5), done.append)
        for _ in range(2):
            with pytest.raises(MemoryError, match="decode this image"):
                first.wait()
        assert first.is_done()
        second.wait()
    assert done == [*ITEMS[:20], *range(5)]


def test_group_error_stops_all_threads():
    failed, done = threading.Event(), []
    many = range(1_000_000)  # more than one thread can do before the other one has failed

    def fail_at_first(item):
        if item == 0:
            failed.set()
            raise MemoryError("no memory to decode this image in")
        assert failed.wait(60)
        done.append(item)

    with TaskQueue(2) as tasks, pytest.raises(MemoryError, match="decode this image"):
        tasks.submit(many, fail_at_first).wait()
    assert len(done) < len(many) // 2


class BodyError(Exception):
    pass


@pytest.mark.parametrize("error", [None, BodyError], ids=["normally", "with an error"])
def test_context_exit_cancels_queued_items_and_waits_for_running_items(error):
    started, ended = [], []
    both_running = threading.Barrier(3)

    def take(item):
        started.append(item)
        both_running.wait(60)
        for _ in range(1_000_000):
            if not group._remaining:  # the group was canceled
                break
            os.sched_yield()
        ended.append(item)

    left = pytest.raises(BodyError) if error else contextlib.nullcontext()
    with left, TaskQueue(2) as tasks:
        group = tasks.submit(range(100), take)
        later = tasks.submit(range(100, 200), started.append)
        both_running.wait(60)
        if error:
            raise error
    assert sorted(started) == sorted(ended) == [0, 1]
    assert not later._remaining


def test_finished_groups_are_released():
    with TaskQueue(2) as tasks:
        for _ in range(50):
            tasks.submit(range(3), str).wait()
            tasks.submit([], str).wait()
        assert len(tasks._groups) <= 3


def test_submit_fails_after_the_context_exits():
    with TaskQueue(2) as tasks:
        pass
    with pytest.raises(RuntimeError):
        tasks.submit([1], str)


# At the limit of threads of a user or a container


@pytest.fixture
def allow_threads(monkeypatch):
    """Return a function that lets only so many more threads start, as a limit of processes does."""
    start = threading.Thread.start

    def allow(count):
        left = iter(range(count))

        def start_if_allowed(thread):
            if next(left, None) is None:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_if_allowed)

    return allow


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_parallel_for_does_all_items_with_the_threads_that_start(allow_threads, allowed):
    fastvgg.parallel._pool.cache_clear()
    allow_threads(allowed)
    done = []
    parallel_for(range(50), done.append, 4)
    assert sorted(done) == list(range(50))
    with pytest.raises(ZeroDivisionError):
        parallel_for(range(50), lambda item: 1 // (item - 20), 4)
    fastvgg.parallel._pool.cache_clear()


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_task_queue_does_all_items_with_the_threads_that_start(allow_threads, allowed):
    allow_threads(allowed)
    done = []
    with TaskQueue(4) as tasks:
        groups = [tasks.submit(range(20), done.append) for _ in range(3)]
        for group in groups:
            group.wait()
            assert group.is_done()
        assert sorted(done) == sorted(3 * list(range(20)))
        with pytest.raises(ZeroDivisionError):
            tasks.submit(range(20), lambda item: 1 // (item - 7)).wait()
        tasks.submit(range(5), done.append)  # never awaited
    assert len(done) <= 65


def test_call_that_no_thread_can_take_is_not_made_later(allow_threads):
    allow_threads(1)
    calls, blocked = [], threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = try_submit(pool, blocked.wait)
        assert try_submit(pool, calls.append, 1) is None
        blocked.set()
        assert first.result()
        assert try_submit(pool, calls.append, 2).result() is None
    assert calls == [2]


def test_call_that_a_pool_cancels_at_shutdown_is_cancelled_for_those_who_wait():
    pool, begun, blocked = ThreadPoolExecutor(1), threading.Event(), threading.Event()

    def block():
        begun.set()
        blocked.wait()

    try_submit(pool, block)
    begun.wait()
    queued = try_submit(pool, list)
    pool.shutdown(wait=False, cancel_futures=True)
    blocked.set()
    with pytest.raises(CancelledError):
        queued.result(timeout=60)


def test_thread_slots_are_never_more_than_the_memory_for_them():
    slot = ThreadSlot(2)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        assert [slot(), first.submit(slot).result(), slot()] == [0, 1, 0]
        with pytest.raises(RuntimeError, match="more than 2 threads"):
            second.submit(slot).result()
        assert first.submit(slot).result() == 1
