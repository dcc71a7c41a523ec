"""The source of a run: reopened as it was planned, and unchanged since."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvgg.datasets.open import open_source
from fastvgg.errors import SourceError
from fastvgg.imaging.resize import gather_function

if TYPE_CHECKING:
    from fastvgg.datasets.base import Source
    from fastvgg.storage.location import Location
    from fastvgg.stream.plan import Plan


def reopen_source(plan: Plan) -> Source:
    """Reopen the source of a plan; raise SourceError if it has changed since."""
    source = open_source(
        plan.source,
        layout=plan.header.layout,
        dtype_hint=plan.header.dtype,
        decoding=plan.job.decoding,
        decoding_bytes=plan.decoding_bytes,
        threads=plan.threads,
        gather=gather_function(plan.choose_backend()),
        listing=plan.listing,
        use_index=plan.has_index,
    )
    if changed(plan, source):
        source.close()
        raise changed_since(plan.source)
    return source


def changed_since(source: Location) -> SourceError:
    """Return the error for a source that changed after planning."""
    return SourceError(
        f"{source} has changed since the run was planned",
        "rerun the same command, or call fastvgg.plan again",
    )


def changed(plan: Plan, source: Source) -> bool:
    """Return whether a source differs from the planned one."""
    return source.header != plan.header or source.fingerprint() != plan.job.fingerprint
