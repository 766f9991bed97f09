"""`python -m mpo`."""

from mpo.cli import run

if __name__ == "__main__":
    run()
