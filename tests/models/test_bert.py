"""BERT: its sizes, what padding and segments do to it, how it begins, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from keifu.models import bert

SMALL = bert.Config(vocab_size=31, context_length=12, dim=16, hidden_dim=24, n_layers=2, n_heads=4)


def test_sizes_have_the_parameters_of_the_released_files() -> None:
    counted = {}
    with torch.device("meta"):
        for name, config in bert.SIZES.items():
            model = bert.build(replace(config, words=False, next_sentence=False))
            counted[name] = sum(parameter.numel() for parameter in model.parameters())
    assert counted == {"bert-base": 109_482_240, "bert-large": 335_141_888, "all-minilm-l6-v2": 22_713_216}


@torch.no_grad()
def test_padding_changes_nothing_and_segments_do() -> None:
    model = bert.build(SMALL).eval()
    tokens = torch.randint(0, 31, (2, 12))
    mask = torch.arange(12) < torch.tensor([12, 7])[:, None]
    padded, alone = model.encode(tokens, mask=mask), model.encode(tokens[1:, :7])
    assert torch.allclose(padded[1, :7], alone[0], atol=1e-5)
    assert torch.allclose(padded[0], model.encode(tokens)[0], atol=1e-5)
    zeros = torch.zeros_like(tokens)
    assert torch.allclose(model.encode(tokens, zeros, mask), padded, atol=1e-6)
    assert not torch.allclose(model.encode(tokens, zeros + 1, mask), padded, atol=1e-2)


@torch.no_grad()
def test_every_token_sees_both_sides() -> None:
    model, tokens = bert.build(SMALL).eval(), torch.randint(0, 30, (1, 9))
    changed = tokens.clone()
    changed[0, 4] += 1
    moved = (model.encode(changed) - model.encode(tokens)).abs().amax((0, 2))
    assert bool((moved > 1e-6).all())


def test_weights_begin_within_two_deviations() -> None:
    model = bert.build(SMALL)
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    assert weights.abs().max() <= 0.04 and 0.016 < weights.std() < 0.019  # 0.88 of the untruncated 0.02
    assert model.head_bias.abs().max() == 0


def test_only_masked_places_need_logits() -> None:
    model = bert.build(SMALL).eval()
    hidden = model.encode(torch.randint(0, 31, (2, 12)))
    rows, places = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 11])
    assert torch.allclose(model.words(hidden[rows, places]), model.words(hidden)[rows, places], atol=1e-5)


def test_what_it_cannot_do_is_said() -> None:
    model = bert.build(replace(SMALL, pooled=False, words=False, next_sentence=False))
    hidden = model.encode(torch.randint(0, 31, (1, 12)))
    with pytest.raises(ValueError, match="13 tokens do not fit the 12 positions"):
        model.encode(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="no head for masked words"):
        model.words(hidden)
    with pytest.raises(ValueError, match="no pooled state"):
        model.pool(hidden)
    with pytest.raises(ValueError, match="no labels to choose from"):
        model.classify(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="set pooled to True"):
        bert.build(replace(SMALL, pooled=False))
