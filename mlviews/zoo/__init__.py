"""The bundled generators: weights, model cards, and the scripts that trained and measured them."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the bundled files are."""
