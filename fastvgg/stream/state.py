"""What there is of a target already, and whether a run may go on with it or take its name."""

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
    """Return what there is of a plan's target: nothing, an unfinished run, or all of it.

    "failed" is all of it, to be taken up again for what failed.

    Raises
    ------
    ResumeError
        If the unfinished run is another job.
    TargetError
        If something that is not this run's has the target's name.
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
            f"{destination.partial} is in the way, and no journal says that it is an unfinished "
            "run",
            "move it away, or give --restart to replace it",
        )
    return "fresh"


def check_not_occupied(plan: Plan, replaces: str | None) -> None:
    """Refuse a target whose name something has, unless it is what the run replaces.

    Raises
    ------
    TargetError
        Saying what has the name.
    """
    destination = destination_of(plan)
    if not destination.is_occupied() or destination.identity() == replaces:
        return
    is_foreign = read_manifest(destination.path) is None
    what = "was not made by fastvgg" if is_foreign else "is of another job"
    raise TargetError(
        f"{destination.path} exists, and {what}",
        "choose another name, or give --restart to replace it",
    )


def with_committed(plan: Plan, chunk_images: int, committed_chunks: int) -> Plan:
    """Return the plan with the chunks that an unfinished run began with.

    Raises
    ------
    TargetError
        If those chunks do not fit into the memory limit of now.
    """
    fitted = dataclasses.replace(plan, chunk_images=chunk_images, committed_chunks=committed_chunks)
    if fitted.projected_bytes > fitted.memory_bytes:
        raise TargetError(
            f"{plan.target} was begun in chunks that need "
            f"{format_bytes(fitted.projected_bytes)}, and the memory limit is "
            f"{format_bytes(plan.memory_bytes)}",
            f"give --memory {-(-fitted.projected_bytes // 2**20)}MiB"
            + ("" if plan.in_place else ", or --restart"),
        )
    return fitted
