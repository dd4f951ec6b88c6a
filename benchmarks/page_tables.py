"""Tables of a page in Markdown that a script writes, each between ``<!-- name -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping


def filled(text: str, tables: Mapping[str, str]) -> str:
    """The page with its tables in place of those that it has.

    Raises:
        ValueError: a table that has no place in it, or several.
    """
    for name, table in tables.items():
        block = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            block, lambda found, table=table: found[1] + table + "\n" + found[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}; it needs one")
    return text
