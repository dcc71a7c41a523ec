"""What a run finds at the name of its target.

From that follows whether it may create, resume or replace it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastvgg.errors import FastvggError, TargetError, option
from fastvgg.formatting import format_bytes
from fastvgg.stream.destination import MOVE_AWAY
from fastvgg.stream.differences import FINGERPRINT, as_details, describe_differences
from fastvgg.stream.journal import journal_path, read_journal

if TYPE_CHECKING:
    from fastvgg.stream.destination import Destination
    from fastvgg.stream.job import Job
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan


class TargetState(NamedTuple):
    """The dataset or unfinished run that was found at the name of a target."""

    name: Literal["fresh", "resumable", "complete", "failed"]
    """Absent, unfinished or finished; "failed" if the failed images of a finished target are to
    be retried."""
    plan: Plan
    """The plan, with the chunk size and progress of a run that it resumes."""
    manifest: Manifest | None = None
    """The manifest of the finished target, or of the target whose failures a run retries."""
    replaces: str | None = None
    """Identity of what a restart replaces."""


def inspect_unlocked_target(plan: Plan, destination: Destination) -> TargetState:
    """Return the state of a plan's target whose journal may be locked by another process.

    What is found partly before and partly after that process starts or finishes its run proves
    nothing; it is inspected again.
    """
    path = journal_path(destination.path)
    while True:
        run_names = destination.run_names()
        try:
            return inspect_target(plan, destination, None if plan.restart else read_journal(path))
        except (FastvggError, OSError):  # a journal that was just removed
            if destination.run_names() == run_names:
                raise


def inspect_target(
    plan: Plan, destination: Destination, journal_state: JournalState | None
) -> TargetState:
    """Return the state of a plan's target, which is at `destination`.

    Raises
    ------
    ResumeError
        If the unfinished run has other settings.
    TargetError
        If the target's name is taken by something that this run did not write, or a run that it
        resumes needs more memory.
    """
    if plan.restart:
        return TargetState("fresh", plan, replaces=destination.check_replaceable())
    if journal_state is not None:
        journal_state.job.check_same(plan.job, str(plan.target))
        check_names(destination, plan.job, journal_state)
        retried = destination.read_manifest() if journal_state.retries else None
        resumed = with_committed(plan, journal_state.chunk_images, len(journal_state.commits))
        return TargetState("resumable", resumed, retried)
    manifest = destination.read_manifest()
    if manifest is not None and destination.is_occupied():
        is_same = manifest.job == plan.job
        if plan.retry_failed and (not is_same or manifest.counts["failed"] > 0):
            destination.check_sidecars(None)
            return TargetState("failed", plan, manifest)
        if is_same:
            return TargetState("complete", plan, manifest)
    check_not_occupied(destination, plan.job, None)
    if destination.exists(destination.partial):
        raise TargetError(
            f"{destination.partial} exists, but no journal shows that an unfinished run wrote it",
            _remedy(destination),
        )
    destination.check_sidecars(None)
    return TargetState("fresh", plan)


def check_names(destination: Destination, job: Job, journal_state: JournalState) -> None:
    """Check that an unfinished run finds only what it wrote, or replaces, at the names it uses."""
    destination.check_sidecars(journal_state)
    destination.check_partial(journal_state)
    if destination.predates_run(journal_state):
        check_not_occupied(destination, job, journal_state.replaces)


def check_not_occupied(destination: Destination, job: Job, replaces: str | None) -> None:
    """Check that the target's name is free, or taken only by what the run replaces."""
    if not destination.is_occupied():
        return
    if replaces is not None:
        change = destination.find_change_since(replaces)
        if change is None:
            return
        raise TargetError(
            f"{destination.path} exists, and is not what the unfinished run replaces: {change}",
            MOVE_AWAY,
        )
    manifest, maker = destination.read_manifest(), "not written by fastvgg"
    details, remedy = {}, _remedy(destination)
    if manifest is not None:
        differences, maker = manifest.job.differences(job), "made by another run"
        if differences:
            maker = describe_differences(differences, "made")
            details = as_details(differences)
        is_changed = [each.name for each in differences] == [FINGERPRINT]
        if is_changed and job.is_decoded and manifest.counts["failed"]:
            retry = f"give {option('retry_failed')} to retry its failed images"
            remedy = f"{retry} and those that changed; {remedy}"
    problem = f"{destination.path} exists, and was {maker}"
    raise TargetError(problem, remedy, **details)


def _remedy(destination: Destination) -> str:
    """Return how to free the names of a run: to restart only if that would not be refused."""
    try:
        destination.check_replaceable()
    except TargetError as error:
        return error.remedy
    return f"choose another name, or give {option('restart')} to replace it"


def with_committed(plan: Plan, chunk_images: int, committed_chunks: int) -> Plan:
    """Return the plan with the chunk size and progress of an unfinished run; check that it fits."""
    resumed = dataclasses.replace(
        plan, chunk_images=chunk_images, committed_chunks=committed_chunks
    )
    if resumed.projected_bytes > resumed.memory_bytes:
        raise TargetError(
            f"{plan.target} was started with chunks that need "
            f"{format_bytes(resumed.projected_bytes)}, but the memory limit is "
            f"{format_bytes(plan.memory_bytes)}",
            f"give {option('memory', f'{-(-resumed.projected_bytes // 2**20)}MiB')}"
            + ("" if plan.job.in_place else f", or {option('restart')}"),
        )
    return resumed
