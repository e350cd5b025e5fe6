"""The small files that ship with the package."""

from pathlib import Path

TINYWORLD_DIR = Path(__file__).parent / "tinyworld"
"""The embedded base model, a Hugging Face directory (docs/tinyworld.md)."""
