"""The command ``rainfusion``: devices, models, plan, run, parity, calibrate, budgets, new-backend."""

from __future__ import annotations

import sys

_FAILED = 2


def main() -> None:
    """Run the command; every error of rainfusion, and every option that is not understood, is one line and status 2."""
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
        sys.exit(app(prog_name="rainfusion", standalone_mode=False) or 0)
