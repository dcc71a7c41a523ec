"""Where a dataset is: its file, its name within, and what lies beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvgg.storage.location import (
    container_of,
    inner_name,
    is_remote,
    parse_location,
    sidecar_path,
    with_inner,
)


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
        # What is no HDF5 file is all name of a file.
        ("x.npy", "x.npy", ""),
        ("x.npy::/a", "x.npy::/a", ""),
        ("x.h5.npy", "x.h5.npy", ""),
        ("x.h5/y.npy", "x.h5/y.npy", ""),
        ("xh5::/a", "xh5::/a", ""),
        ("photos", "photos", ""),
    ],
)
def test_a_path_is_that_of_a_file_and_of_a_dataset_in_it(path, file, dataset):
    assert (container_of(Path(path)), inner_name(Path(path))) == (Path(file), dataset)


@pytest.mark.parametrize("path", ["/d/x.h5::/a/b", "/d/x.h5"])
def test_what_lies_beside_is_named_after_the_file(path):
    assert sidecar_path(Path(path), ".index.csv") == Path("/d/x.h5.index.csv")


@pytest.mark.parametrize(
    "path", ["x.h5::/a/b", "./x.h5::a/b", "no/../x.h5::/a/b/", "x.h5::a//b", "x.h5::/./a/./b"]
)
def test_a_dataset_has_one_name_however_it_is_written(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert parse_location(path) == tmp_path / "x.h5::/a/b"
    assert str(parse_location(path)) == f"{tmp_path}/x.h5::/a/b"


def test_a_step_up_within_a_file_does_not_lead_out_of_it(tmp_path):
    assert container_of(parse_location(tmp_path / "x.h5::/../y")) == tmp_path / "x.h5"
    assert container_of(parse_location(f"{tmp_path}/x.h5::/..")) == tmp_path / "x.h5"


@pytest.mark.parametrize("path", ["/d/x.npy", "/d/x.h5", "/d/x.h5::/a"])
def test_a_path_can_be_put_together_again(path):
    assert with_inner(container_of(Path(path)), inner_name(Path(path))) == Path(path)


def test_a_path_is_made_absolute_and_keeps_its_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert parse_location("link/x.h5::/b") == tmp_path / "link" / "x.h5::" / "b"
    assert parse_location(Path("x.npy")) == tmp_path / "x.npy"


@pytest.mark.parametrize("url", ["memory://a/x.zarr", "memory://a/b/x.zarr"])
def test_a_url_stays_one(url):
    location = parse_location(url)
    assert is_remote(location)
    assert str(location) == url
    assert str(parse_location(location)) == url
    assert container_of(location) == location
    assert inner_name(location) == ""
    assert str(sidecar_path(location, ".fastvgg.json")) == f"{url}.fastvgg.json"
    assert str(location / "c") == f"{url}/c"
