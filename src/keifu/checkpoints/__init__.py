"""Published formats in and out: Hugging Face directories and GGUF files; the one place that knows every model."""

from keifu.checkpoints.gguf_saving import save_gguf
from keifu.checkpoints.opening import convert, inspect, load, load_model
from keifu.checkpoints.report import Report
from keifu.checkpoints.saving import save

__all__ = ["Report", "convert", "inspect", "load", "load_model", "save", "save_gguf"]
