"""``python -m stablelora_kernels``: the command line."""

from stablelora_kernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
