"""A family whose domains have many search items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from racing_runs import DOMAINS

PIECES = 6


@pytest.fixture(scope="module")
def many_items(family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Domain -> pool -> file, with 48 search items in each domain."""
    folder = tmp_path_factory.mktemp("items")
    found: dict[str, dict[str, str]] = {}
    for domain in DOMAINS:
        files = {pool: str(family / "data" / domain / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
        rows = [json.loads(line) for line in Path(files["search"]).read_text().splitlines()]
        length = len(rows[0]["text"]) // PIECES
        pieces = [
            {"id": f"{row['id']}-{k}", "text": row["text"][k * length : (k + 1) * length]}
            for row in rows
            for k in range(PIECES)
        ]
        path = folder / f"{domain}.jsonl"
        path.write_text("\n".join(json.dumps(piece) for piece in pieces) + "\n")
        found[domain] = {**files, "search": str(path)}
    return found


@pytest.fixture
def racing_config(family_config: dict[str, Any], many_items: dict[str, dict[str, str]]) -> dict[str, Any]:
    config = dict(family_config)
    for name in DOMAINS:
        config["evaluators"][name]["data"] = many_items[name]
    config["search"] |= {"budget": 44, "window": 4, "baselines": ["uniform_soup"]}
    config["search"]["fitness"] = {"racing": True, "smallest": 4, "first": 0.1, "precision": 0.2}
    return config
