"""Batches for training: each row once, in a reproducible order, in memory of the caller's own."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import threading
from collections import deque

import h5py
import numpy as np
import pytest
import zarr
from keras.src.utils.dataset_utils import index_directory

import fastvgg
from fastvgg import batch_builder, oracle
from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.index import INDEX_HEADER, format_records, index_path, read_index
from fastvgg.errors import FastvggError, SourceError, StoppedError, UsageError
from fastvgg.loader import MAX_IN_FLIGHT
from fastvgg.transform import Transform
from tests.helpers.batches import dtype_of, frozen
from tests.helpers.datasets_on_disk import pixels, python, save_images, stdout_of
from tests.helpers.tar_on_disk import png, save_tar

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
    monkeypatch.setattr(batch_builder, "READ_BYTES", request.param * 5 * 7 * 3)


def expected_images(transform, rows):
    return (
        make_images()[rows] if transform is None else oracle.apply(transform, make_images()[rows])
    )


def rows_of(batches):
    return [row for batch in batches for row in batch.rows.tolist()]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("small_reads")
def test_every_row_is_yielded_once_and_matches_oracle(path, transform, shuffle, threads):
    batches = fastvgg.batches(path, 4, transform=transform, shuffle=shuffle, threads=threads)
    for _ in range(2):
        yielded = list(batches)
        assert len(yielded) == len(batches) == 6
        assert [len(batch.rows) for batch in yielded] == [4, 4, 4, 4, 4, 3]
        assert sorted(rows_of(yielded)) == list(range(IMAGES))
        for images, labels, rows in yielded:
            assert labels is None
            expected = expected_images(transform, rows)
            assert (images.shape, images.dtype) == (expected.shape, expected.dtype)
            assert images.tobytes() == expected.tobytes()
            assert rows.dtype == np.int64


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.usefixtures("small_reads")
def test_parts_yield_the_same_batches_as_one_array(path, parts, shuffle):
    of_one, of_parts = (
        list(fastvgg.batches(each, 4, shuffle=shuffle, transform=Transform("caffe")))
        for each in (path, parts)
    )
    for (images, _, rows), (expected, _, expected_rows) in zip(of_parts, of_one, strict=True):
        assert images.tobytes() == expected.tobytes()
        assert rows.tolist() == expected_rows.tolist()


def test_unshuffled_rows_are_in_order(path):
    assert rows_of(list(fastvgg.batches(path, 5))) == list(range(IMAGES))


def test_permutation_depends_only_on_seed_and_epoch(path):
    batches = fastvgg.batches(path, 5, shuffle=True, seed=3)
    orders = [rows_of(list(batches)) for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    repeated = fastvgg.batches(path, 7, shuffle=True, seed=3)
    assert [rows_of(list(repeated)) for _ in range(3)] == orders
    assert rows_of(list(fastvgg.batches(path, 5, shuffle=True, seed=4))) != orders[0]


def test_set_epoch_selects_an_epoch(path):
    batches = fastvgg.batches(path, 5, shuffle=True)
    orders = [rows_of(list(batches)) for _ in range(4)]
    batches.set_epoch(2)
    assert [rows_of(list(batches)) for _ in range(2)] == orders[2:]


def test_next_epoch_follows_an_abandoned_iteration(path):
    batches, whole = (fastvgg.batches(path, 5, shuffle=True) for _ in range(2))
    next(iter(batches))
    list(whole)
    assert rows_of(list(batches)) == rows_of(list(whole))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 23, 30])
def test_shards_partition_the_dataset_evenly(path, shuffle, shards):
    whole = fastvgg.batches(path, 4, shuffle=shuffle)
    each = [fastvgg.batches(path, 4, shuffle=shuffle, shard=(i, shards)) for i in range(shards)]
    for _ in range(2):
        orders = [rows_of(list(batches)) for batches in each]
        assert list(itertools.chain(*orders)) == rows_of(list(whole))
        assert max(map(len, orders)) - min(map(len, orders)) <= 1
    for batches, order in zip(each, orders, strict=True):
        assert len(batches) == -(-len(order) // 4)


@pytest.mark.parametrize(
    ("batch_size", "count", "left"), [(4, 5, 3), (23, 1, 0), (24, 0, 23), (1, 23, 0)]
)
def test_drop_last_omits_an_incomplete_batch(path, batch_size, count, left):
    batches = fastvgg.batches(path, batch_size, drop_last=True)
    yielded = list(batches)
    assert len(yielded) == len(batches) == count
    assert rows_of(yielded) == list(range(IMAGES - left))


# Memory


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_that_are_kept_stay_correct(path, transform, shuffle):
    batches = fastvgg.batches(path, 2, transform=transform, shuffle=shuffle)
    kept = [*batches, *batches]
    for images, _, rows in kept:
        assert images.tobytes() == expected_images(transform, rows).tobytes()
    spans = sorted(bounds(batch.images) for batch in kept)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def bounds(array):
    return np.lib.array_utils.byte_bounds(array)


def addresses(batches, keep=0):
    """Return the addresses of the batches of an epoch while the last `keep` ones are kept."""
    kept, found = deque(maxlen=keep), []
    for batch in batches:
        found.append(batch.images.ctypes.data)
        kept.append(batch)
        del batch
    return found


def test_batches_that_are_dropped_lend_their_memory_to_the_next(path):
    batches = fastvgg.batches(path, 2, transform=Transform("caffe"), threads=3)
    first = set(addresses(batches))
    assert len(first) == MAX_IN_FLIGHT
    for _ in range(5):
        assert set(addresses(batches)) <= first


def test_common_loop_needs_three_buffers(path):
    batches = fastvgg.batches(path, 2, shuffle=True, threads=3)
    found = set()
    for _ in range(5):
        for images, _, rows in batches:  # the name keeps a batch until the next one has its memory
            assert images.tobytes() == make_images()[rows].tobytes()
            found.add(images.ctypes.data)
    assert len(found) == MAX_IN_FLIGHT + 1


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_keeping_batches_costs_one_buffer_each(path, kept):
    batches = fastvgg.batches(path, 2, shuffle=True)
    found = addresses(batches, kept)
    assert len(set(found)) == min(len(found), kept + MAX_IN_FLIGHT)


def test_batches_are_writable_and_no_one_else_uses_them(path):
    before = path.read_bytes()
    batches = fastvgg.batches(path, 2, labels=range(IMAGES))
    kept = []
    for images, labels, rows in batches:
        expected = make_images()[rows]
        assert images.tobytes() == expected.tobytes()
        assert labels.tolist() == rows.tolist()
        kept.append((images, labels, rows))
        images[...], labels[...], rows[...] = 0, 0, 0
    assert not any(array.any() for batch in kept for array in batch)
    assert rows_of(batches) == list(range(IMAGES))
    assert path.read_bytes() == before


def test_iterations_at_once_do_not_share_memory(path):
    batches = fastvgg.batches(path, 2, shuffle=True)
    list(batches)  # leaves buffers that either can use
    for one, other in zip(batches, batches, strict=True):
        for images, _, rows in (one, other):
            assert images.tobytes() == make_images()[rows].tobytes()
        assert not np.shares_memory(one.images, other.images)


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_abandoned_iteration_returns_its_memory_when_its_threads_are_done(path, taken):
    batches = fastvgg.batches(path, 2, transform=Transform("caffe"), threads=3)
    first = set(addresses(batches))
    for _ in range(4):
        yielded = iter(batches)
        kept = [next(yielded) for _ in range(taken)]
        yielded.close()
        for images, _, rows in kept:
            assert images.tobytes() == expected_images(Transform("caffe"), rows).tobytes()
        del kept[:]
        if taken:
            del images
    assert len(set(addresses(batches)) | first) <= taken + MAX_IN_FLIGHT + 1


def test_failed_iteration_leaves_the_batches_usable(path):
    batches = fastvgg.batches(path, 2, threads=3)
    content = path.read_bytes()
    yielded = iter(batches)
    kept = [next(yielded)]
    os.truncate(path, 300)
    with pytest.raises(StoppedError, match="file was truncated"):
        kept.extend(yielded)
    path.write_bytes(content)
    for images, _, rows in [*kept, *batches]:
        assert images.tobytes() == make_images()[rows].tobytes()


def test_pickled_batches_omit_their_memory(path):
    batches = fastvgg.batches(path, 23)
    list(batches)
    assert len(pickle.dumps(batches)) < 1000


END_OF_PROCESS = """
import sys, threading
import numpy as np
import fastvgg

