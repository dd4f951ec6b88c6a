"""Tables of a page of the documentation, put where the page marks their places."""

from __future__ import annotations

import re


def filled(text: str, tables: dict[str, str]) -> str:
    """A page with its tables, by name, in place of those that it has between ``<!-- name -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page has no such place, or several.
    """
    for name, table in tables.items():
        block = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            block, lambda found, table=table: found[1] + table + "\n" + found[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}; it needs one")
    return text
