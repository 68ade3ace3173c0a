"""The bundled generators: weights, model cards, and the scripts that trained and measured them."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the bundled files are."""

PROVENANCE = "training.json"
"""The file in a folder of weights that says where they come from; single files hold it themselves."""
