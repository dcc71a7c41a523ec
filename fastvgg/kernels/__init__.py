"""Compiled kernels: the only package that imports Numba.

`jit` compiles kernels. `vector` defines blocks of pixels, and `memory`, `order` and `arithmetic`
the operations on them. `spec` identifies a kernel, `convert` has the kernels of transforms,
`resample` the kernel of resizing, and `bandwidth` the memory-bandwidth probes as their limit.
Nothing here validates, partitions or allocates: `engine` does.
"""
