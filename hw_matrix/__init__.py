"""The hardware matrix: what people list (targets), what machines wrote (records), and the table of both.

    python -m hw_matrix check|build|record

Run in a checkout. Needs neither typer nor rich: a machine with an accelerator often has little else than its own stack.
"""
