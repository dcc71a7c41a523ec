"""The dataset for PyTorch's DataLoader. PyTorch is not installed with the tests."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers.datasets_on_disk import stdout_of

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

from fastvgg import oracle  # noqa: E402
from fastvgg.errors import SourceError  # noqa: E402
from fastvgg.torch import BatchesDataset  # noqa: E402
from fastvgg.transform import Transform  # noqa: E402

pytestmark = pytest.mark.pixels

IMAGES = 23
TRANSFORM = Transform("torch", out_layout="NCHW")


def make_images():
    return np.random.default_rng(7).integers(0, 256, (IMAGES, 5, 7, 3), np.uint8)


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "x.npy", make_images())
    return tmp_path / "x.npy"


def make_loader(dataset, workers):
    # This process may have JAX threads and must not be forked.
    context = "forkserver" if workers else None
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_yield_every_row_once(path, workers, shuffle):
    dataset = BatchesDataset(path, 4, transform=TRANSFORM, shuffle=shuffle)
    batches = list(make_loader(dataset, workers))
    rows = torch.cat([rows for _, rows in batches])
    assert sorted(rows.tolist()) == list(range(IMAGES))
    expected = oracle.apply(TRANSFORM, make_images())
    for images, rows in batches:
        assert images.dtype == torch.float32
        assert images.numpy().tobytes() == expected[rows.numpy()].tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_row_order_depends_only_on_the_epoch(path, workers):
    dataset = BatchesDataset(path, 4, shuffle=True)
    loader = make_loader(dataset, workers)

    def order(epoch):
        dataset.set_epoch(epoch)
        return torch.cat([rows for _, rows in loader]).tolist()

    assert order(0) == order(0) != order(1)


FORK_SCRIPT = """
import sys
import torch
from fastvgg.torch import BatchesDataset
from fastvgg.transform import Transform
dataset = BatchesDataset(sys.argv[1], 4, transform=Transform("torch"), shuffle=True)
next(iter(dataset))  # has used threads before it forks
loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
for epoch in range(2):
    dataset.set_epoch(epoch)
    print(sorted(torch.cat([rows for _, rows in loader]).tolist()) == list(range(23)))
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
dataset = BatchesDataset(path, 4, shuffle=True, seed=5)
print(torch.cat([rows for _, rows in dataset]).tolist())
torch.distributed.destroy_process_group()
"""


def test_ranks_partition_the_rows(path, tmp_path):
    whole = torch.cat([rows for _, rows in BatchesDataset(path, 4, shuffle=True, seed=5)])
    with ThreadPoolExecutor(2) as pool:
        printed = pool.map(
            stdout_of, [RANK_SCRIPT] * 2, [path] * 2, [tmp_path / "meeting"] * 2, "01"
        )
        orders = [json.loads(text.splitlines()[-1]) for text in printed]
    assert orders[0] + orders[1] == whole.tolist()
    assert len(orders[0]) == 11


def test_worker_resumes_from_its_state(path):
    dataset, whole = (BatchesDataset(path, 4, shuffle=True) for _ in range(2))
    iterator = iter(dataset)
    first = [next(iterator)[1] for _ in range(2)]
    resumed = BatchesDataset(path, 4, shuffle=True)
    resumed.load_state_dict(dataset.state_dict())
    rows = torch.cat(first + [rows for _, rows in resumed])
    assert rows.tolist() == torch.cat([rows for _, rows in whole]).tolist()


def test_missing_path_is_rejected_when_the_dataset_is_created(path):
    with pytest.raises(SourceError, match="does not exist"):
        BatchesDataset(path.with_name("none.npy"), 4)
