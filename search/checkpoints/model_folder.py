"""Where a model that the user names lies: a folder, or files of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from search.errors import CheckpointError, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LOCAL_COPY = "check the spelling, or give the folder of a local copy"


def find_model_folder(path: str | Path, revision: str | None = None) -> Path:
    """The absolute path of a local model folder, or of where the hub's files were put.

    A name that could be a hub id but is one typo away from a folder here is taken for the typo, so
    that nothing is downloaded by mistake.

    Args:
        path: a folder or a hub id, which may end in `@` and a revision.
        revision: commit, tag or branch of a hub id; by default its main branch.

    Raises:
        CheckpointError: neither a folder nor a hub model that can be had, or a revision of a folder.
    """
    text, folder = str(path), Path(path).expanduser()
    if isinstance(path, str) and revision is None and "@" in text and not folder.exists():
        text, _, revision = text.rpartition("@")
        return find_model_folder(text, revision)
    if folder.is_dir():
        if revision is not None and not _is_snapshot(folder, revision):
            raise CheckpointError(
                f"{text}: is a folder, which has no revision '{revision}'; leave the revision out, or give a hub id"
            )
        return folder.absolute()
    if folder.exists():
        raise CheckpointError(f"{text}: is a file, expected a model folder; give the folder that holds it")
    parent = folder.parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    hint = nearest(folder.name, siblings)
    if isinstance(path, str) and HUB_ID.fullmatch(text) and "did you mean" not in hint:
        return _download(text, revision)
    if not parent.is_dir():
        raise CheckpointError(f"{text}: no such folder, nor is there a folder {parent}; check the path")
    raise CheckpointError(f"{text}: no such folder{hint}")


def _is_snapshot(folder: Path, revision: str) -> bool:
    """Whether a folder is where the hub's cache keeps files, which recipes name together with the revision."""
    return folder.parent.name == "snapshots" and (
        folder.name == revision or (folder.parent.parent / "refs" / revision).is_file()
    )


def _download(hub_id: str, revision: str | None) -> Path:
    """The files of a hub model, fetched or from the hub's cache. Pickles are not even downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    cause: Exception
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md"],
            ignore_patterns=["*/*", "consolidated*"],
        )
        return Path(folder).absolute()
    except GatedRepoError as error:
        reason, cause = "its owner gates it", error
        way_out = "ask for access on its page and run `hf auth login`"
    except LocalEntryNotFoundError as error:
        reason, cause = "it is not in the hub's cache, and the hub cannot be reached", error
        way_out = "check the spelling, go online, or give the folder of a local copy"
    except RevisionNotFoundError as error:
        reason, cause = f"it has no revision '{revision}'", error
        way_out = "give a branch, a tag or a commit of it"
    except HfHubHTTPError as error:
        reason, cause = "the hub does not give it out", error
        way_out = f"{LOCAL_COPY}; for a private model run `hf auth login`"
    except (OSError, ValueError) as error:
        reason, cause = " ".join(str(error).split())[:200] or type(error).__name__, error
        way_out = LOCAL_COPY
    name = hub_id if revision is None else f"{hub_id}@{revision}"
    raise CheckpointError(f"'{name}': no such folder, and no model of the hub: {reason}; {way_out}") from cause
