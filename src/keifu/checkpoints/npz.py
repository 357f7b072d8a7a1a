"""NumPy archives (.npz) as models: g2p-en's weights, which are published in no other form.

The archive holds arrays alone; that they are a recurrent encoder-decoder without attention, and what each row stands
for, is written here. Nothing is ever unpickled.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from keifu.checkpoints.plan import Source, Stored
from keifu.checkpoints.registry import describe
from keifu.errors import UserError
from keifu.models import seq2seq

NAMES = {
    "source_embedding.weight": "enc_emb",
    "target_embedding.weight": "dec_emb",
    "encoder.forwards.input.weight": "enc_w_ih",
    "encoder.forwards.input.bias": "enc_b_ih",
    "encoder.forwards.recurrent.weight": "enc_w_hh",
    "encoder.forwards.recurrent.bias": "enc_b_hh",
    "decoder.gru.input.weight": "dec_w_ih",
    "decoder.gru.input.bias": "dec_b_ih",
    "decoder.gru.recurrent.weight": "dec_w_hh",
    "decoder.gru.recurrent.bias": "dec_b_hh",
    "head.weight": "fc_w",
    "head.bias": "fc_b",
}
# The archive numbers the tokens of a target <pad>, <unk>, <s>, </s>, those of a source <pad>, <unk>, </s>. In keifu one
# id ends both sides, so the two rows of a target change places.
EXCHANGED = ("dec_emb", "fc_w", "fc_b")
START, END = 2, 3
NOTE = f"The rows of <s> and </s> in {', '.join(EXCHANGED)} have changed places, so that 2 is the end of both sides."
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def open_npz(path: Path) -> Source:
    """The model in an archive. What is no archive, or holds other arrays than g2p-en's, is a `UserError`."""
    arrays, config = _read(path), seq2seq.SIZES["g2p-en"]
    missing = [name for name in NAMES.values() if name not in arrays]
    if missing:
        raise UserError(
            f"{path} is not g2p-en's archive, the only .npz that keifu reads: it lacks {', '.join(missing[:5])}; "
            "give weights as safetensors, with a config.json that describes them."
        )
    family, _ = describe(config)
    stored = {name: Stored(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.dtype) for name, t in arrays.items()}
    return Source(path, "NumPy", family, config, stored, lambda name: _exchanged(name, arrays[name]), _tokenizer,
                  NAMES, notes=(NOTE,))  # fmt: skip


def _read(path: Path) -> Mapping[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}  # what is no array comes as bytes
    except (ValueError, EOFError, OSError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no NumPy archive of plain numbers, or is torn: {error}") from error
    other = [f"{name} as {array.dtype}" for name, array in arrays.items() if str(array.dtype) not in DTYPES]
    if other:
        raise UserError(
            f"{path} stores {', '.join(other[:5])}, which keifu does not read there, only float32 and float64."
        )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _exchanged(name: str, tensor: Tensor) -> Tensor:
    if name not in EXCHANGED:
        return tensor
    rows = torch.arange(len(tensor))
    rows[[START, END]] = rows[[END, START]]
    return tensor[rows]


def _tokenizer() -> object:
    from keifu.data.tokenizers.phonemes import letters_to_phonemes

    return letters_to_phonemes()
