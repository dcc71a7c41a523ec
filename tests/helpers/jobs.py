"""Small jobs whose command can be rerun, as after a crash."""

from __future__ import annotations

import shutil
import tarfile

import h5py
import numpy as np
import zarr

import fastvgg
from fastvgg import oracle
from fastvgg.datasets.index import INDEX_HEADER
from fastvgg.errors import SourceError
from fastvgg.stream.plan import RUN_BYTES
from tests.helpers.datasets_on_disk import images_in, npy_bytes, pixels, save_images
from tests.helpers.runs import run

__all__ = [
    "DATA",
    "FORMAT_SETTINGS",
    "IMAGE_SETTINGS",
    "FormatJob",
    "ImageJob",
    "IncorrectStateError",
    "Job",
    "jobs",
]

DATA = "x.npy"  # the file that is changed in place
TORN_REASON = "image file is truncated"
# Chunks of one and of two images, which share sectors and pages; more chunks than redo log slots;
# and images that span several pages.
SETTINGS = (
    {"in_place": True, "images": 8, "images_per_chunk": 1, "width": 11},
    {"in_place": True, "images": 13, "images_per_chunk": 2, "width": 17},
    {"in_place": False, "images": 5, "images_per_chunk": 2, "width": 11},
)
LARGER = (
    {"in_place": True, "images": 9, "images_per_chunk": 1, "width": 577},
    {"in_place": False, "images": 5, "images_per_chunk": 1, "width": 577},
)


class IncorrectStateError(AssertionError):
    """The bytes, names or messages on disk are not as expected."""


class Job:
    """A command that can be rerun in one directory.

    Parameters
    ----------
    directory
        An empty directory. The command creates everything in it except the source.
    in_place, images, images_per_chunk, width
        Whether to run in place, the numbers of images in all and per chunk, and the image width.
    """

    def __init__(self, directory, *, in_place, images, images_per_chunk, width):
        batch = pixels(images, height=1, width=width, seed=7).astype(np.float32)
        self.directory = directory
        self.in_place = in_place
        self.target = directory / (DATA if in_place else "y.npy")
        self.source = directory / DATA if in_place else directory.with_suffix(".npy")
        np.save(self.source, batch)
        stored = self.source.read_bytes()
        image_bytes = batch.nbytes // images
        self.settings = {"mode": "caffe", "threads": 1, "backend": "numpy", "in_place": in_place}
        self.settings["memory"] = RUN_BYTES + 3 * image_bytes * images_per_chunk
        self.original = stored
        self.before = stored if in_place else None
        computed = oracle.apply(fastvgg.Transform("caffe"), batch)
        self.expected = stored[: -batch.nbytes] + computed.tobytes()

    def reset(self):
        """Restore the initial state of the directory."""
        for path in list(self.directory.iterdir()):
            path.unlink()
        if self.in_place:
            self.source.write_bytes(self.original)

    def command(self, storage=None):
        """Run the command; return False if the dataset was already processed in place.

        A finished in-place job is rejected; the data must then already be correct.
        """
        target = None if self.in_place else self.target
        try:
            run(fastvgg.plan(self.source, target, **self.settings), storage=storage)
        except SourceError as error:
            if not (self.in_place and "is already preprocessed" in error.problem):
                raise
            return False
        return True

    def contents(self):
        """Return the contents of the directory by name."""
        files = (path for path in self.directory.iterdir() if path.is_file())
        return {path.name: path.read_bytes() for path in files}

    def check_intermediate_state(self, contents):
        """Check the state after a crash: complete, unchanged, or with an unfinished journal."""
        target = self.target.name
        complete = [self.expected, self.before]
        if f"{target}.fastvgg.json" in contents:
            complete.remove(self.before)
        if not self.in_place or f"{target}.fastvgg-journal" not in contents:
            is_complete = contents.get(target) in complete
            self.check(is_complete, f"{target} is incomplete, without a journal")

    def check_final_state(self):
        """Check the directory after the command has finished."""
        self.check(self.target.read_bytes() == self.expected, "wrong bytes")
        self.check(self.source.read_bytes() in (self.original, self.expected), "changed source")
        names = {path.name for path in self.directory.iterdir()}
        expected = {self.target.name, f"{self.target.name}.fastvgg.json"}
        self.check(names == expected, f"unexpected files: {names}")
        fastvgg.verify(self.target)

    def check(self, condition, problem):
        """Raise if a condition does not hold."""
        if not condition:
            raise IncorrectStateError(f"{problem}: {self.target}")


