"""Run a plan on a Dask cluster: workers compute and write chunks; this process commits them.

Dask may run a task more than once, or rerun it after a worker dies: `fastvgg.executors.worker`
explains why that is harmless. Only this process commits and publishes, so an interrupted run can be
resumed by rerunning the command, with a cluster or without.

Needs ``pip install '.[dask]'`` in a clone of fastvgg, here and on every worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pickle
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import dask
from distributed import Client, KilledWorker, LocalCluster, Security, as_completed
from distributed.comm import CommClosedError, get_address_host_port

from fastvgg.datasets.base import SharedTarget
from fastvgg.errors import (
    ClusterError,
    FastvggError,
    StoppedError,
    UsageError,
    argument,
    is_command_line,
    option,
    option_name,
)
from fastvgg.executors.worker import Task, close_run, open_run, run_task, stored_checksums
from fastvgg.formatting import format_bytes, format_count, package_versions
from fastvgg.parallel import available_cpus
from fastvgg.stream.compute import ChunkTask
from fastvgg.stream.run import Executor
from fastvgg.stream.source import reopen_source

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from distributed import Future, Worker

    from fastvgg.stream.plan import Plan
    from fastvgg.stream.run import Run

Result = TypeVar("Result")

LOCAL_ADDRESS: Final = "local"
LOOPBACK: Final = "127.0.0.1"
WITHOUT_PORT: Final = ("inproc://", "ucx://")  # addresses from which Dask extracts no port
CONNECT_SECONDS: Final = 10
JOIN_SECONDS: Final = 60
# Results that arrive within this time are gathered and committed as a batch: one by one they take a
# third more of the scheduler's time.
GATHER_SECONDS: Final = 0.05
MIN_IN_FLIGHT: Final = 1024  # tasks, of a few kB each
IN_FLIGHT_PER_THREAD: Final = 8
# Chunks per task of a large run: a task writes a chunk while it computes the next, and Dask's
# overhead is per task.
MAX_CHUNKS_PER_TASK: Final = 8
TASKS_PER_THREAD: Final = 16  # at least, so that threads finish at about the same time


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    """Connect to a scheduler; "local" starts a single-threaded worker per CPU of this machine.

    Whoever can connect to a scheduler can run code as its user. A local one listens on the loopback
    interface only, and requires a certificate that exists only in the memory of its processes: any
    user of the machine can connect to a loopback port.

    Raises
    ------
    ClusterError
        If no scheduler responds.
    UsageError
        If a local one needs a package that is not installed.
    """
    with contextlib.ExitStack() as opened:
        security = None
        if address == LOCAL_ADDRESS:
            security = _temporary_security()
            address = opened.enter_context(_local_cluster(security)).scheduler_address
        try:
            if security is None:
                _check_listens(address)
            client = opened.enter_context(
                Client(address, security=security, timeout=CONNECT_SECONDS, set_as_default=False)
            )
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no scheduler responds at {address}: {error}",
                "start one with 'dask scheduler' and give the address that it prints, or give "
                f"{option('dask', LOCAL_ADDRESS)}",
            ) from None
        yield client


def _check_listens(address: str) -> None:
    """Connect to a scheduler once; raise OSError or ValueError if that fails.

    The client would retry, log each failure with its traceback, and time out again when closed.
    """
    if not address.startswith(WITHOUT_PORT):
        place = get_address_host_port(address)
        socket.create_connection(place, timeout=CONNECT_SECONDS).close()


def _temporary_security() -> Security:
    """Return new keys and certificates, which every connection of a cluster must present."""
    try:
        return Security.temporary()
    except ImportError as error:
        raise UsageError(
            f"a local Dask cluster needs a package that is not installed: {error}",
            "in a clone of fastvgg: pip install '.[dask]'",
        ) from None


@contextlib.contextmanager
def _local_cluster(security: Security) -> Iterator[LocalCluster]:
    """Start a cluster on the loopback interface, without a dashboard."""
    # Dask starts an HTTP server in every process even without a dashboard; it has no routes here.
    no_routes: dict[str, list[str]] = {
        f"distributed.{node}.http.routes": [] for node in ("scheduler", "worker")
    }
    with contextlib.ExitStack() as opened:
        opened.enter_context(dask.config.set(no_routes))
        try:
            cluster = LocalCluster(
                n_workers=available_cpus(),
                threads_per_worker=1,
                host=LOOPBACK,
                protocol="tls://",
                security=security,
                scheduler_kwargs={"dashboard": False, "dashboard_address": f"{LOOPBACK}:0"},
                worker_dashboard_address=None,
            )
        except (RuntimeError, OSError) as error:  # of the first process that fails to start
            raise ClusterError(
                f"a local Dask cluster could not be started: {error}",
                "raise the limits of open files and processes (ulimit -n, ulimit -u), or omit "
                f"{option_name('dask')}",
            ) from error
        yield opened.enter_context(cluster)


class DaskExecutor(Executor):
    """Compute the chunks of a run on a cluster; workers write them, and this process commits them.

    Each task uses one thread and the memory limit of the whole plan.

    Parameters
    ----------
    client
        Connected to the cluster. Every worker must reach the plan's source and target by the same
        paths.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._shared_plan = b""
        self._name = ""

    def prepare(self, plan: Plan) -> Plan:
        """Return the plan of one thread per task, after checking it and the present workers.

        Workers that join later fail on their first task instead.
        """
        _check_idempotent(plan)
        plan, client = dataclasses.replace(plan, threads=1), self._client
        try:
            client.wait_for_workers(1, timeout=JOIN_SECONDS)
        except TimeoutError:
            raise ClusterError(
                f"{client.scheduler.address} has no workers, and none joined in {JOIN_SECONDS} s",
                "start one with 'dask worker', or scale the cluster to at least one",
            ) from None
        shared = pickle.dumps(dataclasses.replace(plan, listing=None))
        _check_worker_results(
            client.run(_probe_worker, shared, package_versions(), on_error="return")
        )
        return plan

    def open(self, run: Run) -> None:
        """Have every worker open the files of its tasks."""
        if not self._shared_plan:
            shared = secrets.token_hex(8), dataclasses.replace(run.plan, listing=None)
            self._shared_plan = pickle.dumps(shared)
            self._name = f"{run.plan.transform.direction}-{shared[0]}"
        with self._disconnect_errors():
            found = self._client.run(open_run, self._shared_plan, on_error="return")
        _check_worker_results(found)

    def close(self) -> None:
        """Have the workers release the files of the run."""
        shared, self._shared_plan = self._shared_plan, b""
        with contextlib.suppress(OSError):  # no worker is left
            if shared and self._client.status == "running":
                self._client.run(close_run, shared, on_error="ignore")

    @contextlib.contextmanager
    def _disconnect_errors(self) -> Iterator[None]:
        """Raise StoppedError if the connection to the scheduler is lost."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # from Dask: file errors are already StoppedError
            if isinstance(error, RuntimeError) and self._client.status == "running":
                raise
            raise self._scheduler_lost_error(str(error)) from error

    def _scheduler_lost_error(self, reason: str) -> StoppedError:
        return StoppedError(
            f"the scheduler {self._client.scheduler.address} is gone or was restarted: {reason}",
            "rerun the same command to resume after the last committed chunk",
        )

    def compute(self, run: Run, tasks: Iterable[ChunkTask]) -> None:
        """Have workers compute and write chunks; commit each batch that is done."""
        if not isinstance(run.target, SharedTarget):
            raise TypeError(f"{run.plan.job.target_format} cannot be written by several processes")
        results = self._results(run_task, self._name, run, tasks)
        with contextlib.closing(results), self._disconnect_errors():
            for batch in results:
                edges = [edge for result in batch for edge in result.edges]
                if edges:
                    run.target.write_unaligned(edges)
                    run.target.sync()
                run.journal.commit(*(result.commit for result in batch))
                run.tracker.count(result.images for result in batch)

    def damaged_chunks(self, run: Run, count: Callable[[int, int], None]) -> Iterator[int]:
        """Have workers read the stored bytes of committed chunks."""
        self.open(run)
        commits, rows = run.journal.commits, enumerate(run.plan.chunk_rows())
        tasks = [ChunkTask(chunk, *span) for chunk, span in rows if chunk in commits]
        results = self._results(stored_checksums, f"check-{self._name}", run, tasks)
        with contextlib.closing(results), self._disconnect_errors():
            for task, found in itertools.chain.from_iterable(results):
                images = task.stop - task.start
                count(images, images * run.plan.result.image_bytes)
                if found != commits[task.chunk].checksum:
                    yield task.chunk

    def _group(self, tasks: Iterable[ChunkTask], chunks: int, threads: int) -> Iterator[Task]:
        """Group chunks, of `chunks` in all, into Dask tasks: several tasks per thread."""
        chunks_per_task = chunks // (TASKS_PER_THREAD * max(1, threads))
        chunks_per_task = min(max(1, chunks_per_task), MAX_CHUNKS_PER_TASK)
        remaining = iter(tasks)
        while group := tuple(itertools.islice(remaining, chunks_per_task)):
            yield Task(self._shared_plan, group)

    def _results(
        self, fn: Callable[[Task], list[Result]], name: str, run: Run, chunks: Iterable[ChunkTask]
    ) -> Generator[list[Result], None, None]:
        """Run `fn` on all chunks, with bounded tasks in flight; yield batches of results."""
        threads = sum(self._client.nthreads().values())
        tasks = self._group(chunks, run.plan.chunks, threads)
        max_in_flight = max(MIN_IN_FLIGHT, IN_FLIGHT_PER_THREAD * threads)
        in_flight: dict[str, Any] = {}
        completed = as_completed(loop=self._client.loop)

        def submit() -> None:
            if len(in_flight) > max_in_flight // 2:
                return
            more = list(itertools.islice(tasks, max_in_flight - len(in_flight)))
            keys = [f"{name}-{task.chunks[0].chunk:09d}" for task in more]
            futures = self._client.map(fn, more, key=keys) if more else []
            in_flight.update(zip(keys, futures, strict=True))
            completed.update(futures)

        try:
            submit()
            for batch in completed.batches():
                time.sleep(GATHER_SECONDS)
                batch += completed.next_batch(block=False)
                results = self._client.gather(batch, errors="skip")
                yield list(itertools.chain.from_iterable(results))
                if len(results) < len(batch):
                    raise self._task_error(batch)
                for future in batch:
                    del in_flight[future.key]
                submit()
        finally:
            with contextlib.suppress(OSError):  # must not mask the first error
                if self._client.status == "running":
                    self._client.cancel(list(in_flight.values()))

    def _task_error(self, futures: list[Future]) -> BaseException:
        """Return the error that stops the run after one of these tasks failed."""
        failed = [future for future in futures if future.status == "error"]
        if not failed:
            return self._scheduler_lost_error(f"it does not know the task {futures[0].key}")
        error: BaseException = failed[0].exception()
        if isinstance(error, FastvggError) and not isinstance(error, StoppedError):
            return StoppedError(error.problem, error.remedy)
        if isinstance(error, KilledWorker):
            return StoppedError(
                f"every worker that ran the task {failed[0].key} died: {error}",
                "check the workers' logs; if they ran out of memory, lower "
                f"{option_name('memory')} and give {option('restart')}, otherwise rerun the same "
                "command to resume",
            )
        return error


def _check_idempotent(plan: Plan) -> None:
    """Check that the plan is safe if a task runs twice."""
    cluster = option_name("dask") if is_command_line() else "client="
    if plan.job.in_place:
        problem = "a cluster may run a task twice, which would corrupt a file changed in place"
        remedy = f"omit {cluster}, or give a {argument('target')}"
    elif plan.job.is_encoded:
        problem = "image files encoded by two workers may differ in their bytes"
        remedy = f"omit {cluster}, or restore into an array"
    elif plan.retry_failed:
        problem = f"{option('retry_failed')} is not supported on a cluster"
        remedy = f"omit {cluster}"
    else:
        return
    raise UsageError(f"{plan.target}: {problem}", remedy)


def _check_worker_results(found: dict[str, str | BaseException | None]) -> None:
    """Raise ClusterError if a worker reported a problem."""
    for address, problem in sorted(found.items()):
        if isinstance(problem, CommClosedError):  # the worker died, so it gets no tasks
            continue
        if isinstance(problem, FastvggError):
            problem = problem.problem
        if isinstance(problem, Exception):
            problem = f"{type(problem).__name__}: {problem}"
        if problem:
            raise ClusterError(
                f"the worker {address} cannot take part: {problem}",
                f"fix that (for less memory lower {option_name('memory')}), or retire the worker; "
                "nothing was written",
            )


def _probe_worker(shared: bytes, packages: dict[str, str], dask_worker: Worker) -> str:
    """Return the reason why a worker cannot run tasks of the plan, or "" if it can."""
    installed = package_versions()
    mismatches = [
        f"{name} {installed.get(name, 'none')} instead of {version}"
        for name, version in packages.items()
        if name != "python" and installed.get(name) != version
    ]
    if mismatches:
        return f"it has {', '.join(mismatches)}"
    plan: Plan = pickle.loads(shared)  # noqa: S301  # from the client
    limit_bytes, threads = dask_worker.memory_manager.memory_limit, dask_worker.state.nthreads
    needed_bytes = threads * plan.projected_bytes
    if limit_bytes and needed_bytes > limit_bytes:
        return (
            f"it needs {format_bytes(needed_bytes)} of memory for "
            f"{format_count(threads, 'thread')}, but has {format_bytes(limit_bytes)}"
        )
    reopen_source(plan).close()
    return ""
