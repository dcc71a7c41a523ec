"""Small jobs whose command can be given again and again, as after a crash."""

from __future__ import annotations

import shutil
import tarfile

import h5py
import numpy as np
import zarr

import fastvgg
from fastvgg import oracle
from fastvgg.datasets.index import INDEX_HEAD
from fastvgg.errors import SourceError
from fastvgg.stream.plan import RUN_BYTES
from fastvgg.stream.run import run
from tests.helpers.datasets_on_disk import npy_bytes, pixels, save_images

__all__ = ["DATA", "OF_FORMATS", "OF_IMAGES", "FormatJob", "ImageJob", "Job", "Wrong", "jobs"]

DATA = "x.npy"  # what is changed in place
TORN_REASON = "image file is truncated"
# Chunks of one and of two images, which share sectors and pages, and more of them than a ring has
# slots; and images of several pages.
SETTINGS = (
    {"in_place": True, "images": 8, "together": 1, "width": 11},
    {"in_place": True, "images": 13, "together": 2, "width": 17},
    {"in_place": False, "images": 5, "together": 2, "width": 11},
)
LARGER = (
    {"in_place": True, "images": 9, "together": 1, "width": 577},
    {"in_place": False, "images": 5, "together": 1, "width": 577},
)


class Wrong(AssertionError):  # noqa: N818  # what it says
    """Bytes, names or words that are not what they should be."""


