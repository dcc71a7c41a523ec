"""The source of a run: it exists, and is reopened as it was planned, unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvgg.datasets.open import open_source, source_format
from fastvgg.errors import SourceError
from fastvgg.imaging.resize import gather_function
from fastvgg.stream.journal import journal_path, read_journal_header

if TYPE_CHECKING:
    from fastvgg.datasets.base import Source
    from fastvgg.storage.location import Location
    from fastvgg.stream.plan import Plan


def check_exists(source: Location) -> None:
    """Check that a source exists and is a dataset; name the run that has not finished it.

    Raises
    ------
    SourceError
        If it does not exist, is unfinished, or is in an unsupported format.
    """
    try:
        source_format(source)
    except SourceError:
        if read_journal_header(journal_path(source.container)) is None:
            raise
        raise SourceError(
            f"{source} is unfinished: the run that writes it was interrupted",
            "rerun the command that writes it; 'fastvgg info' shows its progress",
        ) from None


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
    if is_changed(plan, source):
        source.close()
        raise changed_error(plan.source)
    return source


def changed_error(source: Location) -> SourceError:
    """Return the error for a source that changed after planning."""
    return SourceError(
        f"{source} has changed since the run was planned",
        "rerun the same command, or call fastvgg.plan again",
    )


def is_changed(plan: Plan, source: Source) -> bool:
    """Return whether a source differs from the planned one."""
    return source.header != plan.header or source.fingerprint() != plan.job.fingerprint
