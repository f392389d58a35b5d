"""What the compiler makes of each kernel for each GPU, read without one: see
docs/internals/checked-without-a-gpu.md, also for when it may go.
"""
