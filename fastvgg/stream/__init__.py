"""One dataset into another, chunk by chunk.

`prepare` looks at source and target and refuses early, `plan` is the arithmetic, `run` carries it
out, `journal` says which chunks are durable, `manifest` what a finished dataset is, `verify` proves
it, and `storage` is where every durable system call goes through.
"""