class Job:
    """A command that can be given again and again in one directory.

    Parameters
    ----------
    directory
        An empty one. What is in it besides the source is what the command left.
    in_place, images, together, width
        What it does, to how many images, how many in a chunk, and how wide they are.
    """

    def __init__(self, directory, *, in_place, images, together, width):
        batch = pixels(images, height=1, width=width, seed=7).astype(np.float32)
        self.directory = directory
        self.in_place = in_place
        self.target = directory / (DATA if in_place else "y.npy")
        self.source = directory / DATA if in_place else directory.with_suffix(".npy")
        np.save(self.source, batch)
        stored = self.source.read_bytes()
        image_bytes = batch.nbytes // images
        self.settings = {"mode": "caffe", "threads": 1, "backend": "numpy", "in_place": in_place}
        self.settings["memory"] = RUN_BYTES + 3 * image_bytes * together
        self.original = stored
        self.before = stored if in_place else None
        computed = oracle.apply(fastvgg.Transform("caffe"), batch)
        self.expected = stored[: -batch.nbytes] + computed.tobytes()

    def reset(self):
        """Make the directory what it was before any command."""
        for path in list(self.directory.iterdir()):
            path.unlink()
        if self.in_place:
            self.source.write_bytes(self.original)

    def command(self, storage=None):
        """Give the command, and return whether it did its work, or had before.

        What was done in place is refused, and must then be right as it is.
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
        """What the directory holds, by name."""
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}

    def check_in_between(self, contents):
        """Check what anyone may find at any time: all of it, or nothing, or a journal."""
        target = self.target.name
        whole = [self.expected, self.before]
        if f"{target}.fastvgg.json" in contents:
            whole.remove(self.before)
        if not self.in_place or f"{target}.fastvgg-journal" not in contents:
            self.expect(contents.get(target) in whole, f"{target} is not whole, and none says so")

    def check_end(self):
        """Check what is there when the command has come to its end."""
        self.expect(self.target.read_bytes() == self.expected, "wrong bytes")
        self.expect(self.source.read_bytes() in (self.original, self.expected), "changed source")
        names = {path.name for path in self.directory.iterdir()}
        expected = {self.target.name, f"{self.target.name}.fastvgg.json"}
        self.expect(names == expected, f"{names} are left")
        fastvgg.verify(self.target)

    def expect(self, right, problem):
        """Raise if something is not right."""
        if not right:
            raise Wrong(f"{problem}: {self.target}")


class ImageJob(Job):
    """Images, one of them torn, from a folder or a tar into an array and its index.

    Parameters
    ----------
    directory
        An empty one.
    kind
        "folder", or "tar", or "failed": a finished array with failures, whose images were mended.
    images, together
        How many, and how many in a chunk.
    """

    def __init__(self, directory, *, kind, images, together):
        self.directory = directory
        self.in_place = False
        self.target = directory / "y.npy"
        self.source = directory.with_suffix(".photos")
        batch = pixels(images, height=3, width=5, seed=7)
        names = [f"{'ab'[2 * row // images]}/{row:03d}.png" for row in range(images)]
        save_images(self.source, batch, names)
        torn = self.source / names[1]
        whole = torn.read_bytes()
        torn.write_bytes(whole[:50])
        self.settings = {"mode": "torch", "size": (3, 5), "threads": 2, "backend": "numpy"}
        if kind == "tar":
            self.source = self._packed(directory.with_suffix(".tar"), names)
        self.settings["memory"] = self._memory(together)
        self._begun_with = {}
        if kind == "failed":
            self.command()
            self._begun_with = self.contents()
            self.settings["retry_failed"] = True
            torn.write_bytes(whole)
        else:
            batch[1] = 0
        rows = oracle.apply(fastvgg.Transform("torch"), batch)
        lines = [f"{row},{name},{name[0]},5,3,ok,\n" for row, name in enumerate(names)]
        if kind != "failed":
            rows[1] = 0
            lines[1] = f"1,{names[1]},a,5,3,failed,{TORN_REASON}\n"
        self.expected = npy_bytes(rows)
        self.expected_index = (INDEX_HEAD + "".join(lines)).encode()
        self.before = self._begun_with.get("y.npy")

    def _packed(self, path, names):
        with tarfile.open(path, "w") as shard:
            for name in names:
                shard.add(self.source / name, name)
        return path

    def _memory(self, together):
        plan = fastvgg.plan(self.source, self.target, **self.settings)
        chunk_bytes = together * plan.image_memory_bytes
        return max(2 * chunk_bytes, chunk_bytes + plan.min_scratch_bytes)

    def reset(self):
        """Make the directory what it was before any command."""
        for path in list(self.directory.iterdir()):
            path.unlink()
        for name, content in self._begun_with.items():
            (self.directory / name).write_bytes(content)

    def check_in_between(self, contents):
        """Check what anyone may find at any time."""
        found = contents.get("y.npy")
        self.expect(found in (None, self.before, self.expected), "y.npy is not whole")

    def check_end(self):
        """Check what is there when the command has come to its end."""
        contents = self.contents()
        names = {"y.npy", "y.npy.fastvgg.json", "y.npy.index.csv"}
        self.expect(contents.keys() == names, f"{contents.keys()} are left")
        self.expect(contents["y.npy"] == self.expected, "wrong bytes")
        self.expect(contents["y.npy.index.csv"] == self.expected_index, "wrong index")
        fastvgg.verify(self.target)


class FormatJob(Job):
    """An array into another format than .npy.

    Parameters
    ----------
    directory
        An empty one.
    form
        "zarr" or "hdf5".
    images, together
        How many, and how many in a chunk.
    """

    def __init__(self, directory, *, form, images, together):
        self.directory = directory
        self.in_place = False
        self.form = form
        self.before = None
        self.source = directory.with_suffix(".npy")
        batch = pixels(images, height=1, width=11, seed=7).astype(np.float32)
        np.save(self.source, batch)
        self.original = self.source.read_bytes()
        self.target = directory / {"zarr": "y.zarr", "hdf5": "y.h5"}[form]
        self.name = f"{self.target}::/x" if form == "hdf5" else self.target
        self.settings = {"mode": "caffe", "threads": 1, "backend": "numpy"}
        plan = fastvgg.plan(self.source, self.name, **self.settings)
        self.settings["memory"] = plan.min_scratch_bytes + together * plan.image_memory_bytes
        self.command()
        self._check_bits(oracle.apply(fastvgg.Transform("caffe"), batch))
        self.expected = self._of_target(self.contents())
        self.reset()

    def _check_bits(self, expected):
        """Check what the packages of the format read."""
        if self.form == "zarr":
            actual = zarr.open_array(self.target, mode="r")[:]
        else:
            with h5py.File(self.target) as file:
                actual = file["x"][:]
        self.expect(actual.tobytes() == expected.tobytes(), "wrong bits")

    def reset(self):
        """Make the directory what it was before any command."""
        shutil.rmtree(self.directory)
        self.directory.mkdir()

    def command(self, storage=None):
        """Give the command."""
        run(fastvgg.plan(self.source, self.name, **self.settings), storage=storage)
        return True

    def contents(self):
        """What the directory holds, by name."""
        paths = [path for path in self.directory.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in paths}

    def _of_target(self, contents):
        """What has the target's name, or names within it."""
        target = self.target.name
        return {
            name: content
            for name, content in contents.items()
            if name == target or name.startswith(f"{target}/")
        }

    def check_in_between(self, contents):
        """Check what anyone may find at any time."""
        found = self._of_target(contents)
        self.expect(found in ({}, self.expected), f"{self.target.name} is not whole")

    def check_end(self):
        """Check what is there when the command has come to its end."""
        contents = self.contents()
        names = {*self.expected, f"{self.target.name}.fastvgg.json"}
        self.expect(contents.keys() == names, f"{contents.keys()} are left")
        self.expect(self._of_target(contents) == self.expected, "wrong bytes")
        fastvgg.verify(self.name)


OF_FORMATS = (
    {"form": "zarr", "images": 7, "together": 2},
    {"form": "hdf5", "images": 5, "together": 2},
)
OF_IMAGES = (
    {"kind": "folder", "images": 9, "together": 2},
    {"kind": "tar", "images": 5, "together": 2},
    {"kind": "failed", "images": 7, "together": 2},
)


def kind_of(of_job, otherwise):
    """The class of a job, by its settings."""
    if "form" in of_job:
        return FormatJob
    return ImageJob if "kind" in of_job else otherwise


def jobs(place, kind=Job, settings=SETTINGS):
    """Make jobs, each in a directory of its own."""
    made = []
    for number, of_job in enumerate(settings):
        directory = place / str(number)
        directory.mkdir()
        made.append(kind_of(of_job, kind)(directory, **of_job))
    return made
