"""Batches for training: each row once, in a reproducible order, correct in any buffer."""

from __future__ import annotations

import itertools
import json
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


def x_of(images=IMAGES, dtype="uint8"):
    values = np.random.default_rng(7).integers(0, 256, (images, 5, 7, 3))
    return frozen(values.astype(dtype_of(dtype)))


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "x.npy", x_of())
    return tmp_path / "x.npy"


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "parts").mkdir()
    for number, (start, stop) in enumerate([(0, 5), (5, 6), (6, 20), (20, IMAGES)]):
        np.save(tmp_path / "parts" / f"part-{number}.npy", x_of()[start:stop])
    return tmp_path / "parts"


@pytest.fixture(params=[1, 3])
def small_pieces(request, monkeypatch):
    """Pieces of one image, or of three: batches are cut in the middle."""
    monkeypatch.setattr(loader, "READ_BYTES", request.param * 5 * 7 * 3)


def as_expected(transform, rows):
    return x_of()[rows] if transform is None else oracle.apply(transform, x_of()[rows])


def all_of(batches):
    """What an epoch gives, copied."""
    return [(batch.images.copy(), batch.rows.copy()) for batch in batches]


def rows_of(batches):
    return np.concatenate([rows for _, rows in batches] or [np.zeros(0, np.int64)]).tolist()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("small_pieces")
def test_every_row_is_yielded_once_with_the_bits_of_the_oracle(
    path, transform, shuffle, copy, threads
):
    batches = fastvgg.batches(
        path, 4, transform=transform, shuffle=shuffle, copy=copy, threads=threads
    )
    for _ in range(2):
        given = all_of(batches)
        assert len(given) == len(batches) == 6
        assert [len(rows) for _, rows in given] == [4, 4, 4, 4, 4, 3]
        assert sorted(rows_of(given)) == list(range(IMAGES))
        for images, rows in given:
            expected = as_expected(transform, rows)
            assert (images.shape, images.dtype) == (expected.shape, expected.dtype)
            assert images.tobytes() == expected.tobytes()
            assert rows.dtype == np.int64


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.usefixtures("small_pieces")
def test_parts_yield_what_one_array_yields(path, parts, shuffle):
    of_one, of_parts = (
        all_of(fastvgg.batches(each, 4, shuffle=shuffle, transform=Transform("caffe")))
        for each in (path, parts)
    )
    for (images, rows), (expected, expected_rows) in zip(of_parts, of_one, strict=True):
        assert images.tobytes() == expected.tobytes()
        assert rows.tolist() == expected_rows.tolist()


def test_without_shuffling_rows_are_in_their_order(path):
    assert rows_of(all_of(fastvgg.batches(path, 5))) == list(range(IMAGES))


def test_every_epoch_has_a_permutation_that_depends_on_seed_and_epoch(path):
    batches = fastvgg.batches(path, 5, shuffle=True, seed=3)
    orders = [rows_of(all_of(batches)) for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    again = fastvgg.batches(path, 7, shuffle=True, seed=3)
    assert [rows_of(all_of(again)) for _ in range(3)] == orders
    assert rows_of(all_of(fastvgg.batches(path, 5, shuffle=True, seed=4))) != orders[0]


def test_set_epoch_selects_an_epoch(path):
    batches = fastvgg.batches(path, 5, shuffle=True)
    orders = [rows_of(all_of(batches)) for _ in range(4)]
    batches.set_epoch(2)
    assert [rows_of(all_of(batches)) for _ in range(2)] == orders[2:]


def test_the_next_epoch_follows_an_abandoned_iteration(path):
    batches, whole = (fastvgg.batches(path, 5, shuffle=True) for _ in range(2))
    next(iter(batches))
    all_of(whole)
    assert rows_of(all_of(batches)) == rows_of(all_of(whole))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 23, 30])
