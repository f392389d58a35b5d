"""Predictions of time and bytes. They stand in for measurements on GPUs that nobody has lent: see
docs/internals/checked-without-a-gpu.md.
"""
