"""``python -m benchmarks`` fine-tunes a real model; ``pytest benchmarks`` times single operations;
``lab`` has our own tools.
"""
