"""Reads the tables of pages, by the names of their columns, which come and go and change places."""

from __future__ import annotations


def table_rows(page: str) -> list[dict[str, str]]:
    """The rows of all tables of a page: name of the column -> what stands in the cell."""
    lines = page.splitlines()
    found: list[dict[str, str]] = []
    header: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if not line.startswith("|"):
            header = []
        elif following.startswith("|---"):
            header = _cells(line)
        elif not line.startswith("|---"):
            found.append(dict(zip(header, _cells(line), strict=True)))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
