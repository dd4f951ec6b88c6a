"""The command ``rainfusion``: devices, plan, run, parity, matrix."""

from __future__ import annotations

import sys

_FAILED = 2


def main() -> None:
    """Run the command; every error of rainfusion is one line on stderr and exit status 2."""
    try:
        from rainfusion.cli.app import app
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            f"the command needs {missing.name}, which is not installed: pip install 'rainfusion[cli]'", file=sys.stderr
        )
        sys.exit(_FAILED)
    from rainfusion.cli.console import errors_as_lines

    with errors_as_lines():
        app(prog_name="rainfusion")
