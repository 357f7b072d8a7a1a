"""Targets of a translator by the native step: PyTorch's logits with the same numbers, and the same bits in any beam."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from native_toys import OF_THIS_MACHINE, everywhere, unpacked
from quick import quick
from torch import Tensor

from keifu import checkpoints
from keifu.data.padding import pad
from keifu.errors import UserError
from keifu.inference.text import translation
from keifu.inference.text.translation import TranslationParams, search
from keifu.layers.transformer.encoder_decoder import EncoderDecoder
from keifu.models import transformer
from keifu.native.model import native_form
from keifu.native.targets import NativeTranslator, Targets

pytestmark = pytest.mark.usefixtures("opened")
SHAPE = transformer.Config(
    vocab_size=101, context_length=70, dim=60, hidden_dim=88, n_layers=2, n_decoder_layers=3, n_heads=5,
    n_decoder_heads=3, start_id=1, end_id=2, pad_id=3, dropout=0.0,
)  # fmt: skip
KINDS = {
    "shared and tied": SHAPE,
    "apart": replace(SHAPE, target_vocab_size=83, shared=False, tied=False, activation="silu", scaled=False),
    "one head": replace(SHAPE, n_decoder_heads=1, activation="gelu", interleaved=True, decoder_hidden_dim=50),
}
SOURCES = [
    [*torch.randint(4, 80, (n,), generator=torch.Generator().manual_seed(n)).tolist(), 2] for n in (5, 40, 1, 33)
]


def translator(config: transformer.Config = SHAPE) -> EncoderDecoder:
    """Return one with weights, and numbers added to the logits, large enough that all of them count."""
    torch.manual_seed(1)
    model = transformer.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.logits_bias.normal_()
    return model


def begun(packed: NativeTranslator, sources: Sequence[list[int]], rows: int) -> Targets:
    return Targets(packed, packed.encode(*pad(sources, SHAPE.pad_id)), [len(each) for each in sources], 64, rows)


def written(targets: Targets, tokens: Tensor) -> Tensor:
    """Return logits [rows, length + 1, vocab] around these tokens of each row."""
    return torch.stack([targets.first().clone(), *(targets.next(each).clone() for each in tokens.T)], 1)


@pytest.mark.parametrize(
    ("instructions", "kind", "weights"),
    everywhere(KINDS, KINDS, ("f32", "bf16", "int8", "int4")),
    indirect=["instructions"],
)
def test_logits_are_those_of_the_same_numbers_in_pytorch(kind: str, weights: str, instructions: str) -> None:
    model, tokens = translator(KINDS[kind]), torch.randint(4, 80, (len(SOURCES), 40))
    packed = NativeTranslator(model, weights)
    own: Any = unpacked(model, packed)
    with torch.inference_mode():
        state = model.start(*pad(SOURCES, SHAPE.pad_id))  # the encoder's weights are not packed
        expected = own.logits(own.hidden(torch.cat([torch.full((len(SOURCES), 1), 1), tokens], 1), state))
    error = (written(begun(packed, SOURCES, len(SOURCES)), tokens) - expected).norm(dim=-1) / expected.norm(dim=-1)
    exact = weights == "f32"
    assert error.max() < (1e-5 if exact else 0.05) and error.median() < (1e-6 if exact else 0.02)


@pytest.mark.parametrize(
    ("instructions", "weights"), quick(product(OF_THIS_MACHINE, ["f32", "bf16", "int8"])), indirect=["instructions"]
)
def test_a_target_has_the_same_bits_whatever_beams_it_was_in(weights: str, instructions: str) -> None:
    model, chance = translator(), torch.Generator().manual_seed(5)
    packed = NativeTranslator(model, weights)
    packed.library.call("use_threads", 2)
    targets, texts, owners = begun(packed, SOURCES, 12), [[] for _ in SOURCES], [0, 1, 2, 3]
    targets.first()
    for step in range(50):
        if step % 3 == 0:  # three targets of each source, whichever they continue; the first source leaves
            rows = [
                chosen for source in sorted({*owners} - ({0} if step > 40 else set()))
                for chosen in _picked([row for row, owner in enumerate(owners) if owner == source], 3, chance)
            ]  # fmt: skip
            targets.select(torch.tensor(rows))
            texts, owners = [[*texts[row]] for row in rows], [owners[row] for row in rows]
        tokens = torch.randint(4, 101, (len(texts),), generator=chance)
        logits = targets.next(tokens)
        texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
    packed.library.call("use_threads", 1)
    for text, owner, row in zip(texts, owners, logits, strict=True):
        alone = written(begun(packed, [SOURCES[owner]], 1), torch.tensor([text]))
        # float32 keeps what differs where PyTorch reads sources together; bfloat16 rounds it away
        torch.testing.assert_close(alone[0, -1], row, rtol=0, atol=1e-5 if weights == "f32" else 0)


def _picked(rows: list[int], count: int, chance: torch.Generator) -> list[int]:
    return [rows[place] for place in torch.randint(len(rows), (count,), generator=chance).tolist()]


def test_bfloat16_translators_search_natively_and_find_in_a_batch_what_they_find_alone(monkeypatch) -> None:
    model, settings = translator().to(torch.bfloat16), TranslationParams(3, max_tokens=60)
    together = search(model, SOURCES, settings)
    alone = [search(model, [each], settings)[0] for each in SOURCES]
    assert [each.tokens for each in alone] == [each.tokens for each in together]
    torch.testing.assert_close(
        *(torch.tensor([each.score for each in found]) for found in (alone, together)), rtol=2e-3, atol=0
    )
    monkeypatch.setattr(translation, "Targets", None)
    with pytest.raises(TypeError):
        search(model, SOURCES, settings)
    monkeypatch.setenv("KEIFU_NATIVE", "off")
    assert [each.tokens[:5] for each in search(model, SOURCES, settings)] == [each.tokens[:5] for each in together]


def test_more_targets_than_fit_one_pass() -> None:
    model, settings = translator().to(torch.bfloat16), TranslationParams(9, max_tokens=4)
    found, once = search(model, 16 * SOURCES, settings), search(model, SOURCES, settings)
    assert [each.tokens for each in found] == 16 * [each.tokens for each in once]


def test_a_translator_is_loaded_with_its_decoder_packed(tmp_path: Path) -> None:
    checkpoints.save(translator(), None, tmp_path)
    model: Any = checkpoints.load_model(tmp_path, weights="int8")
    first = native_form(model, NativeTranslator)
    assert first is not None and first.weights == "int8" and isinstance(model, EncoderDecoder)
    assert native_form(model, NativeTranslator) is first
    assert native_form(checkpoints.load_model(tmp_path), NativeTranslator) is None
    with torch.no_grad():
        model.get_parameter("decoder.0.attention_norm.weight").mul_(2)
    again = native_form(model, NativeTranslator)
    assert again is not None and again is not first and again.weights == "int8"


def test_what_cannot_be_is_refused() -> None:
    packed = NativeTranslator(translator(), "int8")
    targets = begun(packed, SOURCES, 4)
    with pytest.raises(UserError, match="This model looks at a source, and the batch has none"):
        packed(torch.tensor([[1, 2]]))
    targets.lengths[1] = 71
    with pytest.raises(UserError, match="A source of 71 positions is beyond the 70"):
        targets.first()
    targets.lengths[1], targets.sources[0] = 41, 4
    with pytest.raises(UserError, match="Source 4 is not one of the batch's 4"):
        targets.first()
    targets.sources[0], targets.source_tables[0, 0] = 0, targets.n_blocks
    with pytest.raises(UserError, match=f"Block {targets.n_blocks} is not one of the cache's"):
        targets.first()
