"""The tools of this project: `python -m tools COMMAND`.

Run where this project is; any Python from 3.11 on will do, with nothing installed. What a
user has to put right is one line to standard error, `error: ...`, and a non-zero exit status:
1, or 2 where the command line is wrong or `verify` could not check.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
from typing import NoReturn

from tools.common import ToolError

# By who needs them. Each is the module of its name, and that has what it does in full.
COMMANDS = {
    "use": {
        "build": "build the patched wheel of a release",
        "install": "put the wheel over the SGLang of an environment, or undo that",
        "apply": "put the series on a source tree in place, or undo that",
        "verify": "check that a server returns exact token ids",
    },
    "test": {
        "environment": "make the environment that tests or linters run in",
        "compatibility": "say what holds for which release, from stored results of the tests",
    },
    "work on the series": {
        "series": "check the series, work on it as git commits, export it",
        "lint": "lint what the patches put into SGLang",
        "status": "show how much of upstream each series touches",
        "port": "start the series of a release from that of another",
        "pins": "recompute the hashes of pins.toml",
        "pull-requests": "write the pull requests to upstream, and prove them",
    },
}


class Parser(argparse.ArgumentParser):
    """A parser with the one error style."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def overview() -> str:
    lines = []
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:14} {text}" for name, text in commands.items()]
    return "\n".join(lines).lstrip()


def main(argv: list[str]) -> int:
    top = Parser(
        prog="python -m tools",
        usage="%(prog)s COMMAND [--help] ...",
        description=overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    if not argv or argv[0] in ("-h", "--help"):
        top.print_help()
        return 0
    name, *rest = argv
    if not any(name in commands for commands in COMMANDS.values()):
        top.error(f"there is no command {name!r}")
    module = importlib.import_module(f"tools.{name.replace('-', '_')}")
    parser = Parser(
        prog=f"{top.prog} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        status: int = module.main(parser.parse_args(rest))
        sys.stdout.flush()
    except ToolError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_status
    except PermissionError as e:
        print(f"error: {e.filename}: {e.strerror}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever reads has enough. What is left is written nowhere, and not complained about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {e.strerror}; `make clean` removes what can be built again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
