"""`mpo` and `python -m mpo`."""

import sys

from mpo.runtime.errors import Status
from mpo.runtime.interruption import SENTENCE, install


def main() -> None:
    """Runs the command line, or says how to install what it needs: the kernels alone come without
    it."""
    interruption = install()
    try:
        from mpo.commands.app import execute

        execute()
    except ModuleNotFoundError as error:
        print(
            f"The trainer needs {error.name}, which is not installed. Install it with: pip install"
            " 'mpo-kernels[train]'",
            file=sys.stderr,
        )
        sys.exit(Status.MENDABLE)
    except KeyboardInterrupt:
        print(SENTENCE, file=sys.stderr)
        sys.exit(Status.INTERRUPTED)
    except SystemExit as done:
        if group := sys.modules.get("mpo.runtime.ranks"):
            group.end(done.code)
        raise
    finally:
        interruption.ending = True


if __name__ == "__main__":
    main()