def test_shards_are_the_dataset_together_and_differ_by_a_row_at_most(path, shuffle, shards):
    whole = fastvgg.batches(path, 4, shuffle=shuffle)
    each = [fastvgg.batches(path, 4, shuffle=shuffle, shard=(i, shards)) for i in range(shards)]
    for _ in range(2):
        orders = [rows_of(all_of(batches)) for batches in each]
        assert list(itertools.chain(*orders)) == rows_of(all_of(whole))
        assert max(map(len, orders)) - min(map(len, orders)) <= 1
    for batches, order in zip(each, orders, strict=True):
        assert len(batches) == -(-len(order) // 4)


@pytest.mark.parametrize(
    ("batch_size", "count", "left"), [(4, 5, 3), (23, 1, 0), (24, 0, 23), (1, 23, 0)]
)
def test_a_last_batch_that_is_not_full_is_dropped_if_asked(path, batch_size, count, left):
    batches = fastvgg.batches(path, batch_size, drop_last=True)
    given = all_of(batches)
    assert len(given) == len(batches) == count
    assert rows_of(given) == list(range(IMAGES - left))


# Memory


def test_a_batch_is_valid_until_two_more_are_requested(path):
    batches = fastvgg.batches(path, 2, transform=Transform("caffe"))
    before = None
    for images, rows in batches:
        if before is not None:
            assert before[0].tobytes() == as_expected(Transform("caffe"), before[1]).tobytes()
        before = images, rows


def test_buffers_are_reused_unless_copy(path):
    def addresses(copy):
        held = list(fastvgg.batches(path, 2, copy=copy))
        return len({batch.images.ctypes.data for batch in held}), held

    assert addresses(copy=False)[0] == 3
    count, held = addresses(copy=True)
    assert count == len(held) == 12
    for images, rows in held:
        assert images.tobytes() == x_of()[rows].tobytes()


@pytest.mark.parametrize("given_up_after", [1, 2, 3, 4, 12])
def test_the_next_epoch_reuses_the_buffers_in_order(path, given_up_after):
    batches = fastvgg.batches(path, 2)
    given = iter(batches)
    held = [next(given) for _ in range(given_up_after)]
    given.close()
    last = held[-1]
    following = iter(batches)
    first = next(following)
    for images, rows in (last, first):  # the next but one has not been asked for
        assert images.tobytes() == x_of()[rows].tobytes()
    addresses = {batch.images.ctypes.data for batch in [*held, first, *following]}
    assert len(addresses) == 3


def test_two_iterations_at_a_time_do_not_share_memory(path):
    batches = fastvgg.batches(path, 2, shuffle=True)
    all_of(batches)  # leaves memory, which but one of them can take
    for one, other in zip(batches, batches, strict=True):
        for images, rows in (one, other):
            assert images.tobytes() == x_of()[rows].tobytes()
        assert not np.shares_memory(one.images, other.images)


def test_batches_are_pickled_without_their_buffers(path):
    batches = fastvgg.batches(path, 23)
    all_of(batches)
    assert len(pickle.dumps(batches)) < 1000


def test_a_batch_may_be_written_and_the_dataset_stays(path):
    before = path.read_bytes()
    for images, _ in fastvgg.batches(path, 2):
        images[...] = 0
    assert path.read_bytes() == before
    for images, rows in fastvgg.batches(path, 2):
        assert images.tobytes() == x_of()[rows].tobytes()


def test_the_next_batch_is_built_while_one_is_used(path, monkeypatch):
    made = threading.Event()
    read_into = fastvgg.datasets.npy.NpySource.read_into

    def read(source, start, out):
        read_into(source, start, out)
        if start >= 2:
            made.set()

    monkeypatch.setattr(fastvgg.datasets.npy.NpySource, "read_into", read)
    given = iter(fastvgg.batches(path, 2))
    next(given)
    assert made.wait(60)
    given.close()


# Where it was


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("stopped_after", [0, 1, 3, 6])
def test_a_state_resumes_after_the_batches_already_yielded(path, shuffle, stopped_after):
    def made():
        return fastvgg.batches(path, 4, shuffle=shuffle, seed=9)

    batches = made()
    all_of(batches)
    expected = all_of(batches)
    batches.set_epoch(1)
    given = iter(batches)
    first = [(batch.images.copy(), batch.rows) for batch in itertools.islice(given, stopped_after)]
    state = json.loads(json.dumps(batches.state_dict()))
    with_committed = made()
    with_committed.load_state_dict(state)
    both = first + all_of(with_committed)
    assert rows_of(both) == rows_of(expected)
    assert [images.tobytes() for images, _ in both] == [images.tobytes() for images, _ in expected]
    assert rows_of(all_of(with_committed)) == rows_of(all_of(batches_after(made(), 2)))


def batches_after(batches, epoch):
    batches.set_epoch(epoch)
    return batches


def test_a_state_before_the_first_iteration_is_its_beginning(path):
    batches = fastvgg.batches(path, 4, shuffle=True)
    state = batches.state_dict()
    expected = rows_of(all_of(batches))
    batches.load_state_dict(state)
    assert rows_of(all_of(batches)) == expected


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
def test_a_state_with_other_options_is_rejected_by_the_option(path, options):
    common = {"batch_size": 4, "shuffle": True, "seed": 0}
    state = fastvgg.batches(path, **common).state_dict()
    other = fastvgg.batches(path, **(common | options))
    with pytest.raises(UsageError, match=next(iter(options))):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "wrong",
    [{"batches_yielded": 7}, {"batches_yielded": -1}, {"epoch": "1"}, {"batches_yielded": None}],
)
def test_a_damaged_state_is_rejected(path, wrong):
    batches = fastvgg.batches(path, 4)
    with pytest.raises(UsageError, match=next(iter(wrong))):
        batches.load_state_dict(batches.state_dict() | wrong)


