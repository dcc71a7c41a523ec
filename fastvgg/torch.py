"""A dataset for PyTorch's DataLoader, sharded across its workers and distributed ranks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from fastvgg.errors import SourceError, option
from fastvgg.interop import as_torch
from fastvgg.loader import Batches

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from numpy.typing import ArrayLike

    from fastvgg.datasets.base import MissingChunks
    from fastvgg.loader import Batch
    from fastvgg.transform import Layout, Transform

__all__ = ["BatchesDataset"]


class BatchesDataset(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Iterate over ``(images, labels)`` batches of tensors, ready for a network and its loss.

    Images are of shape (N, 3, H, W), whatever the layout of the dataset or of the transform: NHWC
    images are a permuted view, in PyTorch's channels-last memory format. Labels are int64, or have
    the floating type of `labels`. Tensors may be kept and modified.

    Pass the dataset to a DataLoader with ``batch_size=None``, because it yields complete batches.
    Every worker of every `torch.distributed` rank iterates over one shard of the rows. The shards
    are disjoint and cover the dataset.

    Parameters
    ----------
    path, batch_size, transform, shuffle, seed, drop_last, labels, include_failed
        As for `fastvgg.batches`. With `shuffle`, call `set_epoch` before each epoch.
    missing_chunks, check_values
        As for `fastvgg.batches`.
    threads
        The number of threads of a worker; by default one, or without workers all available CPUs.

    Attributes
    ----------
    class_names : list of str or None
        The class of each label; see `fastvgg.batches`.

    Raises
    ------
    SourceError
        If the dataset has no labels, and `labels` is not given.

    Examples
    --------
    .. code-block:: python

        dataset = BatchesDataset("packed.npy", 256, transform=Transform("torch"), shuffle=True)
        loader = DataLoader(dataset, batch_size=None, num_workers=2, pin_memory=True)
        for epoch in range(90):
            dataset.set_epoch(epoch)
            for images, labels in loader:
                loss = cross_entropy(network(images), labels)
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
        labels: ArrayLike | None = None,
        include_failed: bool = False,
        missing_chunks: MissingChunks = "error",
        check_values: bool = True,
    ) -> None:
        super().__init__()
        self._batches = Batches(
            path,
            batch_size,
            transform=transform,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            threads=threads,
            labels=labels,
            include_failed=include_failed,
            missing_chunks=missing_chunks,
            check_values=check_values,
        )
        self.class_names = self._batches.class_names
        if self._batches.labels is None:
            images = self._batches.header.images
            raise SourceError(
                f"{self._batches.location} has no labels: no index next to it names any",
                "give one for every row, for example the numbers of the rows: "
                f"{option('labels', range(images))}",
            )
        self._threads = threads
        self._epoch = 0
        self._state: Mapping[str, Any] | None = None
        self._batches = self._worker_batches()

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
        to_tensors = functools.partial(_to_tensors, layout=self._batches.result.layout)
        yield from map(to_tensors, self._batches)

    def _worker_batches(self) -> Batches:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        rank, ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        threads = self._threads if worker is None else self._threads or 1
        shard = rank * workers + number, ranks * workers
        return self._batches.with_shard(shard, threads=threads)


def _to_tensors(batch: Batch, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, channels first, and the labels of a batch, without a copy."""
    images, labels = as_torch(batch.images), torch.from_numpy(batch.labels)
    return (images.permute(0, 3, 1, 2) if layout == "NHWC" else images), labels
