"""The hardware matrix: what people list (targets), what machines wrote (records), and the table of both.

Needs neither typer nor rich: a machine with an accelerator often has little else than its own stack.
"""
