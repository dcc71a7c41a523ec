"""The same failure in Python and on the command line: each in the words of its caller."""

from __future__ import annotations

import functools
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastvgg
from fastvgg.cli import app
from fastvgg.errors import FastvggError
from fastvgg.stream.journal import journal_path
from fastvgg.stream.lines import encode_line
from fastvgg.stream.manifest import manifest_path
from tests.helpers.datasets_on_disk import (
    names_in,
    network_inputs,
    npy_bytes,
    pixels,
    plan_of,
    save_images,
    save_npy,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.runs import run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with datasets of many kinds, also unfinished and damaged."""
    place = tmp_path_factory.mktemp("place")
    save_npy(place / "x.npy", pixels(5))
    save_npy(place / "floats.npy", pixels(5).astype(np.float32))
    save_npy(place / "planar.npy", np.ascontiguousarray(np.moveaxis(pixels(5), -1, 1)))
    save_images(place / "photos", pixels(4))
    save_images(place / "sizes", pixels(2), ["a.png", "b.png"])
    Image.new("RGB", (30, 40)).save(place / "sizes" / "c.png")
    save_images(place / "failing", pixels(3))
    (place / "failing" / "bad.png").write_bytes(b"nothing")
    (place / "text.txt").write_text("text")
    (place / "empty").mkdir()
    (place / "damaged.npy").write_bytes(npy_bytes(pixels(5))[:-9])
    save_npy(place / "foreign.npy", pixels(2))
    (place / "locked.npy.partial").write_bytes(b"x")
    plan_of(place / "x.npy", place / "y.npy", mode="tf").run()
    plan_of(place / "failing", place / "f.npy", direction="pack", size=(7, 9)).run()
    save_npy(place / "bare.npy", network_inputs(pixels(5), "tf"))
    plan_of(place / "x.npy", place / "bad.npy", mode="tf").run()
    manifest_path(place / "bad.npy").write_text("{")
    plan = plan_of(place / "x.npy", place / "u.npy", mode="tf", images_per_chunk=1)
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(1))
    plan = plan_of(place / "x.npy", place / "j.npy", mode="tf", images_per_chunk=1)
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(1))
    journal_path(place / "j.npy").write_bytes(encode_line({"fastvgg-journal": 3}))
    shutil.copy(place / "y.npy", place / "twice.npy")
    shutil.copy(manifest_path(place / "y.npy"), manifest_path(place / "twice.npy"))
    return place


# A command, its arguments, and its options as Python writes them.
SITUATIONS = {
    "no source": ("preprocess", ["missing", "z.npy"], {}),
    "no mode": ("preprocess", ["x.npy", "z.npy"], {}),
    "no mode to restore": ("restore", ["bare.npy", "z.npy"], {}),
    "no target": ("preprocess", ["x.npy"], {"mode": "tf"}),
    "a target in place": ("preprocess", ["floats.npy", "z.npy"], {"mode": "tf", "in_place": True}),
    "unknown mode": ("preprocess", ["x.npy", "z.npy"], {"mode": "CAFFE"}),
    "model as mode": ("preprocess", ["x.npy", "z.npy"], {"mode": "vgg19"}),
    "unknown model": ("preprocess", ["x.npy", "z.npy"], {"model": "vgg91"}),
    "mode as model": ("preprocess", ["x.npy", "z.npy"], {"model": "caffe"}),
    "two modes": ("preprocess", ["x.npy", "z.npy"], {"model": "vgg19", "mode": "tf"}),
    "unknown dtype": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "dtype": "fp16"}),
    "uint8": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "dtype": "uint8"}),
    "unknown layout": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "layout": "hwc"}),
    "other layout": ("preprocess", ["planar.npy", "z.npy"], {"mode": "tf"}),
    "layout of images": ("preprocess", ["photos", "z.npy"], {"mode": "tf", "layout": "NCHW"}),
    "unknown format": ("restore", ["y.npy", "out"], {"format": "jpg"}),
    "format of an array": ("restore", ["y.npy", "z.npy"], {"format": "webp"}),
    "unknown interpolation": (
        "pack",
        ["photos", "z.npy"],
        {"size": (7, 9), "interpolation": "linear"},
    ),
    "unknown rounding": ("restore", ["y.npy", "z.npy"], {"rounding": "floor"}),
    "size of an array": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "size": (7, 9)}),
    "no size": ("pack", ["sizes", "z.npy"], {}),
    "a size of nothing": ("pack", ["photos", "z.npy"], {"size": (0, 9)}),
    "aspect ratio without size": ("pack", ["photos", "z.npy"], {"keep_aspect_ratio": True}),
    "max pixels": ("pack", ["photos", "z.npy"], {"max_pixels": -1}),
    "memory": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "memory": "much"}),
    "too little memory": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "memory": "5"}),
    "no threads": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "threads": 0}),
    "pack an array": ("pack", ["x.npy", "z.npy"], {}),
    "restore images": ("restore", ["photos", "out"], {}),
    "restore images of sizes": ("restore", ["sizes", "out"], {}),
    "restore bytes": ("restore", ["x.npy", "z.npy"], {"mode": "tf"}),
    "twice": ("preprocess", ["y.npy", "z.npy"], {"mode": "tf"}),
    "restore in another mode": ("restore", ["y.npy", "z.npy"], {"mode": "torch"}),
    "restore in another layout": ("restore", ["y.npy", "z.npy"], {"layout": "NCHW"}),
    "a foreign target": ("preprocess", ["x.npy", "foreign.npy"], {"mode": "tf"}),
    "a foreign partial": ("preprocess", ["x.npy", "locked.npy"], {"mode": "tf"}),
    "restart a foreign target": (
        "preprocess",
        ["x.npy", "foreign.npy"],
        {"mode": "tf", "restart": True},
    ),
    "a target of other settings": ("preprocess", ["x.npy", "y.npy"], {"mode": "torch"}),
    "an unfinished target of others": ("preprocess", ["x.npy", "u.npy"], {"mode": "torch"}),
    "an unfinished target, packed": ("pack", ["photos", "u.npy"], {}),
    "an unfinished source": ("preprocess", ["u.npy", "z.npy"], {"mode": "tf"}),
    "a damaged journal": ("preprocess", ["x.npy", "j.npy"], {"mode": "tf"}),
    "a damaged manifest": ("restore", ["bad.npy", "z.npy"], {}),
    "retry an array": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "retry_failed": True}),
    "retry and restart": (
        "pack",
        ["failing", "f.npy"],
        {"size": (7, 9), "retry_failed": True, "restart": True},
    ),
    "strict": ("restore", ["f.npy", "out"], {"mode": "tf", "strict": True}),
    "strict and finished": ("pack", ["failing", "f.npy"], {"size": (7, 9), "strict": True}),
    "bytes in place": ("preprocess", ["x.npy"], {"mode": "tf", "in_place": True}),
    "images in place": ("preprocess", ["photos"], {"mode": "tf", "in_place": True}),
    "an unknown suffix": ("preprocess", ["x.npy", "z.txt"], {"mode": "tf"}),
    "no directory": ("preprocess", ["x.npy", "no/z.npy"], {"mode": "tf"}),
    "links of an array": ("preprocess", ["x.npy", "z.npy"], {"mode": "tf", "follow_links": False}),
    "text": ("preprocess", ["text.txt", "z.npy"], {"mode": "tf"}),
    "an empty directory": ("pack", ["empty", "z.npy"], {}),
    "a damaged source": ("preprocess", ["damaged.npy", "z.npy"], {"mode": "tf"}),
    "verify nothing": ("verify", ["missing"], {}),
    "verify a source": ("verify", ["x.npy"], {}),
    "verify an unfinished target": ("verify", ["u.npy"], {}),
    "verify with a damaged manifest": ("verify", ["bad.npy"], {}),
    "info of nothing": ("info", ["missing"], {}),
    "info of a damaged journal": ("info", ["j.npy"], {}),
}


def error_in_python(command, arguments, options):
    calls = {"verify": fastvgg.verify, "info": fastvgg.info}
    call = calls.get(command, functools.partial(fastvgg.plan, direction=command))
    with pytest.raises(FastvggError) as caught:
        call(*arguments, **options)
    return caught.value


def arguments_of(options):
    """Write options as a command line does."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
            continue
        yield f"--{flag}"
        yield from map(str, value if isinstance(value, tuple) else [value])


@functools.cache
def options_of(command):
    """Return the options in the help of a command."""
    text = CliRunner().invoke(app, [command, "--help"], prog_name="fastvgg").stdout
    text = re.sub(r"--\[no-\](\S+)", r"--\1 --no-\1", text)
    return set(re.findall(r"--[a-z][a-z0-9-]*", text))


def check_words(place, monkeypatch, situation):
    command, arguments, options = SITUATIONS[situation]
    monkeypatch.chdir(place)
    before = names_in(place)
    error = error_in_python(command, arguments, options)
    assert "--" not in str(error), error
    assert not re.search(r"\b(SRC|DST)\b", str(error)), error
    written = [command, *arguments, *arguments_of(options)]
    result = CliRunner().invoke(app, written, prog_name="fastvgg", env={"COLUMNS": "200"})
    assert result.exit_code in (2, 3, 4), (result.exit_code, result.stderr, result.exception)
    assert result.exit_code == error.exit_code
    # An option of another command is named only with that command.
    own = re.sub(
        r"the command that[^.;]*|rerun the restore[^.;]*|fastvgg [a-z]+ .*", "", result.stderr
    )
    own = re.sub(r"Usage: .*|Try .*", "", own)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", own)) <= options_of(command), own
    assert not re.search(r"\b[a-z_]+=(True|False|'|\()", result.stderr), result.stderr
    assert "fastvgg.plan" not in result.stderr
    assert names_in(place) == before


@pytest.mark.parametrize("situation", SITUATIONS)
def test_failure_is_described_in_the_words_of_its_caller(place, monkeypatch, situation):
    check_words(place, monkeypatch, situation)


DESCRIBED = ["sizes", "damaged.npy", "bad.npy", "empty", "text.txt", "u.npy", "x.npy", "y.npy"]


@pytest.mark.parametrize("name", DESCRIBED)
def test_description_names_no_option_of_another_command(place, monkeypatch, name):
    monkeypatch.chdir(place)
    result = CliRunner().invoke(app, ["info", name], prog_name="fastvgg")
    assert result.exit_code == 0
    own = re.sub(r"rerun the command that[^.;]*", "", " ".join(result.stdout.split()))
    assert "--" not in own
    assert "--" not in str(fastvgg.info(name))
