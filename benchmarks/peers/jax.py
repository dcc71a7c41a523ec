"""JAX."""

from __future__ import annotations

from peers.task import Implementation, means, torch_constants


def compile_with_jax(task, formula):
    """Compile a formula; donate the previous result, so that XLA reuses its memory."""
    import jax

    fresh = jax.jit(formula)
    reused = jax.jit(lambda x, _last: formula(x), donate_argnums=1, keep_unused=True)
    x = jax.device_put(task.x)
    last = jax.numpy.zeros(task.out.shape, task.out.dtype)

    def run_reusing_memory():
        nonlocal last
        last = reused(x, last).block_until_ready()
        return last

    return Implementation(batch=lambda: fresh(x).block_until_ready(), batch_into=run_reusing_memory)


def jax_preprocess(task):
    from jax import numpy as jnp

    mean = means(task.mode)
    if task.mode.is_bgr:
        return compile_with_jax(task, lambda x: x[..., ::-1].astype(jnp.float32) - mean)
    divide, mean, std = torch_constants(task.mode)
    return compile_with_jax(task, lambda x: (x.astype(jnp.float32) / divide - mean) / std)


def jax_restore(task):
    from jax import numpy as jnp

    mean = means(task.mode)

    def formula(y):
        return jnp.clip(jnp.round(y + mean), 0, 255).astype(jnp.uint8)[..., ::-1]

    return compile_with_jax(task, formula)
