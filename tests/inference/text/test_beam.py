"""Beam search: transformers' beams on the same weights, the best text of all where all can be listed, the same alone as
among others."""

import random
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from beam_rules import continuations, power_penalty
from generation_toys import of_kinds_of_memory, of_two_models
from torch import Tensor, nn

from keifu import checkpoints
from keifu.errors import UserError
from keifu.inference.text.beam_search import (
    Hypothesis,
    Search,
    beam_search,
    paper_penalty,
    top_candidates,
)
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.likelihood import score
from keifu.inference.text.sampling_params import SamplingParams
from keifu.inference.text.translation import EncoderDecoderBeamModel

CPU = torch.device("cpu")

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]


def sharpened(model: nn.Module, factor: float) -> nn.Module:
    """Return larger weights, so that the next token depends on those before it; Marian's sinusoids stay as they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "positions" not in name:
                parameter.mul_(factor) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def marian(vocab: int, draw: random.Random) -> hf.PreTrainedModel:
    """Return a model of odd sizes that ends many sequences before their limit."""
    config = hf.MarianConfig(
        vocab_size=vocab,
        decoder_vocab_size=vocab,
        d_model=24,
        encoder_layers=2,
        decoder_layers=draw.choice([1, 3]),
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=40,
        decoder_ffn_dim=28,
        max_position_embeddings=48,
        scale_embedding=draw.random() < 0.5,
        pad_token_id=vocab - 1,
        decoder_start_token_id=vocab - 1,
        eos_token_id=0,
        forced_eos_token_id=None,
    )
    model = sharpened(hf.MarianMTModel(config), 3)
    model.final_logits_bias.normal_()
    model.final_logits_bias[0, 0] = 3
    return model


def lm(kind: str, vocab: int) -> hf.PreTrainedModel:
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        config = hf.GPT2Config(vocab_size=vocab, n_positions=64, n_embd=24, n_layer=2, n_head=4, **special)
    else:
        size = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = hf.LlamaConfig(vocab_size=vocab, num_key_value_heads=2, max_position_embeddings=64, **size, **special)
    return sharpened(hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 8)


def theirs(
    model: Any, ids: Tensor, mask: Tensor, beams: int, begin: int, ends: list[int], **wanted: Any
) -> list[tuple[list[int], float | None]]:
    """Return for each row transformers' best text with its score; greedy choice has no scores."""
    if beams > 1:
        wanted |= {"num_beams": beams, "early_stopping": "never", "output_scores": True}
    else:
        wanted.pop("length_penalty")
    config = hf.GenerationConfig(do_sample=False, eos_token_id=ends, return_dict_in_generate=True, **wanted)
    found = model.generate(ids, attention_mask=mask, generation_config=config)
    scores = found.sequences_scores.tolist() if beams > 1 else [None] * len(ids)
    texts = [_until(text[begin:], ends) for text in found.sequences.tolist()]
    return list(zip(texts, scores, strict=True))


def _until(text: list[int], ends: list[int]) -> list[int]:
    return text[: next((place for place, token in enumerate(text) if token in ends), len(text))]


def check_equal(ours: Sequence[Hypothesis], expected: list[tuple[list[int], float | None]]) -> None:
    assert [each.tokens for each in ours] == [text for text, _ in expected]
    for each, (_, found) in zip(ours, expected, strict=True):
        assert found is None or each.score == pytest.approx(found, rel=1e-4, abs=1e-4)


