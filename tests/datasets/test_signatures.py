"""What a file contains is found by its first bytes; what is not read is named, with a way out."""

from __future__ import annotations

import gzip
import io
import pickle
import shlex
import shutil
import zipfile
from contextlib import closing

import h5py
import numpy as np
import pytest
from PIL import Image

from fastvgg.errors import FastvggError, SourceError, TargetError
from fastvgg.storage.location import Location
from tests.helpers.batches import assert_same
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    npy_bytes,
    opened,
    pixels,
    plan_of,
    save_npy,
)
from tests.helpers.zarr_on_disk import save_zarr


def check_pixels(location, kind):
    with closing(opened(location)) as source:
        assert source.kind == kind
        assert_same(source.read(0, 5).batch, pixels())


@pytest.mark.parametrize(
    "name", ["x.mat", "x.nc", "x.hdf", "x.h5ad", "x", "x.npy", "x.HE5", "x.tar.d"]
)
@pytest.mark.parametrize("user_block", [0, 512, 1024, 4096])
def test_hdf5_is_read_whatever_its_name(tmp_path, name, user_block):
    with h5py.File(tmp_path / name, "w", userblock_size=user_block) as file:
        file["x"] = pixels()
    with (tmp_path / name).open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(user_block)[:user_block])
    check_pixels(f"{tmp_path / name}::/x", "hdf5")
    with pytest.raises(SourceError, match="which dataset"):
        opened(tmp_path / name)


def test_hdf5_of_matlab_is_converted_verified_and_resumed_by_its_name(tmp_path):
    with h5py.File(tmp_path / "x.mat", "w") as file:
        file["x"] = pixels()
    plan_of(f"{tmp_path}/x.mat::/x", tmp_path / "y.npy", mode="tf").run()
    assert np.load(tmp_path / "y.npy").shape == (5, 7, 9, 3)


@pytest.mark.parametrize("name", ["x.dat", "x", "x.h5", "x.zarr", "x.bin.old"])
def test_npy_is_read_whatever_its_name(tmp_path, name):
    save_npy(tmp_path / name, pixels())
    check_pixels(tmp_path / name, "npy")
    plan_of(tmp_path / name, tmp_path / "y.npy", mode="tf").run()


def test_npy_has_no_named_datasets(tmp_path):
    save_npy(tmp_path / "x.h5", pixels())
    with pytest.raises(SourceError) as caught:
        opened(f"{tmp_path}/x.h5::/x")
    check_error(caught.value, f"{tmp_path}/x.h5 is a .npy file", "without a name")


def zipped(*names, content=b""):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return written.getvalue()


def encoded(kind):
    written = io.BytesIO()
    Image.fromarray(pixels()[0]).save(written, kind)
    return written.getvalue()


def npz(**arrays):
    written = io.BytesIO()
    np.savez(written, **arrays)
    return written.getvalue()


