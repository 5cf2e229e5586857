"""The command ``relaxprop``, also where the packages that it needs are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs `relaxprop.lab.cli.main`, whose imports take some seconds."""
    try:
        from relaxprop.lab.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        sys.exit(f"error: the command line needs the package {error.name}: pip install 'relaxprop[lab]'")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
