"""Compiled loops: the only folder that imports Numba.

`jit` says how kernels are compiled, `vector` has the operations on blocks of pixels, `spec` says
which kernel is meant, `convert` has the kernels of transforms, `resample` that of resizing, and
`bandwidth` what both are compared with. Nothing here checks, splits or allocates: `engine` does.
"""
