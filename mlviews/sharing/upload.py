"""The way of a published folder to Hugging Face, by the package huggingface_hub.

The token is that package's business: the one of ``hf auth login``, or of the environment.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from mlviews.generators.published import CONFIG, DIFFUSERS, INVERTER, PROMPTS, WEIGHTS
from mlviews.sharing.card import LEVELS, SAMPLES

_REPLACED = (
    CONFIG,
    WEIGHTS,
    INVERTER,
    PROMPTS,
    f"{DIFFUSERS}/*",
    SAMPLES,
    LEVELS,
    "impact.json",
    "walker-[0-9]*.safetensors",
    "LICENSE-fashion-mnist",
)
"""What an earlier upload may have written, which is removed unless it is uploaded again.

No pattern may meet other files: the "*" of huggingface_hub crosses folders.
"""


def client(repository: str) -> ModuleType:
    """Return huggingface_hub, once the repository's name is one.

    Raises:
        ValueError: if the name is not ``owner/name``.
        ModuleNotFoundError: if huggingface_hub is not installed.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(repository)):
        raise ValueError(f"Invalid push={repository!r}: give the repository as owner/name.")
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"The upload to Hugging Face ({repository}) needs the package huggingface_hub: pip install "
            "'mlviews[hub]'. Without it, leave push out, and upload the folder by other means."
        ) from None
    return huggingface_hub


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder as one commit, into a repository that is made if it is missing; return its address.

    Raises:
        ValueError, ModuleNotFoundError: as :func:`client`.
        OSError: if the upload fails; the folder stays as it is.
    """
    hub = client(repository)
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Publish a generator of mlviews",
            delete_patterns=list(_REPLACED),
        )
    except Exception as error:  # huggingface_hub's errors, its HTTP library's, the system's
        problem = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise OSError(
            f"{folder} is written, but was not uploaded to {repository} ({problem}). Log in by `hf auth "
            f"login`, then upload it by `hf upload {repository} {folder}`."
        ) from error
    return str(address)
