"""One dataset into another, chunk by chunk.

`planner` inspects source and target and makes a `plan`; `target` inspects an existing target, and
`values` samples the pixels. `run` executes the plan: `compute` computes chunks, and
`commit_pipeline` writes and commits them to the `journal` (in a store, to the `store_journal`).
`in_place` does the same within one file, through the `redo_log`, whose format is `redo_log_layout`;
`retry` recomputes failed images. `manifest` describes a finished dataset, `job` is what it and the
journals record, and `verify` and `info` check and show it. `progress` and `report` count the work.
All durable I/O goes through `fastvgg.storage`.
"""
