"""The dataset for PyTorch's DataLoader. PyTorch is not installed with the tests."""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastvgg
from tests.helpers.datasets_on_disk import pixels, save_images, stdout_of

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

from fastvgg import oracle  # noqa: E402
from fastvgg.errors import SourceError, UsageError  # noqa: E402
from fastvgg.torch import BatchesDataset  # noqa: E402
from fastvgg.transform import Transform  # noqa: E402

pytestmark = pytest.mark.pixels

IMAGES = 23
ROWS = range(IMAGES)
TRANSFORMS = [Transform("torch", out_layout=layout) for layout in ("NHWC", "NCHW")]
WORKERS = [0, 2]


def make_images():
    return np.random.default_rng(7).integers(0, 256, (IMAGES, 5, 7, 3), np.uint8)


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "x.npy", make_images())
    return tmp_path / "x.npy"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A packed directory of two classes of five images, bright and dark; the first is damaged."""
    directory = tmp_path_factory.mktemp("photographs")
    images = np.concatenate([pixels(5) // 4, 255 - pixels(5) // 4])
    names = [f"{name}/{number}.png" for name in ("dark", "light") for number in range(5)]
    save_images(directory / "photos", images, names)
    (directory / "photos" / "dark" / "0.png").write_bytes(b"no image")
    target = directory / "packed.npy"
    fastvgg.plan(directory / "photos", target, direction="pack", size=(7, 9)).run()
    return target


def make_loader(dataset, workers, **options):
    # This process may have JAX threads and must not be forked.
    context = "forkserver" if workers else None
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context, **options
    )


def row_numbers(batches):
    """Return the labels of batches, which number the rows."""
    return [row for _, labels in batches for row in labels.tolist()]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_yield_every_row_once_with_its_label(path, workers, shuffle):
    dataset = BatchesDataset(path, 4, transform=TRANSFORMS[0], shuffle=shuffle, labels=ROWS)
    batches = list(make_loader(dataset, workers))
    assert sorted(row_numbers(batches)) == [*ROWS]
    expected = oracle.apply(TRANSFORMS[1], make_images())
    for images, labels in batches:
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.numpy().tobytes() == expected[labels.numpy()].tobytes()


@pytest.mark.parametrize("transform", [None, *TRANSFORMS], ids=repr)
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_channels_first_whatever_the_layout(path, transform, workers):
    dataset = BatchesDataset(path, 4, transform=transform, labels=ROWS)
    is_interleaved = transform is None or transform.out_layout == "NHWC"
    for images, labels in make_loader(dataset, workers):
        assert images.shape[1:] == (3, 5, 7)
        memory_format = torch.channels_last if is_interleaved else torch.contiguous_format
        assert images.is_contiguous(memory_format=memory_format)
        x = make_images()[labels.numpy()]
        expected = x if transform is None else oracle.apply(TRANSFORMS[0], x)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("stored", ["NHWC", "NCHW"])
def test_stored_network_inputs_are_channels_first(path, tmp_path, stored):
    fastvgg.plan(path, tmp_path / "y.npy", mode="torch", out_layout=stored, dtype="bfloat16").run()
    for images, labels in BatchesDataset(tmp_path / "y.npy", 4, labels=ROWS):
        assert images.dtype == torch.bfloat16
        expected = oracle.apply(TRANSFORMS[1], make_images()[labels.numpy()])
        assert torch.equal(images, torch.from_numpy(expected).to(torch.bfloat16))


@pytest.mark.parametrize("workers", [0, 2])
def test_network_learns_from_the_batches_as_they_are(photographs, workers):
    transform = Transform("torch")
    dataset = BatchesDataset(photographs, 3, transform=transform, shuffle=True)
    assert dataset.class_names == ["dark", "light"]
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    loader = make_loader(dataset, workers, persistent_workers=workers > 0)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        losses, seen = [], Counter()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seen.update(labels.tolist())
        assert seen == {0: 4, 1: 5}  # without the image that could not be decoded
        epochs.append(sum(losses))
    assert epochs[1] < epochs[0]


def test_float_labels_keep_their_type(path):
    targets = np.linspace(0, 1, IMAGES, dtype=np.float32)
    for _, labels in BatchesDataset(path, 4, labels=targets):
        assert labels.dtype == torch.float32


def test_dataset_without_labels_is_rejected_with_a_remedy_that_works(path):
    with pytest.raises(SourceError, match="no labels") as raised:
        BatchesDataset(path, 4)
    (labels,) = re.findall(r"labels=(range\(.*\))", raised.value.remedy)
    dataset = BatchesDataset(path, 4, labels=eval(labels))  # noqa: S307  # of our own message
    assert row_numbers(dataset) == [*ROWS]


def test_failed_images_are_zeros_on_request(photographs):
    batches = [*BatchesDataset(photographs, 4, labels=range(10), include_failed=True)]
    assert row_numbers(batches) == [*range(10)]
    assert not batches[0][0][0].any()


@pytest.mark.parametrize("workers", WORKERS)
def test_tensors_that_are_kept_stay_correct_and_can_be_modified(path, workers):
    dataset = BatchesDataset(path, 2, labels=ROWS)
    loader = make_loader(dataset, workers)
    kept = []
    for images, labels in loader:
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), make_images()[labels.numpy()])
        images.zero_()
        kept.append(images)
    assert not any(images.any() for images in kept)
    assert sorted(row_numbers(loader)) == [*ROWS]


@pytest.mark.parametrize(
    "keep",
    [
        lambda images: images,
        lambda images: images[1:],
        lambda images: images.permute(0, 2, 3, 1),
        lambda images: images.view(torch.uint8),
        lambda images: images.detach(),
        lambda images: images.untyped_storage(),
        lambda images: images.numpy(),
        lambda images: np.from_dlpack(images),
        lambda images: torch.from_dlpack(images),
    ],
)
def test_every_view_of_a_tensor_keeps_its_memory(path, keep):
    def first_bytes(kept):
        if isinstance(kept, torch.UntypedStorage):
            return list(kept)[:50]
        return np.asarray(kept).tobytes()

    dataset = BatchesDataset(path, 2, labels=ROWS)
    batches = iter(dataset)
    images, _ = next(batches)
    kept = keep(images)
    del images
    before = first_bytes(kept)
    assert sum(1 for _ in batches) == 11
    assert first_bytes(kept) == before


def test_dropped_tensors_lend_their_memory_to_the_next(path):
    dataset = BatchesDataset(path, 2, labels=ROWS, shuffle=True)
    addresses = {images.data_ptr() for _ in range(3) for images, _ in dataset}
    assert len(addresses) <= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_row_order_depends_only_on_the_epoch(path, workers):
    dataset = BatchesDataset(path, 4, shuffle=True, labels=ROWS)
    loader = make_loader(dataset, workers)

    def order(epoch):
        dataset.set_epoch(epoch)
        return row_numbers(loader)

    assert order(0) == order(0) != order(1)


FORK_SCRIPT = """
import sys
import torch
from fastvgg.torch import BatchesDataset
from fastvgg.transform import Transform
dataset = BatchesDataset(
    sys.argv[1], 4, transform=Transform("torch"), shuffle=True, labels=range(23)
)
unfinished = iter(dataset)
next(unfinished)  # has used threads before it forks
loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
for epoch in range(2):
    dataset.set_epoch(epoch)
    print(sorted(torch.cat([labels for _, labels in loader]).tolist()) == list(range(23)))
