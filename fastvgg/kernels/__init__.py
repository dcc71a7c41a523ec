"""Compiled loops: the only folder that imports Numba.

`compile` holds every Numba option, `blocks` what happens to one value, `loops` the passes over
memory that are made of blocks. Nothing here checks, dispatches or allocates: `engine` does.
"""
