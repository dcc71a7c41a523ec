"""The batches of a dataset for PyTorch's DataLoader: shared out to its workers, and to ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from fastvgg.interop import as_torch
from fastvgg.loader import Batches

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from fastvgg.transform import Transform

__all__ = ["BatchesDataset"]


class BatchesDataset(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Tensors of images, and of which rows they are, each in memory of its own.

    Give it to a DataLoader with ``batch_size=None``, as it makes whole batches itself. Each of the
    loader's workers gives the batches of a part of the rows, and so does each rank of
    `torch.distributed`; all together are the dataset.

    Parameters
    ----------
    path, size, transform, shuffle, seed, drop_last
        As for `fastvgg.batches`. Where `shuffle` is true, say which epoch begins: `set_epoch`.
    threads
        How many a worker uses. If not given: one, or without workers all usable cores.

    Examples
    --------
    .. code-block:: python

        dataset = BatchesDataset("packed.npy", 256, transform=Transform("torch"), shuffle=True)
        loader = DataLoader(dataset, batch_size=None, num_workers=2, pin_memory=True)
        for epoch in range(90):
            dataset.set_epoch(epoch)
            for images, rows in loader:
                ...
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        transform: Transform | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self._path = path
        self._size = size
        self._options: dict[str, Any] = {
            "transform": transform,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
            "copy": True,
        }
        self._threads = threads
        self._epoch = 0
        self._state: Mapping[str, Any] | None = None
        self._batches = self._of_this_worker()  # refuses now what cannot be

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be the epoch of a number; before the loader is iterated."""
        self._batches.set_epoch(epoch)
        self._epoch, self._state = epoch, None

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration of this worker is; torchdata's StatefulDataLoader asks."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration of this worker go on after the batches that had been given."""
        self._state = dict(state)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over this worker's batches of an epoch."""
        self._batches = self._of_this_worker()
        if self._state is None:
            self._batches.set_epoch(self._epoch)
        else:
            self._batches.load_state_dict(self._state)
        self._epoch, self._state = self._batches.state_dict()["epoch"] + 1, None
        for images, rows in self._batches:
            yield as_torch(images), torch.from_numpy(rows)

    def _of_this_worker(self) -> Batches:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        rank, ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        threads = self._threads if worker is None else self._threads or 1
        shard = rank * workers + number, ranks * workers
        return Batches(self._path, self._size, shard=shard, threads=threads, **self._options)