batches = fastvgg.batches(sys.argv[1], 2, transform=fastvgg.Transform("caffe"), threads=2)
kept = [*batches, *batches]
unfinished = iter(batches)
last = next(unfinished)
threading.last = [batch.images[1:] for batch in kept]  # dropped after most other modules
print("end")
"""


def test_process_ends_quietly_with_batches_in_use(path):
    done = python(END_OF_PROCESS, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


FORK = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")  # Python warns of forks in a process that has threads
import numpy as np
import fastvgg
from fastvgg.errors import UsageError

x = np.load(sys.argv[1])
batches = fastvgg.batches(sys.argv[2], 2, shuffle=True, threads=3)
kept, unfinished = [*batches][:4], iter(batches)
kept.append(next(unfinished))

def is_right(each):
    return all((batch.images == x[batch.rows]).all() for batch in each)

child = os.fork()
if not child:
    signal.alarm(60)  # a child that waits for a thread that it does not have would wait forever
    code = 1
    try:
        next(unfinished)
    except UsageError as error:
        unfinished.close()
        code = 0 if is_right(kept) and is_right([*batches]) and "forked" in str(error) else 2
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert is_right([*kept, *unfinished])
"""


@pytest.mark.parametrize("name", ["x.npy", "x.zarr", "x.h5::/x"])
def test_forked_child_iterates_anew_and_cannot_continue_an_iteration(path, name):
    dataset = path.parent / name
    if name == "x.zarr":
        zarr.create_array(dataset, data=np.array(make_images()), chunks=(4, 5, 7, 3))
    if name == "x.h5::/x":
        with h5py.File(path.parent / "x.h5", "w") as file:
            file.create_dataset("x", data=make_images(), chunks=(4, 5, 7, 3), compression="gzip")
    stdout_of(FORK, path, dataset)


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
    list(batches)
    expected = list(batches)
    batches.set_epoch(1)
    yielded = iter(batches)
    first = list(itertools.islice(yielded, stopped_after))
    state = json.loads(json.dumps(batches.state_dict()))
    resumed = made()
    resumed.load_state_dict(state)
    both = first + list(resumed)
    assert rows_of(both) == rows_of(expected)
    assert [each.images.tobytes() for each in both] == [each.images.tobytes() for each in expected]
    assert rows_of(list(resumed)) == rows_of(list(with_epoch(made(), 2)))


