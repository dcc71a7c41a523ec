"""Hostile images are read within the memory limit, or are failed rows with a reason."""

from __future__ import annotations

import pytest

from tests.helpers.datasets_on_disk import python
from tests.helpers.hostile_images import (
    OPTIONS,
    exif_overlapping,
    hostile_images,
    hostile_images_with_options,
    run_on_images,
    saved,
    tiny_image,
    with_exif,
)

GROUPS = 6
NAMES = sorted(hostile_images())


@pytest.fixture(scope="module")
def idle_bytes():
    """Return the peak memory of a run of one tiny image."""
    return run_on_images({"tiny.png": tiny_image()}).peak_bytes


@pytest.mark.parametrize("group", range(GROUPS))
def test_hostile_images_are_read_within_the_limit_or_fail_with_a_reason(idle_bytes, group):
    check({name: hostile_images()[name]() for name in NAMES[group::GROUPS]}, idle_bytes)


def test_images_that_are_hostile_with_options_are_read_within_the_limit_or_fail(idle_bytes):
    images = {name: make() for name, make in hostile_images_with_options().items()}
    check(images, idle_bytes, *OPTIONS)


def test_images_before_other_bytes_are_read():
    tails = {"zeros": bytes(3_000_000), "same": b"\xff\xd8\xff" * 300_000}
    kinds = ("png", "jpeg", "webp", "gif", "tiff", "jpeg2000", "avif", "ppm")
    images = {f"{kind} {tail}.png": saved(kind) + tails[tail] for kind in kinds for tail in tails}
    run = run_on_images(images, "--exif")
    assert run.code == 0, run.stderr
    assert run.rows == dict.fromkeys(images, (False, ""))


def test_warnings_of_pillow_are_not_printed_for_each_tag(tmp_path):
    (tmp_path / "a.jpg").write_bytes(with_exif(saved("jpeg"), exif_overlapping()))
    done = python(SIZE_OF_IMAGE, tmp_path / "a.jpg")
    assert done.stdout.split() == ["64", "64"]
    assert done.stderr == ""


SIZE_OF_IMAGE = """
import sys
from pathlib import Path
from fastvgg.imaging.decode import DecodeOptions, Decoder

print(*Decoder(DecodeOptions(), memory_bytes=2**33).size(Path(sys.argv[1]).read_bytes()))
"""


def check(images, idle_bytes, *options):
    run = run_on_images({"a.png": tiny_image(), **images}, *options)
    used = run.peak_bytes - idle_bytes
    assert used < 64 * 2**20 * 1.1, f"{used / 2**20:.0f} MiB for {', '.join(images)}"
    assert run.code in (0, 1)
    assert "note:" not in run.stderr
    assert "Traceback" not in run.stderr
    assert len(run.stderr) < 300 * len(images)
    assert run.rows.keys() == {"a.png", *images}
    assert run.rows["a.png"] == (False, "")
    for name, (failed, reason) in run.rows.items():
        assert reason or not failed, name
        assert "--" not in reason, name
