"""`regard COMMAND`: every file of this folder with `add` and `run` is a command."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import regard.cli
from regard._version import __version__
from regard.contract.errors import RegardError, near

ORDER = ("list", "show", "why", "check", "compare", "speed", "new")


def commands() -> list[str]:
    """The names of all commands: in reading order, others after them."""
    found = [m.name for m in pkgutil.iter_modules(regard.cli.__path__) if m.name != "main"]
    return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(prog="regard", description="Every attention mechanism in one place.")
    whole.add_argument("--version", action="version", version=f"regard {__version__}")
    below = whole.add_subparsers(dest="command", metavar="COMMAND")
    for name in commands():
        module = importlib.import_module(f"regard.cli.{name}")
        assert module.__doc__ is not None
        help_line = module.__doc__.splitlines()[0].partition(": ")[2].rstrip(".")
        one = below.add_parser(name, help=help_line, description=help_line)
        module.add(one)
        one.set_defaults(run=module.run)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Errors that regard raises on purpose are one line on stderr and code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = commands()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        print(f"regard: there is no command {arguments[0]!r}{near(arguments[0], known)}", file=sys.stderr)
        return 2
    whole = parser()
    # what follows -- belongs to the command whole: argparse would split it among positionals
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given = whole.parse_args(arguments[:cut])
    given.rest = arguments[cut + 1 :]
    if given.command is None:
        whole.print_help()
        return 0
    try:
        return int(given.run(given) or 0)
    except RegardError as error:
        print(f"regard: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
