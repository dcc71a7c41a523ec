"""Executors: compute the chunks of a run on the threads of this process, or on a cluster."""
