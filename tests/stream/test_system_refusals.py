"""What the system refuses before a run has written anything: exit code 3, and nothing changes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastvgg import cli
from tests.helpers.datasets_on_disk import pixels, plan_of, save_npy, stdout_of, tree
from tests.helpers.file_systems import FileSystemUnavailable, call
from tests.helpers.private_disks import REMOUNT, mount, use_private_mounts

NOBODY = 65534
READ_ONLY = 1  # of mount(2)
KINDS = {"npy": "y.npy", "hdf5": "y.h5::/y", "zarr": "y.zarr", "images": "y"}
RUN_ALL = """
import sys
from tests.stream.test_system_refusals import run_all
print(run_all(sys.argv[1]))
"""


def directory_of_another_user(out):
    become_nobody()


def read_only_directory(out):
    os.chown(out, NOBODY, NOBODY)
    out.chmod(0o555)
    become_nobody()


def immutable_directory(out):
    change_attributes("+i", out)


def read_only_disk(out):
    mount("none", out, "tmpfs")
    make_file_to_convert(out)
    mount("none", out, "none", REMOUNT | READ_ONLY)


def full_disk(out):
    mount("none", out, "tmpfs", options="size=64k")
    make_file_to_convert(out)
    with (out / "other").open("wb", buffering=0) as file:
        while file.write(bytes(4096)) == 4096 and shutil.disk_usage(out).free:
            pass


def disk_without_free_inodes(out):
    mount("none", out, "tmpfs", options="size=8m,nr_inodes=4")
    make_file_to_convert(out)
    (out / "other").touch()


def missing_directory(out):
    shutil.rmtree(out)


def directory_of_the_kernel(out):
    shutil.rmtree(out)
    out.symlink_to("/proc")


def sticky_directory_of_another_user(out):
    make_finished_datasets(out)
    for path in [out, *out.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    out.chmod(0o1777)
    become_nobody()


def sticky_directory_with_failures_to_retry(out):
    sticky_directory_of_another_user(out)


def immutable_datasets(out):
    make_finished_datasets(out)
    change_attributes("+i", *out.iterdir())


CONDITIONS = {
    directory_of_another_user: [*KINDS, "in place"],
    read_only_directory: [*KINDS, "in place"],
    immutable_directory: [*KINDS, "in place"],
    read_only_disk: [*KINDS, "in place"],
    full_disk: [*KINDS, "in place"],
    disk_without_free_inodes: [*KINDS, "in place"],
    missing_directory: [*KINDS],
    directory_of_the_kernel: [*KINDS],
    sticky_directory_of_another_user: [*KINDS, "restore in place"],
    sticky_directory_with_failures_to_retry: ["retry"],
    immutable_datasets: [*KINDS, "restore in place", "retry"],
}


def become_nobody():
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def change_attributes(attributes, *paths):
    call("chattr", attributes, *paths)


def make_file_to_convert(out):
    path = save_npy(out / "z.npy", pixels(11).astype(np.float32))
    path.chmod(0o666)


def make_finished_datasets(out):
    inputs = out.parent / "in"
    for kind in KINDS:
        run(kind, inputs, out)
    plan_of(out / "z.npy", None, in_place=True, mode="caffe").run()
    plan_of(inputs / "photos", out / "retried.npy", mode="caffe").run()


def run(kind, inputs, out, *options):
    """Run a command in this process; return its exit code and what it printed."""
    source = inputs / ("x.npy" if kind != "images" else "inputs.npy")
    arguments = {
        "images": ["restore", source, out / "y"],
        "in place": ["preprocess", out / "z.npy", "--in-place", "--mode", "caffe"],
        "restore in place": ["restore", out / "z.npy", "--in-place"],
        "retry": [
            *("preprocess", inputs / "photos", out / "retried.npy"),
            *("--mode", "caffe", "--retry-failed"),
        ],
    }.get(kind, ["preprocess", source, f"{out}/{KINDS.get(kind)}", "--mode", "caffe"])
    done = CliRunner().invoke(cli.app, [*map(str, arguments), "--threads", "1", *options])
    return done.exit_code, done.output


def run_all(directory):
    """Return, as JSON, what every condition and kind of run does, each in a process of its own."""
    os.umask(0o022)
    use_private_mounts()
    # Another user may not be able to import anything from this checkout.
    run_kinds(make_finished_datasets, [*KINDS, "in place", "retry"], Path(directory) / "imported")
    results = {}
    for number, (make, kinds) in enumerate(CONDITIONS.items()):
        read_end, write_end = os.pipe()
        if os.fork() == 0:
            found = run_kinds(make, kinds, Path(directory) / str(number))
            os.write(write_end, json.dumps(found).encode())
            os._exit(0)
        os.close(write_end)
        with open(read_end, "rb") as pipe:  # noqa: PTH123
            results[make.__name__] = json.loads(pipe.read() or '"it died"')
        os.wait()
    return json.dumps(results)


def run_kinds(make, kinds, place):
    """Return the exit code, the output and what changed of each kind of run in a condition."""
    inputs, out = place / "in", place / "out"
    for path in (place, inputs, out):
        path.mkdir()
    save_npy(inputs / "x.npy", pixels(11))
    plan_of(inputs / "x.npy", inputs / "inputs.npy", mode="caffe").run()
    (inputs / "photos").mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(inputs.parents[1] / "image.png", inputs / "photos" / name)
    (inputs / "photos" / "1.png").write_bytes(b"torn")
    make_file_to_convert(out)
    try:
        make(out)
    except (OSError, FileSystemUnavailable) as error:
        return str(error)
    restart = ["--restart"] if (out / "y.zarr").exists() else []
    results = {}
    for kind in kinds:
        before = state_of(out)
        results[kind] = [*run(kind, inputs, out, *(restart if kind in KINDS else [])), []]
        after = state_of(out)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        results[kind][2] = sorted(map(os.fsdecode, changed))
    return results


def state_of(out):
    return {} if out.is_symlink() or not out.exists() else tree(out)


@pytest.fixture(scope="module")
def outcomes():
    """What each condition and kind of run does."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:  # whose parents any user may enter
        directory = Path(name)
        directory.chmod(0o755)
        Image.fromarray(pixels(1)[0]).save(directory / "image.png")
        try:
            yield json.loads(stdout_of(RUN_ALL, directory))
        finally:
            with contextlib.suppress(FileSystemUnavailable):
                call("chattr", "-R", "-i", directory)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make, kind) for make, kinds in CONDITIONS.items() for kind in kinds],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_the_system_refuses_before_the_first_byte_exits_with_3(outcomes, make, kind):
    found = outcomes[make.__name__]
    if isinstance(found, str):
        pytest.skip(f"this machine cannot make this condition: {found}")
    code, output, changed = found[kind]
    assert (code, changed) == (3, []), output
