"""Convert one dataset into another, chunk by chunk; all durable I/O is in `fastvgg.storage`."""
