"""Hand-written decoder-only language models that read and write Hugging Face directories."""

from cfs.model.config import ModelConfig, read_config
from cfs.model.decoder import Decoder
from cfs.model.saving import save_model
from cfs.model.weights import build_model, load_model, resolve_checkpoint

__all__ = [
    "Decoder",
    "ModelConfig",
    "build_model",
    "load_model",
    "read_config",
    "resolve_checkpoint",
    "save_model",
]
