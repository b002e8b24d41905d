"""The one command: `sparsity-atlas NAME ...`, also `python -m sparsity_atlas NAME ...`."""

from __future__ import annotations

import difflib
import importlib
import sys

from sparsity_atlas.commands import COMMANDS, STAGES, TOOLS, Command

PROGRAM = "sparsity-atlas"


def _overview() -> str:
    width = max(map(len, COMMANDS))

    def lines(commands: dict[str, Command]) -> str:
        return "\n".join(f"  {name:<{width}}  {one.about}" for name, one in commands.items())

    return (
        f"usage: {PROGRAM} NAME ...      {PROGRAM} NAME --help says more of one\n\n"
        f"Stages, which the workflow runs in this order:\n{lines(STAGES)}\n\n"
        f"Tools:\n{lines(TOOLS)}\n"
    )


def main() -> None:
    """Run what the first words of the command line name."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        (sys.stdout if words else sys.stderr).write(_overview())
        raise SystemExit(0 if words else 2)
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    if name is None:
        close = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"{PROGRAM} --help lists them"
        sys.stderr.write(f"error: no command '{words[0]}'; {hint}\n")
        raise SystemExit(2)
    sys.argv = [f"{PROGRAM} {name}", *words[len(name.split()) :]]
    from sparsity_atlas import allocator, cli

    allocator.bound_heap()
    cli.run(importlib.import_module(f"sparsity_atlas.{COMMANDS[name].module}").main)


if __name__ == "__main__":
    main()
