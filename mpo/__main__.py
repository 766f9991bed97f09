"""`mpo` and `python -m mpo`."""

import sys


def main() -> None:
    """Runs the command line, or says how to install what it needs: the kernels alone come without it."""
    try:
        from mpo.cli import run
    except ModuleNotFoundError as error:
        print(f"The trainer needs {error.name}, which is not installed. Install it with: pip install 'mpo-kernels[train]'", file=sys.stderr)
        sys.exit(2)  # mpo.errors.Status.MENDABLE
    run()


if __name__ == "__main__":
    main()
