"""Where a dataset is: paths, names within files, URLs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvgg.datasets.locations import beside_path, dataset_of, file_of, is_remote, located

PARTS = {
    "/a/x.npy": ("/a/x.npy", ""),
    "/a/x.h5": ("/a/x.h5", ""),
    "/a/x.h5::": ("/a/x.h5", ""),
    "/a/x.h5::/": ("/a/x.h5", ""),
    "/a/x.h5::x": ("/a/x.h5", "/x"),
    "/a/x.h5::/x": ("/a/x.h5", "/x"),
    "/a/x.h5::/b/c": ("/a/x.h5", "/b/c"),
    "/a/X.HDF5::/b": ("/a/X.HDF5", "/b"),
    "/a/x.h5::/b::c": ("/a/x.h5", "/b::c"),
    "/a/we::ird.npy": ("/a/we::ird.npy", ""),
    "/a::b/x.npy": ("/a::b/x.npy", ""),
    "/a/x.h5x::/b": ("/a/x.h5x::/b", ""),
}


@pytest.mark.parametrize("text", PARTS)
def test_a_path_is_parted_into_a_file_and_a_name_within_it(text):
    file, name = PARTS[text]
    assert file_of(located(text)) == Path(file)
    assert dataset_of(located(text)) == name
    assert beside_path(located(text), ".partial") == Path(f"{file}.partial")


def test_a_path_is_made_absolute_and_keeps_its_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert located("link/x.h5::/b") == tmp_path / "link" / "x.h5::" / "b"
    assert located(Path("x.npy")) == tmp_path / "x.npy"


@pytest.mark.parametrize("url", ["memory://a/x.zarr", "memory://a/b/x.zarr"])
def test_a_url_stays_one(url):
    location = located(url)
    assert is_remote(location)
    assert str(location) == url
    assert str(located(location)) == url
    assert file_of(location) == location
    assert dataset_of(location) == ""
    assert str(beside_path(location, ".fastvgg.json")) == f"{url}.fastvgg.json"
    assert str(location / "c") == f"{url}/c"