class ImageJob(Job):
    """Decode images, one of them truncated, from a folder or tar into an array and its index.

    Parameters
    ----------
    directory
        An empty directory.
    kind
        "folder", "tar", or "failed": a finished array with failures, whose images were fixed.
    images, images_per_chunk
        The number of images, and of images per chunk.
    """

    def __init__(self, directory, *, kind, images, images_per_chunk):
        self.directory = directory
        self.in_place = False
        self.target = directory / "y.npy"
        self.source = directory.with_suffix(".photos")
        batch = pixels(images, height=3, width=5, seed=7)
        names = [f"{'ab'[2 * row // images]}/{row:03d}.png" for row in range(images)]
        save_images(self.source, batch, names)
        torn = self.source / names[1]
        intact = torn.read_bytes()
        torn.write_bytes(intact[:50])
        self.settings = {"mode": "torch", "size": (3, 5), "threads": 2, "backend": "numpy"}
        if kind == "tar":
            self.source = self._packed(directory.with_suffix(".tar"), names)
        self.settings["memory"] = self._memory(images_per_chunk)
        self._initial_contents = {}
        if kind == "failed":
            self.command()
            self._initial_contents = self.contents()
            self.settings["retry_failed"] = True
            torn.write_bytes(intact)
        else:
            batch[1] = 0
        rows = oracle.apply(fastvgg.Transform("torch"), batch)
        lines = [f"{row},{name},{name[0]},5,3,ok,\n" for row, name in enumerate(names)]
        if kind != "failed":
            rows[1] = 0
            lines[1] = f"1,{names[1]},a,5,3,failed,{TORN_REASON}\n"
        self.expected = npy_bytes(rows)
        self.expected_index = (INDEX_HEADER + "".join(lines)).encode()
        self.before = self._initial_contents.get("y.npy")

    def _packed(self, path, names):
        with tarfile.open(path, "w") as shard:
            for name in names:
                shard.add(self.source / name, name)
        return path

    def _memory(self, images_per_chunk):
        plan = fastvgg.plan(self.source, self.target, **self.settings)
        chunk_bytes = images_per_chunk * plan.image_memory_bytes
        return max(2 * chunk_bytes, chunk_bytes + plan.min_scratch_bytes)

    def reset(self):
        """Restore the initial state of the directory."""
        for path in list(self.directory.iterdir()):
            path.unlink()
        for name, content in self._initial_contents.items():
            (self.directory / name).write_bytes(content)

    def check_intermediate_state(self, contents):
        """Check what a reader may see at any time."""
        content = contents.get("y.npy")
        self.check(content in (None, self.before, self.expected), "y.npy is incomplete")

    def check_final_state(self):
        """Check the directory after the command has finished."""
        contents = self.contents()
        names = {"y.npy", "y.npy.fastvgg.json", "y.npy.index.csv"}
        self.check(contents.keys() == names, f"unexpected files: {contents.keys()}")
        self.check(contents["y.npy"] == self.expected, "wrong bytes")
        self.check(contents["y.npy.index.csv"] == self.expected_index, "wrong index")
        fastvgg.verify(self.target)


