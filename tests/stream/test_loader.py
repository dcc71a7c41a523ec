"""Batches for training: each row once, in a reproducible order, correct in any buffer."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import threading

import numpy as np
import pytest

import fastvgg
from fastvgg import loader, oracle
from fastvgg.errors import FastvggError, SourceError, StoppedError, UsageError
from fastvgg.transform import Transform
from tests.helpers.batches import dtype_of, frozen

pytestmark = pytest.mark.pixels

IMAGES = 23
TRANSFORMS = [
    None,
    Transform("caffe"),
    Transform("tf", out_layout="NCHW", dtype="float16"),
    Transform("torch", dtype="bfloat16"),
]


def make_images(images=IMAGES, dtype="uint8"):
    values = np.random.default_rng(7).integers(0, 256, (images, 5, 7, 3))
    return frozen(values.astype(dtype_of(dtype)))


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "x.npy", make_images())
    return tmp_path / "x.npy"


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "parts").mkdir()
    for number, (start, stop) in enumerate([(0, 5), (5, 6), (6, 20), (20, IMAGES)]):
        np.save(tmp_path / "parts" / f"part-{number}.npy", make_images()[start:stop])
    return tmp_path / "parts"


@pytest.fixture(params=[1, 3])
def small_reads(request, monkeypatch):
    """Read one image or three at a time, so that batches span several reads."""
    monkeypatch.setattr(loader, "READ_BYTES", request.param * 5 * 7 * 3)


def expected_images(transform, rows):
    return (
        make_images()[rows] if transform is None else oracle.apply(transform, make_images()[rows])
    )


def copy_all(batches):
    """Return copies of the batches of an epoch."""
    return [(batch.images.copy(), batch.rows.copy()) for batch in batches]


def rows_of(batches):
    return np.concatenate([rows for _, rows in batches] or [np.zeros(0, np.int64)]).tolist()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("small_reads")
def test_every_row_is_yielded_once_and_matches_oracle(path, transform, shuffle, copy, threads):
    batches = fastvgg.batches(
        path, 4, transform=transform, shuffle=shuffle, copy=copy, threads=threads
    )
    for _ in range(2):
        yielded = copy_all(batches)
        assert len(yielded) == len(batches) == 6
        assert [len(rows) for _, rows in yielded] == [4, 4, 4, 4, 4, 3]
        assert sorted(rows_of(yielded)) == list(range(IMAGES))
        for images, rows in yielded:
            expected = expected_images(transform, rows)
            assert (images.shape, images.dtype) == (expected.shape, expected.dtype)
            assert images.tobytes() == expected.tobytes()
            assert rows.dtype == np.int64


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.usefixtures("small_reads")
def test_parts_yield_the_same_batches_as_one_array(path, parts, shuffle):
    of_one, of_parts = (
        copy_all(fastvgg.batches(each, 4, shuffle=shuffle, transform=Transform("caffe")))
        for each in (path, parts)
    )
    for (images, rows), (expected, expected_rows) in zip(of_parts, of_one, strict=True):
        assert images.tobytes() == expected.tobytes()
        assert rows.tolist() == expected_rows.tolist()


def test_unshuffled_rows_are_in_order(path):
    assert rows_of(copy_all(fastvgg.batches(path, 5))) == list(range(IMAGES))


def test_permutation_depends_only_on_seed_and_epoch(path):
    batches = fastvgg.batches(path, 5, shuffle=True, seed=3)
    orders = [rows_of(copy_all(batches)) for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    repeated = fastvgg.batches(path, 7, shuffle=True, seed=3)
    assert [rows_of(copy_all(repeated)) for _ in range(3)] == orders
    assert rows_of(copy_all(fastvgg.batches(path, 5, shuffle=True, seed=4))) != orders[0]


def test_set_epoch_selects_an_epoch(path):
    batches = fastvgg.batches(path, 5, shuffle=True)
    orders = [rows_of(copy_all(batches)) for _ in range(4)]
    batches.set_epoch(2)
    assert [rows_of(copy_all(batches)) for _ in range(2)] == orders[2:]


def test_next_epoch_follows_an_abandoned_iteration(path):
    batches, whole = (fastvgg.batches(path, 5, shuffle=True) for _ in range(2))
    next(iter(batches))
    copy_all(whole)
    assert rows_of(copy_all(batches)) == rows_of(copy_all(whole))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 23, 30])
def test_shards_partition_the_dataset_evenly(path, shuffle, shards):
    whole = fastvgg.batches(path, 4, shuffle=shuffle)
    each = [fastvgg.batches(path, 4, shuffle=shuffle, shard=(i, shards)) for i in range(shards)]
    for _ in range(2):
        orders = [rows_of(copy_all(batches)) for batches in each]
        assert list(itertools.chain(*orders)) == rows_of(copy_all(whole))
        assert max(map(len, orders)) - min(map(len, orders)) <= 1
    for batches, order in zip(each, orders, strict=True):
        assert len(batches) == -(-len(order) // 4)


@pytest.mark.parametrize(
    ("batch_size", "count", "left"), [(4, 5, 3), (23, 1, 0), (24, 0, 23), (1, 23, 0)]
)
def test_drop_last_omits_an_incomplete_batch(path, batch_size, count, left):
    batches = fastvgg.batches(path, batch_size, drop_last=True)
    yielded = copy_all(batches)
    assert len(yielded) == len(batches) == count
    assert rows_of(yielded) == list(range(IMAGES - left))


# Memory


def test_batch_is_valid_until_two_more_are_requested(path):
    batches = fastvgg.batches(path, 2, transform=Transform("caffe"))
    before = None
    for images, rows in batches:
        if before is not None:
            assert before[0].tobytes() == expected_images(Transform("caffe"), before[1]).tobytes()
        before = images, rows


def test_buffers_are_reused_unless_copy(path):
    def addresses(copy):
        kept = list(fastvgg.batches(path, 2, copy=copy))
        return len({batch.images.ctypes.data for batch in kept}), kept

    assert addresses(copy=False)[0] == 3
    count, kept = addresses(copy=True)
    assert count == len(kept) == 12
    for images, rows in kept:
        assert images.tobytes() == make_images()[rows].tobytes()


@pytest.mark.parametrize("batches_taken", [1, 2, 3, 4, 12])
def test_next_epoch_reuses_the_buffers_in_order(path, batches_taken):
    batches = fastvgg.batches(path, 2)
    yielded = iter(batches)
    kept = [next(yielded) for _ in range(batches_taken)]
    yielded.close()
    last = kept[-1]
    following = iter(batches)
    first = next(following)
    for images, rows in (last, first):  # valid until two more are requested
        assert images.tobytes() == make_images()[rows].tobytes()
    addresses = {batch.images.ctypes.data for batch in [*kept, first, *following]}
    assert len(addresses) == 3


def test_concurrent_iterations_do_not_share_memory(path):
    batches = fastvgg.batches(path, 2, shuffle=True)
    copy_all(batches)  # leaves buffers that only one iteration can reuse
    for one, other in zip(batches, batches, strict=True):
        for images, rows in (one, other):
            assert images.tobytes() == make_images()[rows].tobytes()
        assert not np.shares_memory(one.images, other.images)


def test_pickled_batches_omit_their_buffers(path):
    batches = fastvgg.batches(path, 23)
    copy_all(batches)
    assert len(pickle.dumps(batches)) < 1000


def test_writing_to_a_batch_does_not_change_the_dataset(path):
    before = path.read_bytes()
    for images, _ in fastvgg.batches(path, 2):
        images[...] = 0
    assert path.read_bytes() == before
    for images, rows in fastvgg.batches(path, 2):
        assert images.tobytes() == make_images()[rows].tobytes()


def test_next_batch_is_prefetched(path, monkeypatch):
    made = threading.Event()
    read_into = fastvgg.datasets.npy.NpySource.read_into

    def read(source, start, out):
        read_into(source, start, out)
        if start >= 2:
            made.set()

    monkeypatch.setattr(fastvgg.datasets.npy.NpySource, "read_into", read)
    yielded = iter(fastvgg.batches(path, 2))
    next(yielded)
    assert made.wait(60)
    yielded.close()


# State


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("stopped_after", [0, 1, 3, 6])
def test_state_resumes_after_the_batches_already_yielded(path, shuffle, stopped_after):
    def made():
        return fastvgg.batches(path, 4, shuffle=shuffle, seed=9)

    batches = made()
    copy_all(batches)
    expected = copy_all(batches)
    batches.set_epoch(1)
    yielded = iter(batches)
    first = [
        (batch.images.copy(), batch.rows) for batch in itertools.islice(yielded, stopped_after)
    ]
    state = json.loads(json.dumps(batches.state_dict()))
    resumed = made()
    resumed.load_state_dict(state)
    both = first + copy_all(resumed)
    assert rows_of(both) == rows_of(expected)
    assert [images.tobytes() for images, _ in both] == [images.tobytes() for images, _ in expected]
    assert rows_of(copy_all(resumed)) == rows_of(copy_all(with_epoch(made(), 2)))


def with_epoch(batches, epoch):
    batches.set_epoch(epoch)
    return batches


def test_state_before_the_first_iteration_restarts_the_epoch(path):
    batches = fastvgg.batches(path, 4, shuffle=True)
    state = batches.state_dict()
    expected = rows_of(copy_all(batches))
    batches.load_state_dict(state)
    assert rows_of(copy_all(batches)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 5},
        {"shuffle": False},
        {"seed": 1},
        {"shard": (0, 2)},
        {"drop_last": True},
    ],
    ids=str,
)
def test_state_with_other_options_is_rejected_by_the_option(path, options):
    common = {"batch_size": 4, "shuffle": True, "seed": 0}
    state = fastvgg.batches(path, **common).state_dict()
    other = fastvgg.batches(path, **(common | options))
    with pytest.raises(UsageError, match=next(iter(options))):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "wrong",
    [{"batches_yielded": 7}, {"batches_yielded": -1}, {"epoch": "1"}, {"batches_yielded": None}],
)
def test_damaged_state_is_rejected(path, wrong):
    batches = fastvgg.batches(path, 4)
    with pytest.raises(UsageError, match=next(iter(wrong))):
        batches.load_state_dict(batches.state_dict() | wrong)


def test_batches_round_trip_through_pickle(path):
    batches = fastvgg.batches(path, 4, shuffle=True, transform=Transform("caffe"))
    copied = pickle.loads(pickle.dumps(batches))  # noqa: S301
    for (images, rows), (expected, expected_rows) in zip(
        copy_all(copied), copy_all(batches), strict=True
    ):
        assert images.tobytes() == expected.tobytes()
        assert rows.tolist() == expected_rows.tolist()


# Datasets with a manifest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_network_inputs_are_yielded_unchanged(path, tmp_path, dtype):
    fastvgg.plan(path, tmp_path / "y.npy", mode="torch", out_layout="NCHW", dtype=dtype).run()
    expected = oracle.apply(Transform("torch", out_layout="NCHW", dtype=dtype), make_images())
    for images, rows in fastvgg.batches(tmp_path / "y.npy", 4):
        assert images.dtype == expected.dtype
        assert images.tobytes() == expected[rows].tobytes()


def test_layout_of_a_stored_dataset_comes_from_its_manifest(path, tmp_path):
    fastvgg.plan(path, tmp_path / "y.npy", mode="caffe", out_layout="NCHW").run()
    assert fastvgg.batches(tmp_path / "y.npy", 4).header.layout == "NCHW"
    assert fastvgg.batches(path, 4).header.layout == "NHWC"


def test_stored_network_inputs_are_not_preprocessed_twice(path, tmp_path):
    fastvgg.plan(path, tmp_path / "y.npy", mode="caffe").run()
    with pytest.raises(SourceError, match="already preprocessed"):
        fastvgg.batches(tmp_path / "y.npy", 4, transform=Transform("caffe"))
    restored = fastvgg.batches(tmp_path / "y.npy", 4, transform=Transform("caffe", "restore"))
    assert np.array_equal(
        np.concatenate([images for images, _ in copy_all(restored)]), make_images()
    )


def test_unfinished_in_place_file_is_rejected(tmp_path, monkeypatch):
    path = tmp_path / "y.npy"
    np.save(path, make_images(dtype="float32"))
    plan = fastvgg.plan(path, in_place=True, mode="caffe")

    class StopError(Exception):
        pass

    def stop(_):
        raise StopError

    with pytest.raises(StopError):
        plan.run(progress=stop)
    with pytest.raises(FastvggError, match="in place"):
        fastvgg.batches(path, 4)


# What is refused


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seed": -1}, "seed is -1"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\)"),
        ({"shard": (-1, 2)}, r"shard is \(-1, 2\)"),
        ({"shard": [0, 1]}, r"shard is \[0, 1\]"),
        ({"shard": (0, 1, 2)}, r"shard is \(0, 1, 2\)"),
        ({"threads": 0}, "threads is 0"),
        ({"transform": "torch"}, "transform is 'torch'"),
    ],
)
def test_out_of_range_argument_is_rejected(path, options, shown):
    with pytest.raises(UsageError, match=shown):
        fastvgg.batches(path, **({"batch_size": 4} | options))


def test_unsuitable_transform_is_rejected_with_the_path(path):
    with pytest.raises(SourceError, match=r"x.npy: shape .* axis has length 5, expected 3"):
        fastvgg.batches(path, 4, transform=Transform("caffe", layout="NCHW"))
    with pytest.raises(SourceError, match="nothing to restore"):
        fastvgg.batches(path, 4, transform=Transform("caffe", "restore"))


def test_directory_of_images_is_rejected(tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (5, 7)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(SourceError, match="fastvgg pack"):
        fastvgg.batches(tmp_path / "photos", 4)


def test_missing_dataset_is_rejected(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        fastvgg.batches(tmp_path / "none.npy", 4)


def test_replaced_array_is_rejected_when_an_epoch_starts(path):
    batches = fastvgg.batches(path, 4)
    np.save(path, make_images(images=22))
    with pytest.raises(SourceError, match="has changed since"):
        next(iter(batches))


def test_truncated_file_stops_the_iteration(path):
    yielded = iter(fastvgg.batches(path, 4))
    next(yielded)
    with path.open("r+b") as file:
        file.truncate(300)
    with pytest.raises(StoppedError, match="file was truncated"):
        list(yielded)


def test_file_overwritten_during_an_epoch_is_reported_at_its_end(path):
    yielded = iter(fastvgg.batches(path, 4))
    next(yielded)
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    os.utime(path, ns=(0, status.st_mtime_ns + 10**9))
    with pytest.raises(StoppedError, match="changed while it was read"):
        list(yielded)


def test_no_thread_is_left_running(path):
    before = threading.active_count()
    yielded = iter(fastvgg.batches(path, 4, threads=3))
    next(yielded)
    assert threading.active_count() > before
    yielded.close()
    assert threading.active_count() == before
