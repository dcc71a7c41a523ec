"""Compiled loops: the only folder that imports Numba.

`compile` says what compiles them, `blocks` what happens to some values at once, `recipe` which
loop is meant, `loops` the passes over memory that are made of blocks. Nothing here checks, cuts or
allocates: `engine` does.
"""
