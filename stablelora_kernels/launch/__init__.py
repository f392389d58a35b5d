"""From a call of an op to its kernel launches. The only importer of the kernels."""
