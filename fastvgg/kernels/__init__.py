"""Compiled kernels: the only package that imports Numba.

`jit` compiles kernels. `vector` defines blocks of pixels, and `memory`, `order` and `arithmetic`
the operations on them. `spec` identifies a kernel, `convert` has the kernels of transforms,
`resample` that of resizing, and `bandwidth` the memory-bandwidth probes to compare both with.
Nothing here validates, partitions or allocates: `engine` does.
"""