def setting(draw: random.Random) -> tuple[dict[str, Any], Any]:
    """Return one draw of length penalty and limit: for transformers, and the penalty for us."""
    exponent = draw.choice([-0.7, 0.0, 0.5, 1.0, 2.0])
    wanted = {"length_penalty": exponent, "max_new_tokens": draw.choice([1, 5, 20])}
    return wanted, partial(power_penalty, exponent=exponent)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_encoder_decoders_beams_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    draw, vocab = random.Random(seed), [37, 700, 131, 301][seed]
    torch.manual_seed(seed)
    model, pad = marian(vocab, draw), vocab - 1
    model.save_pretrained(tmp_path)
    ours: Any = checkpoints.load_model(tmp_path)
    sources = [torch.randint(1, pad, (draw.randint(1, 12),)).tolist() + [0] for _ in range([1, 5, 3, 4][seed])]
    longest = max(map(len, sources))
    ids = torch.tensor([source + [pad] * (longest - len(source)) for source in sources])
    for beams in range(1, 6):
        wanted, penalty = setting(draw)
        more = {"pad_token_id": pad, "decoder_start_token_id": pad, "bad_words_ids": [[pad]]}
        expected = theirs(model, ids, (ids != pad).long(), beams, 1, [0], **wanted, **more)
        limit = wanted["max_new_tokens"]
        search = Search((0,), beams, penalty, never=(pad,))
        check_equal(
            beam_search(EncoderDecoderBeamModel(ours, sources, limit, CPU), search, [limit] * len(sources)), expected
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_causal_models_beams_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    draw, vocab = random.Random(seed), [131, 37, 700, 261][seed]
    torch.manual_seed(seed)
    model = lm(["gpt2", "llama"][seed % 2], vocab)
    model.save_pretrained(tmp_path)
    ours = checkpoints.load_model(tmp_path)
    prompts = [torch.randint(5, vocab, (draw.randint(1, 9),)).tolist() for _ in range([3, 1, 5, 4][seed])]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    for beams in range(1, 6):
        wanted, penalty = setting(draw)
        ends = draw.choice([[7], [7, 9, 11]])
        expected = theirs(model, ids, (ids != 0).long(), beams, longest, ends, pad_token_id=0, **wanted)
        search = Search(tuple(ends), beams, penalty)
        check_equal(continuations(ours, prompts, search, wanted["max_new_tokens"]), expected)


class Table:
    """A decoder over `vocab` tokens whose logits are a fixed function of the last two; it counts its reorderings."""

    def __init__(self, sources: int, vocab: int, seed: int = 0, sharpness: float = 2.0):
        self.logits = torch.randn(sources, vocab + 1, vocab + 1, vocab, generator=torch.Generator().manual_seed(seed))
        self.logits *= sharpness
        self.last = torch.full((sources, 2), vocab)
        self.owner, self.selected = torch.arange(sources), 0

    def first(self) -> Tensor:
        return self.logits[self.owner, self.last[:, 0], self.last[:, 1]]

    def next(self, tokens: Tensor) -> Tensor:
        self.last = torch.stack([self.last[:, 1], tokens], 1)
        return self.first()

    def select(self, rows: Tensor) -> None:
        self.selected += 1
        self.last, self.owner = self.last[rows], self.owner[rows]


def listed(table: Table, source: int, limit: int, end: int, alpha: float) -> tuple[list[int], float]:
    """Return the best of all sequences, by scoring each."""
    log_p, vocab = table.logits[source].log_softmax(-1), table.logits.shape[-1]
    best: tuple[list[int], float] = [], -torch.inf
    for length in range(1, limit + 1):
        for text in product(range(vocab), repeat=length):
            if end in text[:-1] or (text[-1] != end and length < limit):
                continue
            places = [vocab, vocab, *text]
            total = sum(float(log_p[a, b, c]) for a, b, c in zip(places, places[1:], places[2:], strict=False))
            found = total / float(paper_penalty(torch.tensor([float(length)]), alpha))
            if found > best[1]:
                best = [token for token in text if token != end], found
    return best


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0, -1.0])
def test_with_beams_enough_the_best_text_of_all_is_found(alpha: float) -> None:
    sources, vocab, limit, end = 3, 4, 5, 2
    search = Search((end,), beams=vocab**4, penalty=partial(paper_penalty, alpha=alpha))
    found = beam_search(Table(sources, vocab), search, [limit] * sources)
    for source, best in enumerate(found):
        tokens, value = listed(Table(sources, vocab), source, limit, end, alpha)
        assert best.tokens == tokens and best.score == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_source_alone_and_among_others_with_limits_of_its_own(beams: int) -> None:
    limits = [9, 1, 30, 4, 17]
    search = Search(tuple(range(12)), beams)
    together = beam_search(Table(5, 80), search, limits)
    for source, limit in enumerate(limits):
        alone = Table(5, 80)
        alone.owner, alone.last = alone.owner[source : source + 1], alone.last[:1]
        [best] = beam_search(alone, search, [limit])
        assert best.tokens == together[source].tokens
        assert len(best.tokens) + best.ended <= limit
    assert {each.ended for each in together} == {True, False}


