"""What there is of a target already, and whether a run may go on with it or take its name."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastvgg.errors import TargetError
from fastvgg.stream.journal import refuse_other_job
from fastvgg.stream.manifest import read_manifest
from fastvgg.stream.plan import readable_bytes

if TYPE_CHECKING:
    from fastvgg.stream.journal import Ledger
    from fastvgg.stream.plan import Plan

__all__ = ["State", "find_state", "refuse_occupied", "resumed"]

State: TypeAlias = Literal["fresh", "resumable", "complete"]


def find_state(plan: Plan, ledger: Ledger | None) -> State:
    """Return what there is of a plan's target: nothing, an unfinished run, or all of it.

    Raises
    ------
    ResumeError
        If the unfinished run is another job.
    TargetError
        If something that is not this run's has the target's name.
    """
    target = Path(plan.target)
    partial = target.with_name(target.name + ".partial")
    if plan.restart:
        _check_replaceable(target)
        return "fresh"
    if ledger is not None:
        refuse_other_job(ledger.job, plan.job(), plan.target)
        if os.path.lexists(partial):
            refuse_occupied(plan, ledger)
        return "resumable"
    manifest = read_manifest(target)
    if _occupied(target) and manifest is not None and manifest.job == plan.job():
        return "complete"
    refuse_occupied(plan, ledger)
    if os.path.lexists(partial):
        raise TargetError(
            f"{partial} is in the way, and no journal says that it is an unfinished run",
            "move it away, or give --restart to replace it",
        )
    return "fresh"


def refuse_occupied(plan: Plan, ledger: Ledger | None) -> None:
    """Refuse a target whose name something has that the run may not replace.

    Raises
    ------
    TargetError
        Saying what has the name.
    """
    target = Path(plan.target)
    if not _occupied(target) or plan.restart or (ledger is not None and ledger.replaces):
        return
    what = "was not made by fastvgg" if read_manifest(target) is None else "is of another job"
    raise TargetError(
        f"{target} exists, and {what}", "choose another name, or give --restart to replace it"
    )


def _occupied(target: Path) -> bool:
    if target.is_dir() and not target.is_symlink():
        return any(target.iterdir())
    return os.path.lexists(target)


def _check_replaceable(target: Path) -> None:
    """Refuse to replace a directory that fastvgg did not write: it may hold anything."""
    if target.is_dir() and _occupied(target) and read_manifest(target) is None:
        raise TargetError(
            f"{target} is a directory with files in it that fastvgg did not write",
            "choose another name, or remove it yourself",
        )


def resumed(plan: Plan, ledger: Ledger) -> Plan:
    """Return the plan with the chunks that an unfinished run began with.

    Raises
    ------
    TargetError
        If those chunks do not fit into the memory limit of now.
    """
    fitted = dataclasses.replace(
        plan, chunk_images=ledger.chunk_images, committed_chunks=len(ledger.commits)
    )
    if fitted.projected_bytes > fitted.memory_bytes:
        raise TargetError(
            f"{plan.target} was begun in chunks that need "
            f"{readable_bytes(fitted.projected_bytes)}, and the memory limit is "
            f"{readable_bytes(plan.memory_bytes)}",
            f"give --memory {-(-fitted.projected_bytes // 2**20)}MiB, or --restart",
        )
    return fitted
