"""Where a model that the user names lies: a folder, or files of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from search.errors import CheckpointError, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LOCAL_COPY = "check the spelling, or give the folder of a local copy"


def find_model_folder(path: str | Path) -> Path:
    """The absolute path of a local model folder, or of where the hub's files were put.

    A name that could be a hub id but is one typo away from a folder here is taken for the typo, so
    that nothing is downloaded by mistake.

    Raises:
        CheckpointError: neither a folder nor a hub model that can be had.
    """
    text, folder = str(path), Path(path).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.exists():
        raise CheckpointError(f"{text}: is a file, expected a model folder; give the folder that holds it")
    parent = folder.parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    hint = nearest(folder.name, siblings)
    if isinstance(path, str) and HUB_ID.fullmatch(text) and "did you mean" not in hint:
        return _download(text)
    if not parent.is_dir():
        raise CheckpointError(f"{text}: no such folder, nor is there a folder {parent}; check the path")
    raise CheckpointError(f"{text}: no such folder{hint}")


def _download(hub_id: str) -> Path:
    """The files of a hub model, fetched or from the hub's cache. Pickles are not even downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    cause: Exception
    try:
        folder = snapshot_download(
            hub_id,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"],
            ignore_patterns=["*/*", "consolidated*"],
        )
        return Path(folder).absolute()
    except GatedRepoError as error:
        reason, cause = "its owner gates it", error
        way_out = "ask for access on its page and run `hf auth login`"
    except LocalEntryNotFoundError as error:
        reason, cause = "it is not in the hub's cache, and the hub cannot be reached", error
        way_out = "check the spelling, go online, or give the folder of a local copy"
    except HfHubHTTPError as error:
        reason, cause = "the hub does not give it out", error
        way_out = f"{LOCAL_COPY}; for a private model run `hf auth login`"
    except (OSError, ValueError) as error:
        reason, cause = " ".join(str(error).split())[:200] or type(error).__name__, error
        way_out = LOCAL_COPY
    raise CheckpointError(f"'{hub_id}': no such folder, and no model of the hub: {reason}; {way_out}") from cause
