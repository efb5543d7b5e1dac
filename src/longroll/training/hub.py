"""A run's output on the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from longroll.errors import LongrollError, named

_OWN = ("checkpoints", "runs")  # what a run leaves in its output before the model


def check_push(repo_id: str, output: Path, *, resume: bool = False) -> None:
    """Find out before a run that its model could not be uploaded.

    Args:
        repo_id: `name` or `owner/name`.
        output: the folder of the run, all of which `push` uploads.
        resume: whether the run goes on, so that its own files may lie in `output`.

    Raises:
        LongrollError: for a name that the hub does not allow, HF_HUB_OFFLINE, a machine without a token, and
            an `output` with other files in it.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise LongrollError(
            f"`push_to_hub` {repo_id!r} is no name of a repository: give NAME or OWNER/NAME, of at most 96 "
            "letters, digits, '-', '_' and '.'."
        ) from None
    if is_offline_mode():
        raise LongrollError("`push_to_hub`: HF_HUB_OFFLINE forbids the network: unset it, or push later.")
    if get_token() is None:
        raise LongrollError("`push_to_hub`: this machine has no token: run hf auth login, or set HF_TOKEN.")
    found = [] if resume or not output.is_dir() else sorted(path.name for path in output.iterdir())
    others = [name for name in found if name not in _OWN]
    if others:
        raise LongrollError(
            f"`push_to_hub` uploads all of `output` {output}, which holds {others[0]} already: name an empty "
            "folder."
        )


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder to a model repository, which is made if it is not there; returns its address.

    Raises:
        LongrollError: for anything that goes wrong, with the command that uploads the folder later.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Post-trained by longroll"
        )
    except Exception as error:  # the HTTP client differs between releases, and so do its exceptions
        raise LongrollError(
            f"`push_to_hub` {repo_id}: {named(error)}. The model is saved in {folder}: upload it by "
            f"hf upload {repo_id} {shlex.quote(str(folder))}"
        ) from error
    return str(repository)
