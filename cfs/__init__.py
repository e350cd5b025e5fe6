"""Context-free synthetic data: fine-tune a language model without making it forget."""

__version__ = "0.1.0"
