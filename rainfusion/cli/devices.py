"""``rainfusion devices``: what is here, and why the rest is not."""

from __future__ import annotations

from dataclasses import asdict

from rainfusion.cli.arguments import JSON


def devices(as_json: JSON = False) -> None:
    """List every backend and device; for those that are out, the stage, the reason and how to install them.

    Plugins of other packages, and backends that need a vendor's package, are asked in processes of their own: one that
    crashes or hangs costs a row.
    """
    from rainfusion.cli.console import print_json, stdout
    from rainfusion.plugins import probe

    found = probe.devices(isolate=True)
    if as_json:
        print_json([asdict(status) for status in found])
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("backend", "device", "status", "what it is, or why it is out", box=None, pad_edge=False)
    for status in sorted(found, key=lambda s: s.status != probe.READY):
        ready = status.status == probe.READY
        why = Text(status.name if ready else f"{status.stage}: {status.reason}")  # plugins' words are no markup
        if status.install and not ready:
            why.append(f"\n{status.install}", "cyan")
        state = Text(status.status, "green" if ready else "yellow")
        table.add_row(Text(status.backend, "bold"), Text(status.device), state, why)
    stdout().print(table, soft_wrap=False)
