"""Dequantisation of GGUF tensors: the commonest types by PyTorch on several threads (`layers/quantized.py`), all others
by the gguf package.

Both give the gguf package's numbers bit for bit. Axes: blocks = groups of numbers that share a scale; bytes of a stored
block, or the numbers in it.
"""

import torch

from keifu.layers.quantized import FORMATS, IN_CACHE, Numbers, Stored, unpack


def read_blocks(stored: Stored, format: str, size: int) -> Numbers:
    """Return the numbers of blocks of this type as float32: (blocks, size)."""
    if format in FORMATS:
        return unpack(stored, format)
    from gguf import GGMLQuantizationType, dequantize

    numbers = torch.empty(len(stored), size, dtype=torch.float32, device="cpu")
    step = max(1, IN_CACHE // size)
    for start in range(0, len(stored), step):
        some = dequantize(stored[start : start + step].numpy(), GGMLQuantizationType[format])
        numbers[start : start + step] = torch.from_numpy(some)
    return numbers
