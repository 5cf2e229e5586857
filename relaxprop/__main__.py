"""The command ``relaxprop``, also where the packages that it needs are missing."""

from __future__ import annotations

import os
import sys

INSTALL = "pip install 'relaxprop[lab]'"


def main() -> None:
    """Runs `relaxprop.lab.cli.main`, whose imports may take some seconds."""
    try:
        from relaxprop.lab.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        _without(str(error.name), sys.argv[1:])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who was reading has seen enough, as in  relaxprop runs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains on its way out
        sys.exit(141)


def _without(package: str, arguments: list[str]) -> None:
    """What the command says where a package is missing: help and version need none."""
    if arguments == ["--version"]:
        from relaxprop import __version__

        print(f"relaxprop {__version__}")
    elif set(arguments) <= {"-h", "--help"}:
        print(
            "Usage: relaxprop [OPTIONS] COMMAND [ARGS]...\n\n"
            "Train networks by Activation Relaxation, and see it beside backpropagation (arXiv 2010.06219).\n\n"
            f"The commands (train, reproduce, show, bench, …) need packages that are not installed, as {package}:\n\n"
            f"    {INSTALL}\n\n"
            "The library does not: import relaxprop."
        )
    else:
        sys.exit(f"error: the command line needs the package {package}: {INSTALL}")


if __name__ == "__main__":
    main()
