"""The benchmarks: ``python -m benchmarks`` fine-tunes a real model, the ``bench_*`` modules time single operations."""
