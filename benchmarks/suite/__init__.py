"""``pytest benchmarks``: the one way to measure a layer, an optimizer step, a training step and
adapter files.
"""