@of_kinds_of_memory
def test_prompts_alone_and_among_others(model: nn.Module) -> None:
    prompts = [torch.randint(0, 261, (n,)).tolist() for n in (3, 19, 1, 8)]
    search = Search((7, 250), beams=3)
    together = continuations(model, prompts, search, 12)
    for prompt, best in zip(prompts, together, strict=True):
        [alone] = continuations(model, [prompt], search, 12)
        assert alone.tokens == best.tokens and alone.score == pytest.approx(best.score, rel=1e-4)


@of_two_models
def test_one_beam_is_greedy_choice(model: nn.Module) -> None:
    prompts = torch.randint(0, 261, (1, 6)).tolist()
    greedy = generate_batch(model, None, prompts, SamplingParams(max_tokens=20, temperature=0))[0].tokens
    other = next(token for token in range(261) if token not in greedy)
    ends = (greedy[11], other)
    [found] = continuations(model, prompts, Search(ends, beams=1), 20)
    assert found.tokens == greedy[: greedy.index(ends[0])] and found.ended


@of_two_models
def test_a_texts_score_is_what_the_model_gives_it(model: nn.Module) -> None:
    prompt = torch.randint(0, 261, (6,)).tolist()
    [best] = continuations(model, [prompt], Search((3,), 4, partial(power_penalty, exponent=0.0)), 9)
    text = torch.tensor([prompt + best.tokens + [3] * best.ended])
    assert float(score(model, text)[0, 5:].sum()) == pytest.approx(best.score, abs=1e-3)


def test_the_order_of_rows_is_left_alone_where_it_did_not_change() -> None:
    table = Table(2, 30)
    beam_search(table, Search((29,), beams=1, never=(29,)), [15, 15])
    assert table.selected == 0
    table = Table(2, 30)
    beam_search(table, Search((29,), beams=3, never=(29,)), [15, 15])
    assert 1 <= table.selected <= 14


def test_what_is_never_written_keeps_its_probability() -> None:
    free, without = (beam_search(Table(1, 9), Search((8,), 2, never=never), [6])[0] for never in ((), (4, 2)))
    assert {4, 2} & set(free.tokens) and not {4, 2} & set(without.tokens)
    assert without.score <= free.score


def test_a_vocabulary_smaller_than_the_beams() -> None:
    for limit in (1, 4):
        [best] = beam_search(Table(1, 3), Search((2,), beams=81), [limit])
        tokens, value = listed(Table(1, 3), 0, limit, 2, 0.6)
        assert best.tokens == tokens and best.score == pytest.approx(value, abs=1e-5)


def test_top_is_topk() -> None:
    for vocab in (5, 64, 1000, 1027, 4096):
        logits = torch.randn(7, vocab)
        values, places = top_candidates(logits, 5)
        assert torch.equal(values, logits.topk(5).values) and torch.equal(logits.gather(1, places), values)


def test_penalties() -> None:
    lengths = torch.tensor([1.0, 7.0])
    assert paper_penalty(lengths, 0.6).tolist() == pytest.approx([1.0, 2.0**0.6])
    assert power_penalty(lengths, 2.0).tolist() == [1.0, 49.0]


def test_what_cannot_be_is_said() -> None:
    table = Table(1, 9)
    table.logits[0, 9, 9, 3] = torch.nan
    with pytest.raises(UserError, match="after 0 tokens are not finite"):
        beam_search(table, Search((8,)), [6])


@of_two_models
def test_a_prompt_that_does_not_fit_is_said(model: nn.Module) -> None:
    for prompt in ([], [1] * 67):
        with pytest.raises(UserError, match=f"has {len(prompt)} tokens, but it must have from 1 to 66"):
            continuations(model, [prompt], Search((1,)), 5)