def with_epoch(batches, epoch):
    batches.set_epoch(epoch)
    return batches


def test_state_before_the_first_iteration_restarts_the_epoch(path):
    batches = fastvgg.batches(path, 4, shuffle=True)
    state = batches.state_dict()
    expected = rows_of(list(batches))
    batches.load_state_dict(state)
    assert rows_of(list(batches)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 5},
        {"shuffle": False},
        {"seed": 1},
        {"shard": (0, 2)},
        {"drop_last": True},
        {"include_failed": True},
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
    for (images, _, rows), (expected, _, expected_rows) in zip(copied, batches, strict=True):
        assert images.tobytes() == expected.tobytes()
        assert rows.tolist() == expected_rows.tolist()


# Labels


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A packed directory of two classes, in which the third and the last image are damaged."""
    directory = tmp_path_factory.mktemp("photographs")
    names = [f"{name}/{number}.png" for name in ("dog", "cat") for number in range(4)]
    save_images(directory / "photos", pixels(8), names)
    for name in ("cat/2.png", "dog/3.png"):
        (directory / "photos" / name).write_bytes(b"no image")
    fastvgg.plan(directory / "photos", directory / "packed.npy", size=(7, 9), **PACK).run()
    return directory / "packed.npy"


PACK = {"direction": "pack", "backend": "numpy"}
FAILED = [2, 7]
OK = [0, 1, 3, 4, 5, 6]


def test_labels_are_positions_in_the_sorted_class_names(photographs):
    batches = fastvgg.batches(photographs, 4)
    assert batches.class_names == ["cat", "dog"]
    images, labels, rows = next(iter(batches))
    assert (labels.dtype, labels.tolist(), rows.tolist()) == (np.int64, [0, 0, 0, 1], OK[:4])
    assert np.array_equal(images, np.load(photographs)[OK[:4]])


def test_labels_follow_a_shuffled_dataset(photographs):
    for batch in fastvgg.batches(photographs, 4, shuffle=True, seed=1):
        assert batch.labels.tolist() == (batch.rows >= 4).astype(int).tolist()


def test_dataset_without_an_index_has_no_labels(path):
    batches = fastvgg.batches(path, 4)
    assert batches.class_names is batches.labels is None
    assert [batch.labels for batch in batches] == [None] * len(batches)


def test_directory_without_folders_has_no_labels(tmp_path):
    save_images(tmp_path / "photos", pixels(2), ["a.png", "b.png"])
    fastvgg.plan(tmp_path / "photos", tmp_path / "x.npy", size=(7, 9), **PACK).run()
    batches = fastvgg.batches(tmp_path / "x.npy", 4)
    assert batches.class_names is next(iter(batches)).labels is None


FLAT = ["cat", "10", "9", "Zebra", "_", "é", "a b", "dog"]


def test_flat_classes_have_the_numbers_of_keras_and_torchvision(tmp_path):
    photos = tmp_path / "photos"
    save_images(photos, pixels(8), [f"{name}/1.png" for name in FLAT])
    fastvgg.plan(photos, tmp_path / "x.npy", size=(7, 9), **PACK).run()
    (batch,) = batches = fastvgg.batches(tmp_path / "x.npy", 9)
    files, numbers, names = index_directory(photos, "inferred", (".png",), shuffle=False)
    assert batches.class_names == names
    # As torchvision.datasets.folder.find_classes.
    assert names == sorted(entry.name for entry in os.scandir(photos) if entry.is_dir())
    expected = dict(zip(files, np.asarray(numbers).tolist(), strict=True))
    records = read_index(tmp_path / "x.npy", 8)
    actual = {
        str(photos / record.path): label
        for record, label in zip(records, batch.labels, strict=True)
    }
    assert actual == expected


def test_only_folders_that_directly_contain_images_are_classes(tmp_path):
    photos = tmp_path / "photos"
    save_images(photos, pixels(3), ["b/sub/1.png", "b/2.png", "c/3.png"])
    (photos / "a").mkdir()
    fastvgg.plan(photos, tmp_path / "x.npy", size=(7, 9), **PACK).run()
    (batch,) = batches = fastvgg.batches(tmp_path / "x.npy", 9)
    assert batches.class_names == ["b", "b/sub", "c"]
    assert batch.labels.tolist() == [0, 1, 2]


def test_image_in_no_folder_does_not_change_the_numbers_of_the_others(tmp_path):
    for name, files in {"train": ["cat/1.png", "cover.png", "dog/1.png"], "val": []}.items():
        files = files or ["cat/1.png", "dog/1.png"]
        save_images(tmp_path / name, pixels(len(files)), files)
        fastvgg.plan(tmp_path / name, tmp_path / f"{name}.npy", size=(7, 9), **PACK).run()
    train, val = (fastvgg.batches(tmp_path / f"{name}.npy", 9) for name in ("train", "val"))
    assert (train.class_names, val.class_names) == (["cat", "dog", ""], ["cat", "dog"])
    assert [batch.labels.tolist() for batch in train] == [[0, 2, 1]]


@pytest.mark.parametrize("other", [None, "", "-1", "0015"])
@pytest.mark.parametrize("key", ["{0}/x{0}", "x{0}", "train/{0}/x"])
def test_numbers_in_cls_entries_are_labels_in_every_array_made_of_them(tmp_path, key, other):
    """Also where each equals the folder of its image, as the index alone cannot tell."""
    image = png(pixels(1)[0])
    samples = [(key.format(number), str(number)) for number in range(12)]
    if other is not None:
        samples.append(("z", other))
    members = [
        (f"{name}.{suffix}", content)
        for name, number in samples
        for suffix, content in (("png", image), ("cls", number.encode()))
        if content
    ]
    fastvgg.plan(save_tar(tmp_path / "a.tar", members), tmp_path / "x.npy", **PACK).run()
    fastvgg.plan(tmp_path / "x.npy", tmp_path / "y.zarr", mode="tf").run()
    fastvgg.plan(tmp_path / "x.npy", tmp_path / "z.npy", mode="tf", dtype="float32").run()
    label, more = {
        None: ([], []),
        "": ([12], [""]),
        "-1": ([-1], []),
        "0015": ([15], ["12", "13", "14", "15"]),
    }[other]
    for name in ("x.npy", "y.zarr", "z.npy"):
        (batch,) = batches = fastvgg.batches(tmp_path / name, 99)
        assert batch.labels.tolist() == [*range(12), *label]
        assert batches.class_names == [*map(str, range(12)), *more]


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (range(100, 108), "int64"),
        ([1, 0, 1, 0, 1, 0, 1, 0], "int64"),
        (np.arange(8, dtype=np.uint8), "int64"),
        (np.arange(8, dtype=">i2"), "int64"),
        (np.arange(8) > 3, "int64"),
        (np.linspace(0, 1, 8, dtype=np.float32), "float32"),
        (np.linspace(0, 1, 8).astype(">f8"), "float64"),
        (np.eye(8, 3, dtype=np.float32), "float32"),
    ],
)
def test_own_labels_are_one_for_every_row(photographs, labels, dtype):
    batches = fastvgg.batches(photographs, 4, labels=labels, shuffle=True)
    assert batches.class_names is None
    for batch in batches:
        assert batch.labels.dtype == np.dtype(dtype)
        assert np.array_equal(batch.labels, np.asarray(labels)[batch.rows])


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([0] * 7, r"shape \(7,\), but the dataset has 8 rows"),
        (3, r"shape \(\), but"),
        (["cat"] * 8, "of type <U3"),
        ([None] * 8, "of type object"),
        ([[0], [0, 1]] * 4, "not an array"),
        (np.full(8, 2**64 - 1, np.uint64), "a label is 18446744073709551615"),
    ],
)
def test_unsuitable_labels_are_rejected(photographs, labels, shown):
    with pytest.raises(UsageError, match=shown):
        fastvgg.batches(photographs, 4, labels=labels)


# Images that could not be decoded


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("transform", [None, Transform("caffe")])
def test_failed_images_are_left_out(photographs, transform, shuffle):
    stored = np.load(photographs)
    for size in (1, 2, 3, 8):
        batches = fastvgg.batches(photographs, size, transform=transform, shuffle=shuffle)
        assert batches.failed_rows.tolist() == FAILED
        yielded = list(batches)
        assert len(yielded) == len(batches) == -(-len(OK) // size)
        assert sorted(rows_of(yielded)) == OK
        for images, _, rows in yielded:
            expected = stored[rows] if transform is None else oracle.apply(transform, stored[rows])
            assert images.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shards", [1, 2, 4, 7])
def test_shards_divide_the_images_that_did_not_fail(photographs, shards):
    each = [fastvgg.batches(photographs, 2, shard=(i, shards)) for i in range(shards)]
    orders = [rows_of(batches) for batches in each]
    assert list(itertools.chain(*orders)) == OK
    assert max(map(len, orders)) - min(map(len, orders)) <= 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_failed_images_are_rows_of_zeros_on_request(photographs, shuffle):
    batches = fastvgg.batches(photographs, 3, include_failed=True, shuffle=shuffle)
    assert len(batches) == 3
    yielded = list(batches)
    assert sorted(rows_of(yielded)) == list(range(8))
    for images, _, rows in yielded:
        assert [row for row, image in zip(rows, images, strict=True) if not image.any()] == [
            row for row in rows if row in FAILED
        ]


def test_dataset_of_failed_images_only_is_rejected(path):
    record = ImageRecord("a.png", "", 0, 0, True, "damaged")
    text = INDEX_HEADER + format_records([record] * IMAGES)
    index_path(path).write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match="no image could be decoded") as raised:
        fastvgg.batches(path, 4)
    assert "include_failed=True" in raised.value.remedy
    assert len(list(fastvgg.batches(path, 4, include_failed=True))) == 6


def test_missing_index_of_a_dataset_with_failed_images_is_not_ignored(photographs, tmp_path):
    for name in ("packed.npy", "packed.npy.fastvgg.json"):
        shutil.copy(photographs.with_name(name), tmp_path)
    copied = tmp_path / "packed.npy"
    with pytest.raises(SourceError, match=r"2 images failed .* is missing") as raised:
        fastvgg.batches(copied, 4)
    assert "include_failed=True" in raised.value.remedy
    assert rows_of(fastvgg.batches(copied, 4, include_failed=True)) == list(range(8))
    plan = fastvgg.plan(copied, tmp_path / "y.npy", mode="caffe")
    assert [note for note in plan.notes if f"failed when {copied} was made: 2" in note]
    with pytest.raises(SourceError, match=r"2; .*packed.npy.index.csv, .* is missing"):
        fastvgg.plan(copied, tmp_path / "y.npy", mode="caffe", strict=True)


def test_state_is_rejected_if_other_images_had_failed(photographs, tmp_path):
    state = fastvgg.batches(photographs, 2).state_dict()
    for name in ("packed.npy", "packed.npy.index.csv", "packed.npy.fastvgg.json"):
        shutil.copy(photographs.with_name(name), tmp_path)
    index = index_path(tmp_path / "packed.npy")
    records = [*read_index(tmp_path / "packed.npy", 8)]
    records[7] = records[7]._replace(failed=False, reason="")
    index.write_text(INDEX_HEADER + format_records(records), encoding="utf-8")
    batches = fastvgg.batches(tmp_path / "packed.npy", 2)
    with pytest.raises(UsageError, match=r"when other images of .* had failed"):
        batches.load_state_dict(state)
    batches.set_epoch(0)  # as the remedy says
    assert rows_of(batches) == [*OK, 7]


def test_batches_are_rejected_when_the_failed_images_were_retried(tmp_path):
    save_images(tmp_path / "photos", pixels(3))
    (tmp_path / "photos" / "a" / "00.png").write_bytes(b"no image")

    def pack(**options):
        photos, packed = tmp_path / "photos", tmp_path / "x.npy"
        return fastvgg.plan(photos, packed, size=(7, 9), **PACK, **options).run()

    pack()
    batches = fastvgg.batches(tmp_path / "x.npy", 2)
    assert rows_of(batches) == [1, 2]
    save_images(tmp_path / "photos", pixels(3))
    pack(retry_failed=True)
    with pytest.raises(SourceError, match="has changed since"):
        list(batches)
    assert rows_of(fastvgg.batches(tmp_path / "x.npy", 2)) == [0, 1, 2]


# Datasets with a manifest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_network_inputs_are_yielded_unchanged(path, tmp_path, dtype):
    fastvgg.plan(path, tmp_path / "y.npy", mode="torch", out_layout="NCHW", dtype=dtype).run()
    expected = oracle.apply(Transform("torch", out_layout="NCHW", dtype=dtype), make_images())
    for images, _, rows in fastvgg.batches(tmp_path / "y.npy", 4):
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
    assert np.array_equal(np.concatenate([batch.images for batch in restored]), make_images())


NOT_IMAGES = {
    "0..1": (make_images() / 255, "multiply by 255"),
    "-1..1": (make_images() / 127.5 - 1, "(x + 1) * 127.5"),
    "0 and 1": (make_images() % 2, "multiply by 255"),
    "torch": (oracle.apply(Transform("torch"), make_images()), "the original images"),
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", NOT_IMAGES)
def test_stored_floats_that_are_not_images_are_not_preprocessed(tmp_path, name, shuffle):
    values, remedy = NOT_IMAGES[name]
    values = values.astype(np.float32)
    np.save(tmp_path / "f.npy", values)
    transform = Transform("torch")
    with pytest.raises(SourceError, match="are not images") as caught:
        fastvgg.batches(tmp_path / "f.npy", 8, transform=transform, shuffle=shuffle)
    assert remedy in caught.value.remedy
    assert "check_values=False" in caught.value.remedy
    meant = fastvgg.batches(
        tmp_path / "f.npy", 8, transform=transform, shuffle=shuffle, check_values=False
    )
    for images, _, rows in meant:
        assert images.tobytes() == oracle.apply(transform, values[rows]).tobytes()
    assert rows_of(fastvgg.batches(tmp_path / "f.npy", 8)) == list(range(IMAGES))


def test_stored_floats_that_are_images_are_preprocessed(tmp_path):
    for values in (make_images(dtype="float32"), np.zeros((2, 5, 7, 3), np.float32)):
        np.save(tmp_path / "f.npy", values)
        (batch,) = fastvgg.batches(tmp_path / "f.npy", IMAGES, transform=Transform("torch"))
        assert batch.images.tobytes() == oracle.apply(Transform("torch"), values).tobytes()


def test_stored_images_are_not_restored(tmp_path):
    np.save(tmp_path / "f.npy", make_images(dtype="float32"))
    with pytest.raises(SourceError, match="never preprocessed"):
        fastvgg.batches(tmp_path / "f.npy", 8, transform=Transform("torch").inverse())


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
        ({"threads": 0}, "invalid threads=0"),
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
    with pytest.raises(SourceError, match="direction='pack'"):
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
    with pytest.raises(StoppedError, match="file was truncated") as caught:
        list(yielded)
    assert "chunk" not in caught.value.remedy


def test_iteration_that_failed_resumes_as_its_message_says(path):
    batches, whole = fastvgg.batches(path, 4), path.read_bytes()
    yielded = iter(batches)
    first = [next(yielded)]
    path.write_bytes(whole[:300])
    with pytest.raises(StoppedError, match="load_state_dict resumes after"):
        first.extend(yielded)
    path.write_bytes(whole)
    resumed = fastvgg.batches(path, 4)
    resumed.load_state_dict(batches.state_dict())
    assert rows_of(first) + rows_of(resumed) == list(range(IMAGES))


def test_labels_do_not_change_with_the_array_that_was_given(path):
    labels = np.arange(IMAGES)
    batches = fastvgg.batches(path, 4, labels=labels)
    labels[:] = -7
    for batch in batches:
        assert batch.labels.tolist() == batch.rows.tolist()


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
