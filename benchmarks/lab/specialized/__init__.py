"""An experiment: the product with LoRA's branch, warp-specialized, in Gluon, for Hopper.

The package does not import it. ``benchmarks.lab.gpu`` times it beside the vendor's product and the
package's kernels, and says what the times decide. ``python -m benchmarks.lab.specialized`` compiles
it without a GPU.

``product`` has the kernel, on ``loads`` and ``tiles``; ``launches`` its operands and launches;
``cases`` calls with their oracle; ``support`` which Tritons and GPUs run it.
"""
