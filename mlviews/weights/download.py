"""Weights by URL or Hugging Face id: they are downloaded once, checked, and kept in torch's hub cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from mlviews.errors import WeightsError, listing
from mlviews.runs.files import sha256, whole

SUFFIXES = (".safetensors", ".pkl", ".pt", ".pth")
_OFFLINE = "Where there is no network, copy the file here by other means and pass its path: weights=FILE."


def is_remote(weights: object) -> bool:
    """Tell whether weights are to be downloaded.

    They are if this is a URL, ``hf://owner/name[/file][@revision]``, or a bare ``owner/name`` that is no
    local path.
    """
    if not isinstance(weights, str):
        return False
    if re.match(r"(https?|hf)://", weights):
        return True
    if weights.endswith(SUFFIXES) or weights.startswith("."):
        return False
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", weights):
        return False
    path = Path(weights)
    return not path.exists() and not path.parent.exists()


def fetch(reference: str) -> Path:
    """Return the local copy of remote weights, which are downloaded unless it is there.

    Args:
        reference: one of

            - ``https://.../file.pkl``, followed by ``#sha256=HEX`` where the checksum is known; a name that
              ends in ``-HEX.pth``, torch's own convention, counts as well;
            - ``hf://owner/name/file``, or ``hf://owner/name`` if that repository has a single weights file,
              each followed by ``@revision`` if a certain one is meant;
            - plain ``owner/name``, which means ``hf://owner/name``.

    Raises:
        ValueError: if the reference has another form.
        ModuleNotFoundError: for ``hf://`` without the package huggingface_hub.
        FileNotFoundError: likewise for a plain ``owner/name``, which may have been meant as a file; if the
            file cannot be downloaded; or if the repository has no weights file, or more than one.
        mlviews.WeightsError: if the download, or the copy kept from an earlier one, does not have its
            checksum.
    """
    if re.match(r"https?://", reference):
        return _from_url(reference)
    return _from_hub(reference)


# -- by URL --------------------------------------------------------------------------------------------------


def _from_url(reference: str) -> Path:
    """Return the local copy of the file at a URL."""
    url, _, fragment = reference.partition("#")
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not re.fullmatch(r"[\w .+-]*\w[\w .+-]*", name):
        suffixes = listing("*" + suffix for suffix in SUFFIXES)
        raise ValueError(f"Invalid weights URL {url!r}: its path must end in a file name ({suffixes}).")
    checksum = _checksum(url, name, fragment)

    file = Path(torch.hub.get_dir()) / "mlviews" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    # The digest of the first download is kept beside the file: a copy that changed since is noticed.
    record = file.with_name(name + ".sha256")
    if not (file.is_file() and record.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file))
        except Exception as error:  # urllib's errors, socket's, http.client's
            problem = f"{type(error).__name__}: {error}"
            raise FileNotFoundError(f"{url} cannot be downloaded ({problem}). {_OFFLINE}") from error
        _verify(file, checksum.lower(), url)
        with whole(record) as part:
            part.write_text(sha256(file) + "\n")
    digest = record.read_text().strip()
    _verify(file, digest, url)
    if not digest.startswith(checksum.lower()):
        # The file is as it came: it stays, for a reference that has the right checksum.
        raise WeightsError(
            f"{url} has SHA-256 {digest}, not {checksum}: correct the checksum, or the address."
        )
    return file


def _checksum(url: str, name: str, fragment: str) -> str:
    """Return the first digits of the SHA-256 that a URL names after ``#`` or in its file name; "" for none.

    Raises:
        ValueError: if the part after ``#`` is no checksum.
    """
    if fragment:
        key, _, digits = fragment.partition("=")
        if key != "sha256" or not re.fullmatch("[0-9a-fA-F]{8,64}", digits):
            raise ValueError(
                f"Invalid checksum {fragment!r} of {url}: write URL#sha256=HEX, with 8 to 64 digits."
            )
        return digits
    # At least one letter is asked for, so that a date is not taken for a checksum.
    match = re.search(r"-(?=[0-9a-f]*[a-f])([0-9a-f]{8,64})\.pth?$", name)
    return match[1] if match else ""


def _verify(file: Path, checksum: str, origin: str) -> None:
    """Remove the file, and raise a WeightsError, unless its SHA-256 begins with the checksum."""
    digest = sha256(file)
    if not digest.startswith(checksum):
        file.unlink()
        raise WeightsError(
            f"{origin} has SHA-256 {digest}, not {checksum}: the download was damaged, "
            "or the file is another one. It was removed; try again, or correct the checksum."
        )


# -- by Hugging Face id --------------------------------------------------------------------------------------


def _from_hub(reference: str) -> Path:
    """Return the local copy of a weights file of a Hugging Face repository."""
    name, _, revision = reference.removeprefix("hf://").partition("@")
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not re.fullmatch(r"[\w.-]+", owner) or not re.fullmatch(r"[\w.-]+", repository):
        raise ValueError(f"Invalid Hugging Face id {reference!r}: write hf://owner/name/file, or owner/name.")
    hub = _hub(reference)
    repository = f"{owner}/{repository}"

    def ask(call: Callable[..., Any], *arguments: str) -> Any:
        """Call a function of the hub's client for this repository."""
        try:
            return call(repository, *arguments, revision=revision or None)
        except Exception as error:  # huggingface_hub's errors, its HTTP library's, the system's
            reason = str(error).strip().partition("\n")[0]
            problem = f"{type(error).__name__}: {reason}"
            raise FileNotFoundError(f"{repository} cannot be downloaded ({problem}). {_OFFLINE}") from error

    if not file:
        files = [path for path in ask(hub.list_repo_files) if path.endswith(SUFFIXES)]
        if len(files) != 1:
            raise FileNotFoundError(
                f"{repository} has {len(files)} weights files ({listing(files[:5])}): "
                f"write hf://{repository}/FILE."
            )
        file = files[0]
    path = Path(ask(hub.hf_hub_download, file))
    blob = path.resolve().name  # large files are kept under their SHA-256
    if re.fullmatch("[0-9a-f]{64}", blob) and sha256(path) != blob:
        raise WeightsError(
            f"{path} does not have its SHA-256, {blob}: the download was damaged; "
            "remove the file and try again."
        )
    return path


def _hub(reference: str) -> ModuleType:
    """Return the package huggingface_hub, which is imported only where it is needed.

    Raises:
        ModuleNotFoundError: if it is not installed.
        FileNotFoundError: likewise for a plain ``owner/name``, which may have been meant as a file.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        remedy = f"need the package huggingface_hub: pip install 'mlviews[hub]'. {_OFFLINE}"
        if not reference.startswith("hf://"):
            raise FileNotFoundError(
                f"No weights file {reference}; if it is a Hugging Face id, weights from there {remedy}"
            ) from None
        raise ModuleNotFoundError(f"Weights from Hugging Face ({reference}) {remedy}") from None
    return huggingface_hub
