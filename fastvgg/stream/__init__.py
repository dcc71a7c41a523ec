"""One dataset into another, chunk by chunk.

`prepare` looks at source and target and refuses early, `plan` is the arithmetic, `state` is what
there is of the target already, `values` looks at some pixels. `run` carries the plan out, each
chunk written `behind` the next, and `report` tells of it; `journal` says which chunks are durable.
`inplace` carries it out on the file itself, through the `ring`. `manifest` is what a finished
dataset is, `job` what it and the journals say of a run, `verify` proves it, `info` tells it, and
every durable system call goes through `storage`.
"""
