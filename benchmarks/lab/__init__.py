"""Tools for those who work on the kernels; README.md says what each answers."""
