"""The same plan on a Dask cluster: some chunks are a task, and this process commits what is done.

Dask may have a task done twice, or again, by workers that die or come back: `fastvgg.stream.worker`
says why that is harmless. What is committed, and published at the end, is decided here alone, so
that a run that is cut off goes on wherever the same command is given, with a cluster or without.

Needs ``pip install 'fastvgg[dask]'``, here and on every worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pickle
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from distributed import Client, KilledWorker, LocalCluster, as_completed
from distributed.comm import CommClosedError

from fastvgg.datasets.base import SharedTarget
from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.errors import ClusterError, FastvggError, StoppedError, UsageError
from fastvgg.parallel import available_cpus
from fastvgg.stream import run as here
from fastvgg.stream.manifest import package_versions
from fastvgg.stream.plan import format_bytes
from fastvgg.stream.planner import reopen_source
from fastvgg.stream.worker import Task, close_run, join, run_task, stored_checksums

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from distributed import Future, Worker

    from fastvgg.storage.local import Storage
    from fastvgg.stream.compute import ChunkTask
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress, Report
    from fastvgg.stream.worker import ChunkCommit

__all__ = ["connect", "run"]

LOCAL: Final = "local"
ANSWER_SECONDS: Final = 10
JOIN_SECONDS: Final = 60
# Results that come within so short a time are fetched and committed together: one by one they take
# a third more of the scheduler's time.
GATHERING_SECONDS: Final = 0.05
MIN_IN_FLIGHT: Final = 1024  # tasks, which take some kB each
IN_FLIGHT_PER_THREAD: Final = 8
# Chunks of a task, where there are many: each is written while the next is computed, and what Dask
# takes for a task is shared by all.
MAX_CHUNKS_PER_TASK: Final = 8
TASKS_PER_THREAD: Final = 16  # at least, so that the last ones are soon done


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    """Connect to a scheduler; "local" starts a worker for each core of this machine.

    Raises
    ------
    ClusterError
        If nothing answers there.
    """
    with contextlib.ExitStack() as opened:
        if address == LOCAL:
            workers = {"n_workers": available_cpus(), "threads_per_worker": 1}
            address = opened.enter_context(LocalCluster(**workers)).scheduler_address
        try:
            client = opened.enter_context(
                Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
            )
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no scheduler answers at {address}: {error}",
                "start one with 'dask scheduler', and give the address that it prints; or give "
                "--dask local",
            ) from None
        yield client


def run(
    plan: Plan,
    client: Client,
    progress: Callable[[Progress], None] | None = None,
    storage: Storage | None = None,
) -> Report:
    """Carry a plan out on a cluster, or take it up where an earlier run was cut off.

    Each task has one thread, and as much memory as the plan has in all.

    Parameters
    ----------
    plan
        From `fastvgg.plan`. Every worker has to reach its source and its target by the same paths.
    client
        Connected to the cluster.
    progress, storage
        As for `fastvgg.stream.run.run`.

    Raises
    ------
    UsageError, ClusterError, SourceError, TargetError, ResumeError
        Before anything is written.
    StoppedError
        If a task fails later on; what is committed is kept.
    """
    _check_shareable(plan)
    plan = dataclasses.replace(plan, threads=1)
    _check_workers(plan, client)
    return here.run(plan, progress, storage, functools.partial(_ClusterRun, client))


def _check_shareable(plan: Plan) -> None:
    """Refuse what a task that runs twice would do wrong."""
    if plan.in_place:
        problem = "a task may run twice, and would change what is changed already"
        remedy = "leave --dask away, or give a DST"
    elif plan.target_format == "images":
        problem = "image files that two workers encode need not be the same bytes"
        remedy = "leave --dask away, or restore into an array"
    elif plan.retry_failed:
        problem = "the images that failed are tried again where their target is"
        remedy = "leave --dask away"
    else:
        return
    raise UsageError(f"{plan.target}: {problem}", remedy)


class _ClusterRun(here.Run):
    """A run whose chunks are computed by workers."""

    def __init__(self, client: Client, *arguments: Any) -> None:  # of a `Run`
        super().__init__(*arguments)
        self._client = client
        shared = secrets.token_hex(8), dataclasses.replace(self.plan, listing=None)
        self._shared_plan = pickle.dumps(shared)
        self._name = f"{self.plan.transform.direction}-{shared[0]}"

    def finish(self) -> Report:
        """Do what is left to do, after which no worker holds anything of it."""
        try:
            return super().finish()
        finally:
            with contextlib.suppress(OSError):  # nobody is there to hold anything
                if self._client.status == "running":
                    self._client.run(close_run, self._shared_plan, on_error="ignore")

    def open_target(self) -> None:
        """Begin the target, or reopen it; as if nothing had been begun where a worker cannot."""
        super().open_target()
        try:
            self._have_joined()
        except ClusterError:
            if self.state == "fresh":
                self.target.close()
                self.storage.remove(self.target.partial)
                self.journal.remove()
            raise

    def _have_joined(self) -> None:
        """Have every worker open what its tasks need."""
        with self._connected():
            found = self._client.run(_join, self._shared_plan, on_error="return")
        _check_no_problems(found)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Stop the run where the scheduler goes."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # of Dask's connections: a file's are ours by now
            if isinstance(error, RuntimeError) and self._client.status == "running":
                raise
            raise self._lost(str(error)) from error

    def _lost(self, why: str) -> StoppedError:
        return StoppedError(
            f"the scheduler {self._client.scheduler.address} has gone, or began anew: {why}",
            "run the same command again: it resumes after the last committed chunk",
        )

    def compute(self, work: Iterable[ChunkTask]) -> None:
        """Have every chunk computed and written that is not durable yet, and commit it."""
        if not isinstance(self.target, SharedTarget):
            raise TypeError(f"{self.target.kind} is not written by tasks")
        results: Generator[list[ChunkCommit], None, None] = self._results(
            run_task, self._name, work
        )
        with contextlib.closing(results), self._connected():
            for together in results:
                edges = [edge for done in together for edge in done.edges]
                if edges:
                    self.target.write_unaligned(edges)
                    self.target.sync()
                self.journal.commit(*(done.commit for done in together))
                self.tally.count(done.images for done in together)

    def stored_checksums(self, work: Iterable[ChunkTask]) -> Iterator[tuple[int, str | None]]:
        """Have workers read what an unfinished run committed, where that is looked at."""
        if isinstance(self.target, ContiguousTarget):
            yield from super().stored_checksums(work)
            return
        self._have_joined()
        results = self._results(stored_checksums, f"check-{self._name}", work)
        with contextlib.closing(results), self._connected():
            yield from itertools.chain.from_iterable(results)

    def _tasks(self, work: Iterable[ChunkTask], threads: int) -> Iterator[Task]:
        """Return tasks of some chunks each, of which every thread is to have many."""
        for_each = self.plan.chunks // (TASKS_PER_THREAD * max(1, threads))
        together = min(max(1, for_each), MAX_CHUNKS_PER_TASK)
        left = iter(work)
        while some := tuple(itertools.islice(left, together)):
            yield Task(self._shared_plan, some)

    def _results(
        self, call: Callable[[Task], list[Any]], name: str, work: Iterable[ChunkTask]
    ) -> Generator[list[Any], None, None]:
        """Have tasks done, as many at a time as keep the workers busy; yield what they return."""
        threads = sum(self._client.nthreads().values())
        most = max(MIN_IN_FLIGHT, IN_FLIGHT_PER_THREAD * threads)
        tasks = self._tasks(work, threads)
        under_way: dict[str, Any] = {}
        completed = as_completed(loop=self._client.loop)

        def submit() -> None:
            if len(under_way) > most // 2:
                return
            more = list(itertools.islice(tasks, most - len(under_way)))
            keys = [f"{name}-{task.work[0].chunk:09d}" for task in more]
            futures = self._client.map(call, more, key=keys) if more else []
            under_way.update(zip(keys, futures, strict=True))
            completed.update(futures)

        try:
            submit()
            for together in completed.batches():
                time.sleep(GATHERING_SECONDS)
                together += completed.next_batch(block=False)
                several = self._client.gather(together, errors="skip")
                yield list(itertools.chain.from_iterable(several))
                if len(several) < len(together):
                    raise self._failed(together)
                for future in together:
                    del under_way[future.key]
                submit()
        finally:
            with contextlib.suppress(OSError):  # which is not why it ends
                if self._client.status == "running":
                    self._client.cancel(list(under_way.values()))

    def _failed(self, futures: list[Future]) -> BaseException:
        """Return the error that ends a run for tasks of which one was not done."""
        failed = [future for future in futures if future.status == "error"]
        if not failed:
            return self._lost(f"it knows nothing of {futures[0].key}")
        error: BaseException = failed[0].exception()
        if isinstance(error, FastvggError) and not isinstance(error, StoppedError):
            return StoppedError(error.problem, error.remedy)
        if isinstance(error, KilledWorker):
            return StoppedError(
                f"the workers that had the task {failed[0].key} died, one after another: {error}",
                "look into their logs; where they had too little memory, give less --memory and "
                "--restart, and else run the same command again",
            )
        return error


def _check_workers(plan: Plan, client: Client) -> None:
    """Refuse workers that could not do what they would be given.

    Those that join later find out by themselves.
    """
    try:
        client.wait_for_workers(1, timeout=JOIN_SECONDS)
    except TimeoutError:
        raise ClusterError(
            f"{client.scheduler.address} has no workers, and none joined in {JOIN_SECONDS} s",
            "start some with 'dask worker', or let the cluster have at least one",
        ) from None
    shared = pickle.dumps(dataclasses.replace(plan, listing=None))
    _check_no_problems(client.run(_probe_worker, shared, package_versions(), on_error="return"))


def _check_no_problems(found: dict[str, str | BaseException]) -> None:
    """Refuse workers of which one says what keeps it from taking part."""
    for address, problem in sorted(found.items()):
        if isinstance(problem, CommClosedError):  # it died meanwhile, and takes no part
            continue
        if isinstance(problem, FastvggError):
            problem = problem.problem
        if isinstance(problem, Exception):
            problem = f"{type(problem).__name__}: {problem}"
        if problem:
            raise ClusterError(
                f"the worker {address} cannot take part: {problem}",
                "mend that, or retire the worker; nothing was written",
            )


def _probe_worker(shared: bytes, packages: dict[str, str], dask_worker: Worker) -> str:
    """Return what keeps a worker from carrying tasks of a plan out; "" where nothing does."""
    mine = package_versions()
    others = [
        f"{name} {mine.get(name, 'none')} instead of {version}"
        for name, version in packages.items()
        if name != "python" and mine.get(name) != version
    ]
    if others:
        return f"it has {', '.join(others)}"
    plan: Plan = pickle.loads(shared)  # noqa: S301  # from the client
    limit, threads = dask_worker.memory_manager.memory_limit, dask_worker.state.nthreads
    needed = threads * plan.projected_bytes
    if limit and needed > limit:
        return (
            f"its {threads} threads need {format_bytes(needed)} of memory, and it has "
            f"{format_bytes(limit)}: give less --memory, or let it have fewer threads"
        )
    reopen_source(plan).close()
    return ""


def _join(shared: bytes) -> str:
    """Open what tasks need, on a worker."""
    join(shared)
    return ""
