"""Compiled loops: the only folder that imports Numba.

`jit` says how kernels are compiled; `vector` has blocks of pixels, and `memory`, `order` and
`arithmetic` what is done with them. `spec` says which kernel is meant, `convert` has the kernels of
transforms, `resample` that of resizing, and `bandwidth` what both are compared with. Nothing here
checks, splits or allocates: `engine` does.
"""
