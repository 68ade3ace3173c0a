"""Weights by URL or Hugging Face id: downloaded once, checked, kept in torch's hub cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from mlviews.errors import WeightsError, listing

SUFFIXES = (".safetensors", ".pkl", ".pt", ".pth")
_OFFLINE = "Where there is no network, copy the file here by other means and pass its path: weights=FILE."


def is_remote(weights: object) -> bool:
    """Is it a URL, ``hf://owner/name[/file][@revision]``, or a bare ``owner/name`` that is no local path?"""
    if not isinstance(weights, str):
        return False
    bare = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", weights) and not weights.endswith(SUFFIXES) and not weights.startswith(".")
    return bool(re.match(r"(https?|hf)://", weights) or (bare and not Path(weights).exists() and not Path(weights).parent.exists()))


def fetch(reference: str) -> Path:
    """The local copy of remote weights, downloaded unless it is there.

    Args:
        reference: ``https://.../file.pkl``, followed by ``#sha256=HEX`` where the checksum is known (a name that ends in
            ``-HEX.pth``, torch's own convention, counts as well); or ``hf://owner/name/file``, ``hf://owner/name`` if that
            repository has a single weights file, each followed by ``@revision`` if wanted; or plain ``owner/name``.

    Raises:
        ValueError: for a reference of another form.
        ModuleNotFoundError: for ``hf://`` without the package huggingface_hub.
        FileNotFoundError: likewise for a plain ``owner/name``, which may have been meant as a file; if it cannot be downloaded, or
            the repository has no weights file, or more than one.
        mlviews.WeightsError: if what came, or the copy kept from an earlier time, does not have its checksum.
    """
    return _from_url(reference) if re.match(r"https?://", reference) else _from_hub(reference)


def _from_url(reference: str) -> Path:
    url, _, fragment = reference.partition("#")
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not re.fullmatch(r"[\w .+-]*\w[\w .+-]*", name):
        raise ValueError(f"Invalid weights URL {url!r}: its path must end in a file name ({listing('*' + suffix for suffix in SUFFIXES)}).")
    key, _, wanted = fragment.partition("=")
    if fragment and (key != "sha256" or not re.fullmatch("[0-9a-fA-F]{8,64}", wanted)):
        raise ValueError(f"Invalid checksum {fragment!r} of {url}: write URL#sha256=HEX, with 8 to 64 digits.")
    if not wanted and (match := re.search(r"-(?=[0-9a-f]*[a-f])([0-9a-f]{8,64})\.pth?$", name)):  # not a date
        wanted = match[1]
    file = Path(torch.hub.get_dir()) / "mlviews" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    known = file.with_name(name + ".sha256")  # of the first download: a copy that changed since is noticed
    if not (file.is_file() and known.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file))
        except Exception as error:  # urllib's errors, socket's, http.client's
            raise FileNotFoundError(f"{url} cannot be downloaded ({type(error).__name__}: {error}). {_OFFLINE}") from error
        _verify(file, wanted.lower(), url)
        known.write_text(_sha256(file) + "\n")
    recorded = known.read_text().strip()
    _verify(file, recorded, url)
    if not recorded.startswith(wanted.lower()):
        raise WeightsError(f"{url} has SHA-256 {recorded}, not {wanted}: correct the checksum, or the address.")
    return file


def _verify(file: Path, wanted: str, origin: str) -> None:
    """Remove the file if it does not have the checksum that begins so."""
    found = _sha256(file)
    if not found.startswith(wanted):
        file.unlink()
        raise WeightsError(
            f"{origin} has SHA-256 {found}, not {wanted}: the download was damaged, or the file is another one. "
            "It was removed; try again, or correct the checksum."
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_hub(reference: str) -> Path:
    name, _, revision = reference.removeprefix("hf://").partition("@")
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not re.fullmatch(r"[\w.-]+", owner) or not re.fullmatch(r"[\w.-]+", repository):
        raise ValueError(f"Invalid Hugging Face id {reference!r}: write hf://owner/name/file, or owner/name.")
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        remedy = f"need the package huggingface_hub: pip install 'mlviews[hub]'. {_OFFLINE}"
        if not reference.startswith("hf://"):
            raise FileNotFoundError(f"No weights file {reference}; if it is a Hugging Face id, weights from there {remedy}") from None
        raise ModuleNotFoundError(f"Weights from Hugging Face ({reference}) {remedy}") from None
    where = f"{owner}/{repository}"

    def ask(call: Callable[..., Any], *arguments: str) -> Any:
        try:
            return call(where, *arguments, revision=revision or None)
        except Exception as error:  # huggingface_hub's errors, its HTTP library's, the system's
            reason = str(error).strip().partition("\n")[0]
            raise FileNotFoundError(f"{where} cannot be downloaded ({type(error).__name__}: {reason}). {_OFFLINE}") from error

    if not file:
        found = [one for one in ask(huggingface_hub.list_repo_files) if one.endswith(SUFFIXES)]
        if len(found) != 1:
            raise FileNotFoundError(f"{where} has {len(found)} weights files ({listing(found[:5])}): write hf://{where}/FILE.")
        file = found[0]
    path = Path(ask(huggingface_hub.hf_hub_download, file))
    blob = path.resolve().name  # large files are kept under their SHA-256
    if re.fullmatch("[0-9a-f]{64}", blob) and _sha256(path) != blob:
        raise WeightsError(f"{path} does not have its SHA-256, {blob}: the download was damaged; remove the file and try again.")
    return path
