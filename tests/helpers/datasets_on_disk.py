"""Create, read and compare datasets on disk, and run Python in separate processes."""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

import fastvgg
from fastvgg import oracle
from fastvgg.datasets.open import open_source
from fastvgg.storage.location import Location
from fastvgg.transform import Transform
from tests.helpers.batches import dtype_of
from tests.helpers.checkout import checkout_environment

# Part of the wheel of scikit-image: nothing is downloaded.
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"


def pixels(images=5, height=7, width=9, seed=1):
    """Return a uint8 batch of images that differ from each other."""
    shape = (images, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def npy_bytes(array):
    """Return the content of the file that numpy.save writes."""
    written = io.BytesIO()
    np.save(written, array)
    return written.getvalue()


def save_npy(path, array):
    path.write_bytes(npy_bytes(array))
    return path


def save_images(directory, batch, names=None):
    """Write a batch as lossless images, by default in class folders a and b."""
    names = names or [f"{'ab'[row % 2]}/{row:02d}.png" for row in range(len(batch))]
    for name, image in zip(names, batch, strict=True):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return directory


def rows_by_name(directory, batch):
    """Return the batch that `save_images` wrote without names, in the order of the source."""
    names = sorted(f"{'ab'[row % 2]}/{row:02d}" for row in range(len(batch)))
    assert directory.is_dir()
    return batch[[int(name[2:]) for name in names]]


def network_inputs(batch, mode, *, out_layout="NHWC", dtype="float32"):
    """Return the oracle's result for a batch of images."""
    return oracle.apply(Transform(mode, out_layout=out_layout, dtype=dtype), batch)


def load(path, name):
    """Read a finished .npy with NumPy only."""
    stored = np.load(path)
    return stored.view(dtype_of("bfloat16")) if name == "bfloat16" else stored


def images_in(directory):
    """Decode every file below a directory; return the images by relative name."""
    return {
        str(path.relative_to(directory)): np.asarray(Image.open(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def opened(location, **options):
    """Open the source at a location given as a string or path."""
    return open_source(Location.parse(location), **options)


def plan_of(source, target, *, images_per_chunk=None, **settings):
    """Plan with the NumPy backend, in chunks of `images_per_chunk` images."""
    settings = {"backend": "numpy", "threads": 1, **settings}
    if images_per_chunk is None:
        return fastvgg.plan(source, target, **settings)
    return fastvgg.plan(
        source, target, **settings, memory=memory_for(images_per_chunk, source, target, **settings)
    )


def memory_for(images_per_chunk, source, target, **settings):
    """Return the memory limit for which `plan_of` has chunks of `images_per_chunk` images."""
    plan = plan_of(source, target, **settings)
    chunk_bytes = images_per_chunk * plan.image_memory_bytes
    limit_bytes = chunk_bytes + plan.min_scratch_bytes
    if plan.job.is_decoded:  # half of the limit is for decoding
        limit_bytes = max(limit_bytes, 2 * chunk_bytes)
    return limit_bytes


def commits_in(target):
    """Return the number of chunks in the journal of an unfinished run: its lines minus one."""
    return Path(f"{target}.fastvgg-journal").read_bytes().count(b"\n") - 1


def tree(directory):
    """Return everything below a directory by name: file contents, link targets or file types."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        name = os.fsencode(path.relative_to(directory))
        if stat.S_ISREG(mode):
            entries[name] = path.read_bytes()
        else:
            entries[name] = path.readlink() if path.is_symlink() else stat.S_IFMT(mode)
    return entries


def names_in(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def data_tree(directory):
    """Return `tree` without the manifest's date, which differs between runs."""
    return {
        name: re.sub(rb'"created": "[^"]*"', b"", content)
        if isinstance(content, bytes)
        else content
        for name, content in tree(directory).items()
    }


def python(source, *arguments, **settings):
    """Run Python source in a separate process that imports from this checkout.

    The timeout detects a hanging process, not a slow one.
    """
    return subprocess.run(
        [sys.executable, "-c", source, *map(os.fspath, arguments)],
        env=checkout_environment(**settings.pop("env", {})),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **settings,
    )


def stdout_of(source, *arguments, **settings):
    """Return the standard output of a process, which must succeed."""
    done = python(source, *arguments, **settings)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


PERMISSION_OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


def drop_permission_override():
    """Drop root's privilege to ignore the permissions of files."""
    if os.geteuid() == 0:
        _set_capabilities(lambda now: [low & ~PERMISSION_OVERRIDES for low in now[:3]])


def keep_permission_override():
    """Have the privilege to ignore the permissions of files, if it is permitted, and no other."""
    _set_capabilities(lambda _now: [PERMISSION_OVERRIDES, PERMISSION_OVERRIDES, 0])


def _set_capabilities(choose):
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the API, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their high words
    failed = library.capget(header, sets)
    sets[:3] = choose(sets)
    if failed or library.capset(header, sets):
        raise OSError(ctypes.get_errno(), "this process cannot set its capabilities")


@contextlib.contextmanager
def permissions(path, mode):
    """Change the permissions of a path temporarily."""
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    try:
        yield path
    finally:
        path.chmod(before)


def stdout_on_small_disk(directory, disk_bytes, source):
    """Run Python source in a process that has a small private disk at `directory`."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare command to create a mount namespace")
    private = [unshare, "-m"] if os.geteuid() == 0 else [unshare, "-rm"]
    mount = f"mount -t tmpfs -o size={disk_bytes} tmpfs {directory}"
    if subprocess.run([*private, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounts in a private namespace")
    done = subprocess.run(
        [*private, "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, source],
        env=checkout_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@contextlib.contextmanager
def ascii_failures():
    """Fail with an ASCII message, which pytest-xdist can send between processes."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        raise AssertionError(ascii(error)) from None


REMEDY_VERBS = re.compile(
    r"\b(change|check|choose|convert|copy|create|decompress|download|finish|fix|free|get|give|"
    r"install|make|move|name|omit|preprocess|put|recreate|remove|repair|replace|rerun|restore|rewrite|run|"
    r"start|store|use|wait|write)\b"
)


def check_error(error, *words):
    """Check that the message of an error contains all words, and that its remedy has a verb."""
    missing = [word for word in map(str, words) if word not in str(error)]
    assert not missing, f"{missing} not in: {error}"
    assert REMEDY_VERBS.search(error.remedy), f"remedy without an action: {error.remedy!r}"


def count_cached_pages(descriptor):
    """Return the number of pages of a writable file that are in the page cache."""
    with mmap.mmap(descriptor, 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        window = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        address, nbytes = ctypes.c_void_p(ctypes.addressof(window)), ctypes.c_size_t(len(mapped))
        assert ctypes.CDLL(None).mincore(address, nbytes, pages) == 0
        del window
    return sum(page & 1 for page in pages)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise in the main thread if the block takes longer, for example if it blocks on a pipe."""

    def end(*_):
        raise AssertionError(f"still waiting after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
