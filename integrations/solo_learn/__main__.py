"""The launcher: ``python -m mlviews.integrations.solo_learn [--image-size N] SCRIPT [ARGUMENTS]``.

It also runs under ``torchrun -m``. It runs the script as ``python SCRIPT`` would, but in this very module:
Lightning starts the other ranks of a module by the module's name, so these are patched as well. They get
Hydra's arguments only; the script and the option reach them by an environment variable.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_VARIABLE = "MLVIEWS_SOLO_LEARN"
_USAGE = """usage: python -m mlviews.integrations.solo_learn [--image-size N] SCRIPT [ARGUMENTS]

Runs a script of solo-learn, e.g. main_pretrain.py, with data.format=mlvgm added to the formats it knows.
  --image-size N  side in pixels of real images of data.dataset=custom (validation, main_linear.py,
                  main_knn.py); without it solo-learn's 224"""


def _arguments() -> tuple[str, int | None, list[str]]:
    """Return the script, the image size, and the script's own arguments.

    Raises:
        ValueError: if they are not as the usage says.
        FileNotFoundError: if there is no such script.
    """
    if _VARIABLE in os.environ:
        script, image_size = json.loads(os.environ[_VARIABLE])
        return script, image_size, sys.argv[1:]
    arguments = sys.argv[1:]
    image_size = None
    if arguments[:1] == ["--image-size"]:
        if len(arguments) < 2 or not arguments[1].isdecimal() or int(arguments[1]) < 1:
            value = " ".join(arguments[1:2])
            raise ValueError(f"Invalid --image-size {value}: give a number of pixels.\n{_USAGE}")
        image_size = int(arguments[1])
        arguments = arguments[2:]
    if not arguments or arguments[0].startswith("-"):
        instead = f" in the place of {arguments[0]}" if arguments else ""
        raise ValueError(f"Give the script to run{instead}.\n{_USAGE}")
    path = Path(arguments[0]).absolute()
    if not path.is_file():
        raise FileNotFoundError(
            f"No script {arguments[0]}: run from solo-learn's checkout, "
            "or give the path of its main_pretrain.py."
        )
    return str(path), image_size, arguments[1:]


def _run() -> None:
    """Patch solo-learn and run the script; a mistake in the call is one line and exit code 2."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(_USAGE)
        return
    try:
        script, image_size, arguments = _arguments()
        sys.path[0] = str(Path(script).parent)  # as for `python SCRIPT`: solo-learn need not be installed

        from mlviews.integrations.solo_learn.patches import patch
        from mlviews.runs.processes import end_gently

        patch(image_size)
        end_gently()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"mlviews: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    os.environ[_VARIABLE] = json.dumps([script, image_size])
    sys.argv = [script, *arguments]
    namespace = globals()
    namespace["__file__"] = script
    exec(compile(Path(script).read_bytes(), script, "exec"), namespace)


if __name__ == "__main__":
    _run()
