"""One dataset into another, chunk by chunk.

`prepare` looks at source and target and refuses early, `plan` is the arithmetic, `state` is what
there is of the target already, `run` carries the plan out, `journal` says which chunks are durable,
`manifest` what a finished dataset is, `verify` proves it, `info` tells it, and every durable system
call goes through `storage`.
"""
