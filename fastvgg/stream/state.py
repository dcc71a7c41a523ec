"""Inspect an existing target: whether a run may resume it, or take its name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastvgg.errors import TargetError
from fastvgg.stream.journal import check_same_job
from fastvgg.stream.manifest import read_manifest
from fastvgg.stream.plan import format_bytes
from fastvgg.stream.target import destination_of

if TYPE_CHECKING:
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.plan import Plan

__all__ = ["State", "check_not_occupied", "inspect_target", "with_committed"]

State: TypeAlias = Literal["fresh", "resumable", "complete", "failed"]


def inspect_target(plan: Plan, journal_state: JournalState | None) -> State:
    """Return the state of a plan's target: absent, unfinished or finished.

    "failed" is a finished target whose failed images are to be retried.

    Raises
    ------
    ResumeError
        If the unfinished run has another job.
    TargetError
        If the target's name is taken by something that this run did not write.
    """
    destination = destination_of(plan)
    if plan.restart:
        destination.replaceable()
        return "fresh"
    if journal_state is not None:
        check_same_job(journal_state.job, plan.job(), plan.target)
        if destination.predates_run(journal_state):
            check_not_occupied(plan, journal_state.replaces)
        return "resumable"
    manifest = read_manifest(destination.path)
    if manifest is not None and destination.is_occupied():
        has_failures = manifest.job != plan.job() or manifest.counts["failed"] > 0
        if plan.retry_failed and has_failures:
            return "failed"
        if manifest.job == plan.job():
            return "complete"
    check_not_occupied(plan, None)
    if destination.exists(destination.partial):
        raise TargetError(
            f"{destination.partial} exists, but no journal shows that an unfinished run wrote it",
            "move it away, or give --restart to replace it",
        )
    return "fresh"


def check_not_occupied(plan: Plan, replaces: str | None) -> None:
    """Check that the target's name is free, or taken only by what the run replaces.

    Raises
    ------
    TargetError
        If something else has the name.
    """
    destination = destination_of(plan)
    if not destination.is_occupied() or destination.identity() == replaces:
        return
    is_foreign = read_manifest(destination.path) is None
    maker = "not written by fastvgg" if is_foreign else "made with other settings or another source"
    raise TargetError(
        f"{destination.path} exists, and was {maker}",
        "choose another name, or give --restart to replace it",
    )


def with_committed(plan: Plan, chunk_images: int, committed_chunks: int) -> Plan:
    """Return the plan with the chunk size and progress of the unfinished run.

    Raises
    ------
    TargetError
        If chunks of that size exceed the present memory limit.
    """
    resumed = dataclasses.replace(
        plan, chunk_images=chunk_images, committed_chunks=committed_chunks
    )
    if resumed.projected_bytes > resumed.memory_bytes:
        raise TargetError(
            f"{plan.target} was started with chunks that need "
            f"{format_bytes(resumed.projected_bytes)}, but the memory limit is "
            f"{format_bytes(plan.memory_bytes)}",
            f"give --memory {-(-resumed.projected_bytes // 2**20)}MiB"
            + ("" if plan.in_place else ", or --restart"),
        )
    return resumed
