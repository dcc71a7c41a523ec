"""Compiled kernels: the only package that imports Numba.

Nothing here validates, partitions or allocates: `engine` does.
"""
