"""Python and torch: the record of ``benchmarks/versions.py``."""

from __future__ import annotations

from documents.common import Record, captioned, markdown, provenance, table


@table("versions")
def versions(record: Record) -> str:
    """Which tests pass with which versions of Python and torch."""
    rows = []
    for cell in record["cells"]:
        names = [cell["versions"][name] for name in ("python", "torch", "numpy", "kornia")]
        rows.append([*names, *(str(cell[count]) for count in ("passed", "failed", "skipped"))])
    header = ["Python", "torch", "numpy", "kornia", "passed", "failed", "skipped"]
    files = ", ".join(f"`{name}`" for name in record["selection"])
    return captioned(markdown(header, rows), f"The tests of {files}.", provenance(record))
