"""Convert one dataset into another, chunk by chunk.

docs/architecture.md says what each module does. All durable I/O goes through `fastvgg.storage`.
"""
