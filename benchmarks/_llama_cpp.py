"""llama.cpp's low-level API (llama-cpp-python): quantised files, and logits for any batch of tokens."""

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from torch import nn

from keifu import checkpoints

FILE_TYPES = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_0_pure": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
}
_quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))


def quantised(model: nn.Module, kind: str, folder: Path) -> Path:
    """Quantise the model with llama.cpp and return the path of the GGUF file. By default the head of q4_0 and q4_k has
    6 bits. With "q4_0_pure" all matrices have the same type."""
    whole, path = folder / "f32.gguf", folder / f"{kind}.gguf"
    if not whole.exists():
        checkpoints.save_gguf(model, None, whole, "f32")
    settings: Any = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.nthread = FILE_TYPES[kind], kind == "q4_0_pure", 2
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp did not quantise to {kind}")
    return path


class LlamaCpp:
    """Model with memory for `streams` texts of `length` tokens each."""

    def __init__(self, path: Path, streams: int, length: int, threads: int):
        settings: Any = llama_cpp.llama_context_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings.n_ctx, settings.n_seq_max = streams * ((length + 255) // 256 * 256), streams
        settings.n_batch, settings.n_ubatch = max(512, streams * length), 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def rollback(self, length: int) -> None:
        """Remove all tokens of each text except the first `length`."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), -1, length, -1)

    def run(self, texts: list[list[int]], start: int, wanted: int) -> np.ndarray:
        """Decode the next tokens of each stream from position `start` on. Return the logits after the last `wanted`
        tokens of each."""
        rows = [(t, start + p, s, p >= len(x) - wanted) for s, x in enumerate(texts) for p, t in enumerate(x)]
        self.batch.n_tokens = len(rows)
        for i, (token, position, stream, want) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = stream, want
        if llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError("llama.cpp did not decode the batch")
        asked = [i for i, row in enumerate(rows) if row[3]]
        return np.stack([self._logits(i) for i in asked])

    def _logits(self, index: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, index), (self.vocab_size,))

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
