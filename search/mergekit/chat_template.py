"""The chat template that a merge file asks for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from search.mergekit.models import Models
from search.mergekit.settings import Reading

NAMED = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Templates that mergekit has under a name."""


def read_chat_template(said: str | None, models: Models, reading: Reading) -> str | None:
    """The text of the template; `auto` is the one that most models of the file have, the first of them in a tie."""
    if not said:
        return None
    if said == "auto":
        found = [text for checkpoint in models.checkpoints.values() if (text := template_of(checkpoint.folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{" not in said:
        what = f"'{said}' is a template that comes with mergekit" if said in NAMED else f"'{said}' is no Jinja template"
        reading.fault(("chat_template",), f"{what}; give the text of the template itself, or auto")
        return None
    return said


def template_of(folder: Path) -> str | None:
    """The default chat template of a model folder, if it has one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip() or None
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(template, list):
        named = [entry.get("template") for entry in template if entry.get("name") == "default"]
        template = named[0] if named else None
    return template.strip() or None if isinstance(template, str) else None