FOREIGN = {
    "x.npz": (npz(x=pixels()), ["a .npz", "numpy.save"]),
    "npz named.npy": (npz(x=pixels()), ["a .npz", "numpy.load"]),
    "x.pt": (zipped("archive/data.pkl"), ["PyTorch", "torch.load"]),
    "old.pth": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j", ["PyTorch"]),
    "x.zarr.zip": (zipped("zarr.json", "c/0/0/0/0"), ["a zipped Zarr array", "unzip"]),
    "no suffix": (zipped(".zgroup"), ["a zipped Zarr array"]),
    "photos.zip": (zipped("cat/a.jpg"), ["a zip archive", "unpack"]),
    "zip named.npy": (zipped("cat/a.jpg"), ["a zip archive"]),
    "empty.zip": (zipped(), ["a zip archive"]),
    "x.keras": (zipped("metadata.json"), ["a Keras model"]),
    "x.safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"x":{"dtype":"F32"', ["safetensors", "load_file"]),
    "x.parquet": (b"PAR1" + b"\0" * 99, ["a Parquet file"]),
    "x.arrow": (b"ARROW1\0\0", ["an Arrow file"]),
    "x.csv": (b"path,label\na.jpg,cat\n", ["text", "directory"]),
    "x.txt": (b"a.jpg\n", ["text"]),
    "x.jpg": (encoded("jpeg"), ["a single image", "directory"]),
    "x.png": (encoded("png"), ["a single image"]),
    "x.webp": (encoded("webp"), ["a single image"]),
    "x.gif": (encoded("gif"), ["a single image"]),
    "x.bmp": (encoded("bmp"), ["a single image"]),
    "x.tif": (encoded("tiff"), ["a single image"]),
    "x.ppm": (encoded("ppm"), ["a single image"]),
    "big.tif": (b"II+\0\x08\0\0\0", ["a single image"]),
    "x.heic": (b"\0\0\0\x18ftypheic", ["a single image"]),
    "x.jxl": (b"\0\0\0\x0cJXL ", ["a single image"]),
    "image named.npy": (encoded("png"), ["a single image"]),
    "v5.mat": (b"MATLAB 5.0 MAT-file, Platform: GLNXA64", ["MATLAB", "7.3", "scipy.io.loadmat"]),
    "v3.nc": (b"CDF\x01" + b"\0" * 28, ["NetCDF 3", "nccopy"]),
    "cdf5.nc": (b"CDF\x05" + b"\0" * 28, ["NetCDF 3"]),
    "v4.hdf": (b"\x0e\x03\x13\x01" + b"\0" * 28, ["HDF4", "h4toh5"]),
    "x.pkl": (pickle.dumps(pixels()), ["pickle", "never loaded"]),
    "x.npy.gz": (gzip.compress(npy_bytes(pixels())), ["compressed", "decompress"]),
    "x.mp4": (b"\0\0\0\x20ftypisom" + b"\0" * 28, ["a video", "ffmpeg"]),
    "x.7z": (b"7z\xbc\xaf\x27\x1c", ["an archive"]),
    "tar named.dat": (b"\0" * 257 + b"ustar", ["a tar", "mv"]),
    "unknown.dat": (b"\x01\x02\x03" * 99, ["is not a directory of images"]),
    "empty.dat": (b"", ["is not a directory of images"]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_file_that_is_not_read_is_described_with_a_remedy(tmp_path, name):
    content, words = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    for location in (tmp_path / name, f"{tmp_path / name}::/x"):
        with pytest.raises(SourceError) as caught:
            plan_of(location, tmp_path / "y.npy", mode="tf")
        check_error(caught.value, tmp_path / name)
        assert "\n" not in caught.value.problem
        if "is not a directory of images" in words and "::" in str(location):
            assert "is not an HDF5 file" in caught.value.problem
        else:
            check_error(caught.value, *words)
    assert names_in(tmp_path) == [name]


def test_remedies_that_are_commands_run(tmp_path):
    save_zarr(tmp_path / "x.zarr", pixels())
    shutil.make_archive(tmp_path / "a b.zarr", "zip", tmp_path / "x.zarr")
    (tmp_path / "x.npz").write_bytes(npz(NAME=pixels()))
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / "a b.zarr.zip")
    command = caught.value.remedy.rpartition(": ")[2]
    assert command.startswith("unzip ")
    _, archive, _, directory = shlex.split(command)
    shutil.unpack_archive(archive, tmp_path / directory, "zip")
    check_pixels(tmp_path / directory, "zarr")
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / "x.npz")
    command = caught.value.remedy.partition(": ")[2]
    exec(command.replace("new.npy", f"{tmp_path}/new.npy"), {"numpy": np})  # noqa: S102
    check_pixels(tmp_path / "new.npy", "npy")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.zarr::/x", ["is a directory", "x.zarr"]),
        ("file.zarr", ["is a file, but a Zarr array is a directory"]),
        ("missing.mat::/x", ["does not exist"]),
    ],
)
def test_container_of_another_kind_is_rejected(tmp_path, name, words):
    save_zarr(tmp_path / "x.zarr", pixels())
    (tmp_path / "file.zarr").write_bytes(b"\1\2")
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / name)
    check_error(caught.value, *words)


@pytest.mark.parametrize("name", ["y.mat::/x", "y::/x", "y.npy::/x"])
def test_named_dataset_is_written_only_to_hdf5(tmp_path, name):
    save_npy(tmp_path / "x.npy", pixels())
    with pytest.raises(TargetError) as caught:
        plan_of(tmp_path / "x.npy", tmp_path / name, mode="tf")
    check_error(caught.value, tmp_path / name, f"{tmp_path}/y.h5::/x")
    plan_of(tmp_path / "x.npy", caught.value.remedy.split()[1].rstrip(","), mode="tf").run()
    with pytest.raises(FastvggError):
        opened(Location(tmp_path / "missing"))