def test_batches_are_pickled(path):
    batches = fastvgg.batches(path, 4, shuffle=True, transform=Transform("caffe"))
    copied = pickle.loads(pickle.dumps(batches))  # noqa: S301
    for (images, rows), (expected, expected_rows) in zip(
        all_of(copied), all_of(batches), strict=True
    ):
        assert images.tobytes() == expected.tobytes()
        assert rows.tolist() == expected_rows.tolist()


# Datasets with a manifest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_network_inputs_are_yielded_unchanged(path, tmp_path, dtype):
    fastvgg.plan(path, tmp_path / "y.npy", mode="torch", out_layout="NCHW", dtype=dtype).run()
    expected = oracle.apply(Transform("torch", out_layout="NCHW", dtype=dtype), x_of())
    for images, rows in fastvgg.batches(tmp_path / "y.npy", 4):
        assert images.dtype == expected.dtype
        assert images.tobytes() == expected[rows].tobytes()


def test_the_layout_of_a_stored_dataset_is_that_of_its_manifest(path, tmp_path):
    fastvgg.plan(path, tmp_path / "y.npy", mode="caffe", out_layout="NCHW").run()
    assert fastvgg.batches(tmp_path / "y.npy", 4).header.layout == "NCHW"
    assert fastvgg.batches(path, 4).header.layout == "NHWC"


def test_stored_network_inputs_are_not_preprocessed_again(path, tmp_path):
    fastvgg.plan(path, tmp_path / "y.npy", mode="caffe").run()
    with pytest.raises(SourceError, match="already preprocessed"):
        fastvgg.batches(tmp_path / "y.npy", 4, transform=Transform("caffe"))
    restored = fastvgg.batches(tmp_path / "y.npy", 4, transform=Transform("caffe", "restore"))
    assert np.array_equal(np.concatenate([images for images, _ in all_of(restored)]), x_of())


def test_a_file_that_is_half_done_in_place_is_rejected(tmp_path, monkeypatch):
    path = tmp_path / "y.npy"
    np.save(path, x_of(dtype="float32"))
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
    ],
)
def test_an_argument_out_of_range_is_rejected(path, options, shown):
    with pytest.raises(UsageError, match=shown):
        fastvgg.batches(path, **({"batch_size": 4} | options))


def test_a_transform_that_does_not_fit_is_rejected_with_the_path(path):
    with pytest.raises(SourceError, match=r"x.npy: shape .* axis has length 5, expected 3"):
        fastvgg.batches(path, 4, transform=Transform("caffe", layout="NCHW"))
    with pytest.raises(SourceError, match="nothing to restore"):
        fastvgg.batches(path, 4, transform=Transform("caffe", "restore"))


def test_a_directory_of_images_is_rejected(tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (5, 7)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(SourceError, match="fastvgg pack"):
        fastvgg.batches(tmp_path / "photos", 4)


def test_a_missing_dataset_is_rejected(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        fastvgg.batches(tmp_path / "none.npy", 4)


def test_a_replaced_array_is_rejected_when_an_epoch_begins(path):
    batches = fastvgg.batches(path, 4)
    np.save(path, x_of(images=22))
    with pytest.raises(SourceError, match="has changed since"):
        next(iter(batches))


def test_a_file_that_is_cut_short_stops_the_iteration(path):
    given = iter(fastvgg.batches(path, 4))
    next(given)
    with path.open("r+b") as file:
        file.truncate(300)
    with pytest.raises(StoppedError, match="file was truncated"):
        list(given)


def test_no_thread_is_left_behind(path):
    before = threading.active_count()
    given = iter(fastvgg.batches(path, 4, threads=3))
    next(given)
    assert threading.active_count() > before
    given.close()
    assert threading.active_count() == before
