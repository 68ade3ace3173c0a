"""The launcher: ``python -m mlviews.integrations.solo_learn [--image-size N] SCRIPT [ARGUMENTS]``, also under ``torchrun -m``.

It runs the script as ``python SCRIPT`` would, in this very module: Lightning starts further ranks of a module by its name, and they
are patched too. They get Hydra's arguments only; the script and the option reach them by an environment variable.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_VARIABLE = "MLVIEWS_SOLO_LEARN"
_USAGE = """usage: python -m mlviews.integrations.solo_learn [--image-size N] SCRIPT [ARGUMENTS]

Runs a script of solo-learn, e.g. main_pretrain.py, with data.format=mlvgm added to the formats it knows.
  --image-size N  side in pixels of real images of data.dataset=custom (validation, main_linear.py, main_knn.py);
                  without it solo-learn's 224"""


def _arguments() -> tuple[str, int | None, list[str]]:
    """The script, the image size, and the script's own arguments.

    Raises:
        ValueError: if they are not as the usage says.
        FileNotFoundError: if there is no such script.
    """
    if _VARIABLE in os.environ:
        script, size = json.loads(os.environ[_VARIABLE])
        return script, size, sys.argv[1:]
    rest, size = sys.argv[1:], None
    if rest[:1] == ["--image-size"]:
        if len(rest) < 2 or not rest[1].isdecimal() or int(rest[1]) < 1:
            raise ValueError(f"Invalid --image-size {' '.join(rest[1:2])}: give a number of pixels.\n{_USAGE}")
        rest, size = rest[2:], int(rest[1])
    if not rest or rest[0].startswith("-"):
        raise ValueError(f"Give the script to run{f' in the place of {rest[0]}' if rest else ''}.\n{_USAGE}")
    path = Path(rest[0]).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"No script {rest[0]}: run from solo-learn's checkout, or give the path of its main_pretrain.py.")
    return str(path), size, rest[1:]


def _run() -> None:
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(_USAGE)
        return
    try:
        script, size, arguments = _arguments()
        sys.path[0] = str(Path(script).parent)  # as for `python SCRIPT`: solo-learn need not be installed

        from mlviews.runs.processes import end_gently

        from .patches import patch

        patch(size)
        end_gently()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"mlviews: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    os.environ[_VARIABLE] = json.dumps([script, size])
    sys.argv = [script, *arguments]
    space = globals()
    space["__file__"] = script
    exec(compile(Path(script).read_bytes(), script, "exec"), space)


if __name__ == "__main__":
    _run()
