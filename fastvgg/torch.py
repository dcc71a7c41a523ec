"""A dataset for PyTorch's DataLoader, sharded across its workers and distributed ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from fastvgg.interop import as_torch
from fastvgg.loader import Batches
from fastvgg.storage.location import Location

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from fastvgg.transform import Transform

__all__ = ["BatchesDataset"]


class BatchesDataset(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Iterate over ``(images, rows)`` batches of tensors; no two batches share memory.

    Pass it to a DataLoader with ``batch_size=None``, because it yields complete batches. Every
    worker of every `torch.distributed` rank iterates over one shard of the rows. The shards are
    disjoint and cover the dataset.

    Parameters
    ----------
    path, batch_size, transform, shuffle, seed, drop_last
        As for `fastvgg.batches`. With `shuffle`, call `set_epoch` before each epoch.
    threads
        The number of threads of a worker; by default one, or without workers all available CPUs.

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
        batch_size: int,
        *,
        transform: Transform | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self._location = Location.parse(path)
        self._batch_size = batch_size
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
        self._batches = self._worker_batches()  # raises now if an argument is invalid

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch number of the next iteration; call it before iterating the loader."""
        self._batches.set_epoch(epoch)
        self._epoch, self._state = epoch, None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this worker, for torchdata's StatefulDataLoader."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume this worker's next iteration after the batches that were already yielded."""
        self._state = dict(state)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over this worker's shard of an epoch."""
        self._batches = self._worker_batches()
        if self._state is None:
            self._batches.set_epoch(self._epoch)
        else:
            self._batches.load_state_dict(self._state)
        self._epoch, self._state = self._batches.state_dict()["epoch"] + 1, None
        for images, rows in self._batches:
            yield as_torch(images), torch.from_numpy(rows)

    def _worker_batches(self) -> Batches:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        rank, ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        threads = self._threads if worker is None else self._threads or 1
        shard = rank * workers + number, ranks * workers
        return Batches(
            self._location, self._batch_size, shard=shard, threads=threads, **self._options
        )
