"""What decides a corpus's rows, and how two corpora differ."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfs.files import sha256
from cfs.sample.sample import SamplingSettings

VERSION = 2
"""Of the files' meaning; 1 had no contextual prompts and no top-k, and reads the same."""


@dataclass(frozen=True)
class CorpusSettings:
    """Everything that decides a corpus's rows, up to float rounding."""

    model: str
    """Fingerprint of the checkpoint's files."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    num_samples: int
    prompt_ids: list[int] | None
    """The seed that every sample continues; None where they continue prompts of their own."""
    sampling: SamplingSettings
    dtype: str
    num_prompts: int = 1
    """Sample i continues prompt i mod their number."""
    prompts: str | None = None
    """Fingerprint of the prompts of a contextual corpus."""
    store_topk: int = 0
    """Tokens of which log p_theta* is stored at each position, most probable first."""
    version: int = VERSION

    def fingerprint(self) -> str:
        """Name of the corpus in the cache: 16 hexadecimal digits."""
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def difference(self, there: dict[str, Any]) -> str | None:
        """The first setting in which a corpus begun with `there` differs, in words."""
        old, new = _flat(there), _flat(json.loads(json.dumps(asdict(self))))
        for key in sorted(new, key=lambda key: key != "version"):
            if old.get(key) != new[key]:
                return _difference(key, old.get(key), new[key])
        return None


def model_fingerprint(directory: str | Path) -> str:
    """SHA-256 over config.json and every safetensors file of a checkpoint."""
    digest = hashlib.sha256()
    for file in [Path(directory) / "config.json", *sorted(Path(directory).glob("*.safetensors"))]:
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _difference(key: str, there: Any, wanted: Any) -> str:
    """How a corpus differs from the one asked for, in words that name the flag."""
    if key == "version":
        return f"written in version {there} of the format, not {wanted}"
    if key == "prompt_ids":
        kinds = ["contextual" if ids is None else f"prompt ids {ids}" for ids in (there, wanted)]
        return f"begun with {kinds[0]}, not {kinds[1]} (--seed-text, --contexts)"
    if key == "num_prompts":
        return f"begun with {there} prompts, not {wanted} (--contexts)"
    others = {
        "model": "another model (--model)",
        "tokenizer": "another tokenizer (--model)",
        "prompts": "other prompts (--contexts, --format)",
    }
    if key in others:
        return f"begun with {others[key]}: fingerprint {str(there)[:12]}, not {wanted[:12]}"
    return f"begun with --{key.replace('_', '-')} {there}, not {wanted}"


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "sampling"} | settings.get("sampling", {})
