"""A finished model folder, uploaded to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from search.errors import MeiosisError, UserError

_LOG_IN = "run `hf auth login` with a token that may write"


@dataclass(frozen=True)
class Repository:
    """Where to push: `org/name`, and whether a new repository is private."""

    name: str
    private: bool = False


def check_repository(name: str | None, private: bool = False) -> Repository | None:
    """What the options `--push` and `--private` mean, checked before any work is done.

    Raises:
        UserError: a name that the hub does not take, no token, or `private` without `name`.
    """
    if name is None:
        if private:
            raise UserError("--private: says what --push does, which is not there; give --push ORG/NAME")
        return None
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f"--push {name}: found no name of a repository, expected ORG/NAME (or your user name before the slash), "
            "of letters, digits, '-', '_' and '.'"
        )
    if get_token() is None:
        raise UserError(f"--push {name}: there is no token for the hub; {_LOG_IN}, or set HF_TOKEN")
    return Repository(name, private)


def push_folder(folder: Path, repository: Repository, *, endpoint: str | None = None) -> str:
    """Upload a model folder, all files in it, to a repository that is made if there is none.

    Args:
        endpoint: address of the hub; by default that of Hugging Face, or what HF_ENDPOINT says.

    Returns:
        The address of the repository.

    Raises:
        UserError: no token, or the hub does not let this user write there.
        MeiosisError: the hub cannot be reached, or fails. The folder is as it was.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    api = HfApi(endpoint=endpoint)
    where = f"--push {repository.name}"
    kept = f"the model is whole in {folder}"
    try:
        disable_progress_bars()
        address = api.create_repo(repository.name, private=repository.private or None, exist_ok=True)
        api.upload_folder(repo_id=repository.name, folder_path=folder, commit_message="Upload a merge made by Meiosis")
    except LocalTokenNotFoundError as error:
        raise UserError(f"{where}: there is no token for the hub; {_LOG_IN}; {kept}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it; {kept}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join(str(error.server_message or "").split())[:200]
        reason = f"the hub answers {status}{f' ({said})' if said else ''}"
        if status == 401:
            raise UserError(f"{where}: {reason}: the token is not valid; {_LOG_IN}; {kept}") from error
        if status in (403, 404):
            raise UserError(
                f"{where}: {reason}: this token may not write there; choose a name of yours or {_LOG_IN}; {kept}"
            ) from error
        if status in (400, 409, 422):
            raise UserError(f"{where}: {reason}: the name is taken or not allowed; choose another; {kept}") from error
        raise MeiosisError(f"{where}: {reason}; try again later; {kept}") from error
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MeiosisError(
            f"{where}: the hub cannot be reached ({reason}); check the network and push again; {kept}"
        ) from error
    return str(address)