"""


def test_workers_can_be_forked(path):
    assert stdout_of(FORK_SCRIPT, path).split() == ["True", "True"]


RANK_SCRIPT = """
import sys
import torch
from fastvgg.torch import BatchesDataset
path, meeting, rank = sys.argv[1:]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2
)
dataset = BatchesDataset(path, 4, shuffle=True, seed=5, labels=range(23))
print(torch.cat([labels for _, labels in dataset]).tolist())
torch.distributed.destroy_process_group()
"""


def test_ranks_partition_the_rows(path, tmp_path):
    whole = row_numbers(BatchesDataset(path, 4, shuffle=True, seed=5, labels=ROWS))
    with ThreadPoolExecutor(2) as pool:
        printed = pool.map(
            stdout_of, [RANK_SCRIPT] * 2, [path] * 2, [tmp_path / "meeting"] * 2, "01"
        )
        orders = [json.loads(text.splitlines()[-1]) for text in printed]
    assert orders[0] + orders[1] == whole
    assert len(orders[0]) == 11


class Worker(torch.utils.data.IterableDataset):
    """What torchdata's StatefulDataLoader does in a worker: resume, and save after each batch."""

    def __init__(self, dataset, states=None):
        self.dataset = dataset
        self.states = states

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        if self.states is not None:
            self.dataset.load_state_dict(self.states[worker.id])
        for _, labels in self.dataset:
            yield worker.id, labels.tolist(), json.loads(json.dumps(self.dataset.state_dict()))


@pytest.mark.parametrize("batches", [2, 3])
def test_workers_resume_from_their_states(path, batches):
    def dataset():
        return BatchesDataset(path, 4, shuffle=True, labels=ROWS)

    first, states = [], {}
    for number, (worker, labels, state) in enumerate(make_loader(Worker(dataset()), 2)):
        if number < batches:
            first += labels
            states[worker] = state
    rest = [labels for _, labels, _ in make_loader(Worker(dataset(), states), 2)]
    assert sorted([*first, *(row for labels in rest for row in labels)]) == [*ROWS]


def test_iteration_resumes_from_its_state(path):
    dataset, whole = (BatchesDataset(path, 4, shuffle=True, labels=ROWS) for _ in range(2))
    iterator = iter(dataset)
    first = [next(iterator) for _ in range(2)]
    resumed = BatchesDataset(path, 4, shuffle=True, labels=ROWS)
    resumed.load_state_dict(dataset.state_dict())
    assert row_numbers([*first, *resumed]) == row_numbers(whole)


def test_state_with_other_options_is_rejected(path):
    state = BatchesDataset(path, 4, labels=ROWS).state_dict()
    other = BatchesDataset(path, 4, labels=ROWS, include_failed=True)
    other.load_state_dict(state)
    with pytest.raises(UsageError, match="include_failed"):
        next(iter(other))


def test_missing_path_is_rejected_when_the_dataset_is_created(path):
    with pytest.raises(SourceError, match="does not exist"):
        BatchesDataset(path.with_name("none.npy"), 4, labels=ROWS)
