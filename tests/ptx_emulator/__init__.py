"""An emulator of PTX. It stands in for GPUs that nobody has lent, and may go when CI has them: see
docs/internals/checked-without-a-gpu.md.
"""
