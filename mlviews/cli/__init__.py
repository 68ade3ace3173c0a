"""The command line: it parses, calls and prints.

A file per group of commands; importing it adds them, in the order of `mlviews --help`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings

import torch
import typer
from safetensors import SafetensorError

from mlviews.cli.shared import app

# The order of the imports is that of the commands in the help.
# isort: off
from mlviews.cli import generators
from mlviews.cli import views
from mlviews.cli import latents
from mlviews.cli import purify
from mlviews.cli import explore
from mlviews.cli import probe
from mlviews.cli import impact
from mlviews.cli import inverter
from mlviews.cli import publish
# isort: on

__all__ = [
    "app", "explore", "generators", "impact", "inverter", "latents", "main", "probe", "publish", "purify",
    "views",
]  # fmt: skip


def main() -> None:
    """Run the command line; bad input becomes one line on stderr and exit code 2."""
    _replace_what_cannot_be_encoded()
    # torchmetrics', which Lightning Fabric imports if it is installed: it would stand before every line.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        raise SystemExit(status)
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except BrokenPipeError:  # nobody reads on, as after `| head -1`
        _discard_output()
        raise SystemExit(1) from None
    except Exception as error:
        explanation = _explanation(error)
        if explanation is None:
            raise
        print("mlviews:", _one_line(explanation), file=sys.stderr)
        _discard_output()
        raise SystemExit(2) from None


def _replace_what_cannot_be_encoded() -> None:
    """Have a sign that the output's encoding does not know printed as a question mark, not raise an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _discard_output() -> None:
    """Send what stdout still holds nowhere: Python flushes it at its end, and would complain once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explanation(error: Exception) -> str | None:
    """Return what to tell about an error that bad input or the machine has caused; None for a bug."""
    # click's own errors (a missing value, an unknown option) write their message themselves.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        return str(format_message())
    message = str(error)
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return message or type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message:
        return f"There is not enough memory: take smaller batches ({message.strip() or 'MemoryError'})."
    if isinstance(error, SafetensorError) or message.startswith(_TORCH_CANNOT_WRITE):
        return f"A file could not be written or read ({message}); look at the disk, then at the file."
    return None


_TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed writing", "[enforce fail at inline_container.cc")


def _one_line(message: str) -> str:
    """Return a message without line breaks and other control characters."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1]
        for character in " ".join(message.split())
    )
