"""Locations: the container, the dataset within it, and sidecars."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
from upath import UPath

from fastvgg.errors import SourceError, UsageError
from fastvgg.storage.location import Location, sidecar_path


@pytest.mark.parametrize(
    ("path", "file", "dataset"),
    [
        ("x.h5::/images", "x.h5", "/images"),
        ("x.h5::images", "x.h5", "/images"),
        ("x.h5::/a/b", "x.h5", "/a/b"),
        ("x.h5::/a/b/", "x.h5", "/a/b"),
        ("x.h5::a//b", "x.h5", "/a/b"),
        ("x.hdf5::/a", "x.hdf5", "/a"),
        ("X.H5::/A", "X.H5", "/A"),
        ("x.h5", "x.h5", ""),
        ("x.h5::", "x.h5", ""),
        ("x.h5::/", "x.h5", ""),
        ("x.h5::/a::b", "x.h5", "/a::b"),
        ("x.h5::/y.h5::/b", "x.h5", "/y.h5::/b"),
        ("x.h5::/two words\n", "x.h5", "/two words\n"),
        ("x.h5.d/y.h5::/a", "x.h5.d/y.h5", "/a"),
        ("a::b/x.h5::/a", "a::b/x.h5", "/a"),
        ("a::b/x.h5", "a::b/x.h5", ""),
        # With another suffix, or none, the name must begin with a slash.
        ("x.mat::/a", "x.mat", "/a"),
        ("x.nc::/a/b/", "x.nc", "/a/b"),
        ("x::/a", "x", "/a"),
        ("a/x.mat::/b::/c", "a/x.mat", "/b::/c"),
        ("x.mat::a", "x.mat::a", ""),
        ("a::b/x.mat", "a::b/x.mat", ""),
        ("x.npy::/a", "x.npy", "/a"),
        ("x.npy", "x.npy", ""),
        ("x.h5.npy", "x.h5.npy", ""),
        ("x.h5/y.npy", "x.h5/y.npy", ""),
        ("xh5::/a", "xh5", "/a"),
        ("photos", "photos", ""),
    ],
)
def test_path_is_parsed_into_container_and_inner_dataset(
    tmp_path, monkeypatch, path, file, dataset
):
    monkeypatch.chdir(tmp_path)
    assert Location.parse(Path(path)) == Location(tmp_path / file, dataset)


def test_a_sidecar_is_named_after_the_container():
    assert sidecar_path(Path("/d/x.h5"), ".index.csv") == Path("/d/x.h5.index.csv")


@pytest.mark.parametrize(
    "path", ["x.h5::/a/b", "./x.h5::a/b", "no/../x.h5::/a/b/", "x.h5::a//b", "x.h5::/./a/./b"]
)
def test_equivalent_paths_parse_to_the_same_location(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert Location.parse(path) == Location(tmp_path / "x.h5", "/a/b")
    assert str(Location.parse(path)) == f"{tmp_path}/x.h5::/a/b"


def test_parent_references_do_not_escape_the_container(tmp_path):
    assert Location.parse(tmp_path / "x.h5::/../y").container == tmp_path / "x.h5"
    assert Location.parse(f"{tmp_path}/x.h5::/..").container == tmp_path / "x.h5"


@pytest.mark.parametrize("path", ["/d/x.npy", "/d/x.h5", "/d/x.h5::/a"])
def test_location_string_round_trips(path):
    location = Location.parse(path)
    assert str(location) == path
    assert Location.parse(str(location)) == location
    assert location.with_inner("/b") == Location(location.container, "/b")


def test_path_becomes_absolute_without_resolving_symlinks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert Location.parse("link/x.h5::/b") == Location(tmp_path / "link" / "x.h5", "/b")
    assert Location.parse(Path("x.npy")) == Location(tmp_path / "x.npy")


@pytest.mark.parametrize("url", ["memory://a/x.zarr", "memory://a/b/x.zarr"])
def test_url_round_trips(url):
    location = Location.parse(url)
    assert location.is_remote
    assert str(location) == url
    assert Location.parse(str(location)) == copy.deepcopy(location) == location
    assert location.inner == ""
    assert str(sidecar_path(location.container, ".fastvgg.json")) == f"{url}.fastvgg.json"
    assert str(location.container / "c") == f"{url}/c"


def test_path_like_and_bytes_paths_are_accepted(tmp_path):
    (tmp_path / "x.npy").touch()
    (entry,) = os.scandir(tmp_path)
    for path in (entry, os.fsencode(tmp_path / "x.npy"), Location(tmp_path / "x.npy")):
        assert Location.parse(path) == Location(tmp_path / "x.npy")


def test_storage_options_are_kept():
    path = UPath("memory://a/x.zarr", auto_mkdir=True)
    assert Location.parse(path).container is path


@pytest.mark.parametrize("path", ["", b"", "file://", "a\0b", None, 7, ["x.npy"]])
def test_non_path_is_rejected(path):
    with pytest.raises(UsageError, match="is not a path"):
        Location.parse(path)


@pytest.mark.parametrize(
    "url",
    ["file:///d/x.zarr", "FILE:///d/x.zarr", "file://localhost/d/x.zarr", "local:///d/x.zarr"],
)
def test_url_of_a_local_file_is_its_path(url):
    assert Location.parse(url) == Location(Path("/d/x.zarr"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("zip://x.zarr", ["archive", "unzip"]),
        ("zip:///d/x.zarr.zip", ["archive", "unzip"]),
        ("zip://::/d/x.zarr.zip", ["archive", "unzip"]),
        ("tar://x", ["archive"]),
        ("http://host/x.zarr", ["http://", "download"]),
        ("https://host/x.npy", ["https://", "download"]),
        ("simplecache::http://host/x.zarr", ["http://", "download"]),
        ("simplecache::s3://b/x.zarr", ["download"]),
        ("reference://x", ["reference://"]),
        ("ftp://host/x.zarr", ["ftp://"]),
        ("foo://b/x.zarr", ["foo://"]),
        (UPath("http://host/x.zarr"), ["http://", "download"]),
        ("hf://b/x.zarr", ["hf://b/x.zarr"]),
    ],
    ids=str,
)
def test_url_that_cannot_be_read_is_rejected(url, words):
    with pytest.raises(SourceError) as caught:
        Location.parse(url)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize("url", ["s3://", "s3:///", "memory://"])
def test_store_without_a_name_is_rejected(url):
    with pytest.raises(UsageError, match="names no dataset"):
        Location.parse(url)