class FormatJob(Job):
    """Convert an array into a format other than .npy.

    Parameters
    ----------
    directory
        An empty directory.
    form
        "zarr", "hdf5", or "images": restored image files.
    images, images_per_chunk
        The number of images, and of images per chunk.
    """

    def __init__(self, directory, *, form, images, images_per_chunk):
        self.directory = directory
        self.in_place = False
        self.form = form
        self.before = None
        self.source = directory.with_suffix(".npy")
        batch = pixels(images, height=1, width=11, seed=7)
        result = oracle.apply(fastvgg.Transform("caffe"), batch.astype(np.float32))
        self.settings = {"mode": "caffe", "threads": 1, "backend": "numpy"}
        if form == "images":
            self.settings["direction"] = "restore"
            batch, result = result, batch
        np.save(self.source, batch.astype(np.float32))
        self.original = self.source.read_bytes()
        self.target = directory / {"zarr": "y.zarr", "hdf5": "y.h5", "images": "y"}[form]
        self.name = f"{self.target}::/x" if form == "hdf5" else self.target
        plan = fastvgg.plan(self.source, self.name, **self.settings)
        self.settings["memory"] = (
            plan.min_scratch_bytes + images_per_chunk * plan.image_memory_bytes
        )
        self.command()
        self._check_bits(result)
        self.expected = self._target_contents(self.contents())
        self.reset()

    def _check_bits(self, expected):
        """Check the array as read by the format's own library."""
        if self.form == "zarr":
            actual = zarr.open_array(self.target, mode="r")[:]
        elif self.form == "images":
            actual = np.stack([image for _, image in sorted(images_in(self.target).items())])
        else:
            with h5py.File(self.target) as file:
                actual = file["x"][:]
        self.check(actual.tobytes() == expected.tobytes(), "wrong bits")

    def reset(self):
        """Restore the initial state of the directory."""
        shutil.rmtree(self.directory)
        self.directory.mkdir()

    def command(self, storage=None):
        """Run the command."""
        run(fastvgg.plan(self.source, self.name, **self.settings), storage=storage)
        return True

    def contents(self):
        """Return the contents of the directory by name."""
        paths = [path for path in self.directory.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in paths}

    def _target_contents(self, contents):
        """Return the contents of the target: the file, or all files below it."""
        target = self.target.name
        return {
            name: content
            for name, content in contents.items()
            if name == target or name.startswith(f"{target}/")
        }

    def check_intermediate_state(self, contents):
        """Check what a reader may see at any time."""
        files = self._target_contents(contents)
        self.check(files in ({}, self.expected), f"{self.target.name} is incomplete")

    def check_final_state(self):
        """Check the directory after the command has finished."""
        contents = self.contents()
        names = {*self.expected, f"{self.target.name}.fastvgg.json"}
        self.check(contents.keys() == names, f"unexpected files: {contents.keys()}")
        self.check(self._target_contents(contents) == self.expected, "wrong bytes")
        fastvgg.verify(self.name)


FORMAT_SETTINGS = (
    {"form": "zarr", "images": 7, "images_per_chunk": 2},
    {"form": "hdf5", "images": 5, "images_per_chunk": 2},
    {"form": "images", "images": 5, "images_per_chunk": 2},
)
IMAGE_SETTINGS = (
    {"kind": "folder", "images": 9, "images_per_chunk": 2},
    {"kind": "tar", "images": 5, "images_per_chunk": 2},
    {"kind": "failed", "images": 7, "images_per_chunk": 2},
)


def kind_of(job_settings, default):
    """Return the class of a job with these settings."""
    if "form" in job_settings:
        return FormatJob
    return ImageJob if "kind" in job_settings else default


def jobs(parent, kind=Job, settings=SETTINGS):
    """Create jobs, each in its own subdirectory of `parent`."""
    all_jobs = []
    for number, job_settings in enumerate(settings):
        directory = parent / str(number)
        directory.mkdir()
        all_jobs.append(kind_of(job_settings, kind)(directory, **job_settings))
    return all_jobs
