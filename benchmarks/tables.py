"""Write the documents' tables from the committed records.

``python benchmarks/tables.py``; with ``--check`` it only compares.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``, and is what the function NAME in
``documents/`` makes of JSON.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from documents import DOCUMENTS, ROOT, TABLES


def render(text: str, page: Path = DOCUMENTS[0]) -> str:
    """Return a document with its tables made anew; ``page`` is where it is, for links."""

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table:{name} -->\n{TABLES[name](page)}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- /table -->", replacement, text, flags=re.DOTALL)


def main(check: bool) -> None:
    """Write the documents, or (``check``) exit with 1 if one is out of date."""
    for path in DOCUMENTS:
        text = path.read_text()
        rendered = render(text, path)
        if check and rendered != text:
            raise SystemExit(f"{path.relative_to(ROOT)} is out of date: run python benchmarks/tables.py")
        path.write_text(rendered)


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
