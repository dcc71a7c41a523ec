"""PyTorch, torchvision and torch.compile."""

from __future__ import annotations

from peers.task import Implementation, means


def torchvision_preprocess(task):
    """Call v2's functions on the batch in channels-last memory, for which they are fastest."""
    import torch
    from torchvision.transforms.v2 import functional

    mean, std = list(task.mode.mean), list(task.mode.std or (1.0, 1.0, 1.0))
    scale = task.mode.divide is not None

    def normalize(x):
        y = x.movedim(-1, -3)
        y = functional.to_dtype(y.flip(-3) if task.mode.is_bgr else y, torch.float32, scale=scale)
        return functional.normalize(y, mean, std, inplace=True).movedim(-3, -1)

    x = torch.from_numpy(task.x)
    return Implementation(
        batch=lambda: normalize(x),
        image=lambda image, row: torch.from_numpy(row).copy_(normalize(torch.from_numpy(image))),
        set_threads=torch.set_num_threads,
    )


def torch_preprocess(task):
    """Run the operations of torchvision's v2, in their order, in place in the result."""
    import torch

    mean = torch.from_numpy(means(task.mode))
    std = torch.tensor(task.mode.std or (1.0, 1.0, 1.0))

    def normalize(y):
        if task.mode.divide is not None:
            y.mul_(1 / task.mode.divide)
        return y.sub_(mean).div_(std)

    def order_channels(x):
        return x.flip(-1) if task.mode.is_bgr else x

    def write_into(x, out):
        return normalize(out.copy_(order_channels(x)))

    x, out = torch.from_numpy(task.x), torch.from_numpy(task.out)
    return Implementation(
        batch=lambda: normalize(order_channels(x).to(torch.float32)),
        batch_into=lambda: write_into(x, out),
        image=lambda image, row: write_into(torch.from_numpy(image), torch.from_numpy(row)),
        set_threads=torch.set_num_threads,
    )


def torch_restore(task):
    import torch

    mean = torch.from_numpy(means(task.mode))

    def add_means_and_round(y):
        return y.add(mean).round_().clamp_(0, 255)

    def write_into(y, out):
        return out.copy_(add_means_and_round(y).flip(-1))

    y, out = torch.from_numpy(task.x), torch.from_numpy(task.out)
    return Implementation(
        batch=lambda: add_means_and_round(y).to(torch.uint8).flip(-1),
        batch_into=lambda: write_into(y, out),
        image=lambda image, row: write_into(torch.from_numpy(image), torch.from_numpy(row)),
        set_threads=torch.set_num_threads,
    )


def compile_with_torch(task, formula):
    import torch

    def write_into(x, out):
        return out.copy_(formula(x))

    torch.set_num_threads(task.threads)  # compiled into the code
    fresh = torch.compile(formula, dynamic=False)
    reused = torch.compile(write_into, dynamic=False)
    x, out = torch.from_numpy(task.x), torch.from_numpy(task.out)
    return Implementation(
        batch=lambda: fresh(x), batch_into=lambda: reused(x, out), set_threads=torch.set_num_threads
    )


def torch_compile_preprocess(task):
    import torch

    mean = torch.from_numpy(means(task.mode))
    if task.mode.is_bgr:
        return compile_with_torch(task, lambda x: x.flip(-1).to(torch.float32) - mean)
    std = torch.tensor(task.mode.std)
    return compile_with_torch(task, lambda x: (x.to(torch.float32) / task.mode.divide - mean) / std)


def torch_compile_restore(task):
    import torch

    mean = torch.from_numpy(means(task.mode))
    return compile_with_torch(
        task, lambda y: (y + mean).round().clamp(0, 255).to(torch.uint8).flip(-1)
    )
