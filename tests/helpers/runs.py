"""Runs of the tests: with any storage, interrupted, with an event, with images that fail."""

from __future__ import annotations

import numpy as np
import pytest

from fastvgg.executors.threads import ThreadExecutor
from fastvgg.stream import in_place
from fastvgg.stream import run as runs
from tests.helpers.datasets_on_disk import pixels, plan_of, save_images, save_npy
from tests.helpers.faults import InterruptedStorage, SimulatedCrash


def run(plan, progress=None, storage=None):
    """Run a plan in this process, as `Plan.run` does, with the given storage."""
    if plan.job.in_place:
        return in_place.run(plan, progress, storage)
    return runs.run(plan, ThreadExecutor(), progress, storage)


def interrupt_run(source, target, **settings):
    """Crash a run after its first commit; return the target."""
    with pytest.raises(SimulatedCrash):
        run(plan_of(source, target, images_per_chunk=2, **settings), storage=InterruptedStorage(1))
    return target


def run_with_event(plan, make):
    """Run a plan, and call `make` after its first chunk."""

    def progress(at):
        nonlocal make
        if make is not None:
            make()
            make = None

    return plan.run(progress)


def preprocessed(tmp_path, mode="caffe", **settings):
    """Preprocess a new array; return the result."""
    stored = tmp_path / "y.npy"
    plan_of(save_npy(tmp_path / "x.npy", pixels(11)), stored, mode=mode, **settings).run()
    return stored


def folder_with_failures(directory):
    """Save five images and two unreadable ones; return all names and the expected batch."""
    batch = pixels(5)
    save_images(directory, batch, [f"{row}.png" for row in range(5)])
    (directory / "1-torn.png").write_bytes((directory / "1.png").read_bytes()[:-30])
    (directory / "3-text.jpg").write_text("not an image")
    expected = np.zeros((7, 7, 9, 3), np.uint8)
    expected[[0, 2, 3, 5, 6]] = batch
    names = ["0.png", "1-torn.png", "1.png", "2.png", "3-text.jpg", "3.png", "4.png"]
    return sorted(names), expected[[names.index(name) for name in sorted(names)]]
