"""T5's checkpoints give transformers' logits, beams and tokens from transformers' files, and back."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from keifu import checkpoints
from keifu.checkpoints.registry import read_config
from keifu.data.tokenizers.load import load_tokenizer
from keifu.inference.text.beam_search import Search, beam_search
from keifu.inference.text.translation import EncoderDecoderBeamModel
from keifu.models.variants import t5

SIZES: dict[str, Any] = {
    "vocab_size": 61, "d_model": 20, "d_kv": 6, "d_ff": 28, "num_layers": 2, "num_heads": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "relu": {},
    "gated-deeper-decoder": {"feed_forward_proj": "gated-gelu", "num_layers": 1, "num_decoder_layers": 3},
    "few-buckets": {"relative_attention_num_buckets": 9, "relative_attention_max_distance": 13},
    "near": {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 7},
    "unscaled": {"scale_decoder_outputs": False, "layer_norm_epsilon": 1e-3, "feed_forward_proj": "gelu"},
    "flan": {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu", "untied": True},
    "untied-and-scaled": {"feed_forward_proj": "gated-silu", "untied": True, "decoder_start_token_id": 5},
    "fields-overrule": {"is_gated_act": True, "dense_act_fn": "silu", "d_kv": 9},
}
RELEASED = {  # fields of the config.json of the released checkpoints
    "t5-small": {
        "model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
        "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
        "n_positions": 512, "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0,
        "relative_attention_num_buckets": 32, "vocab_size": 32128,
    },
    "flan-t5-small": {
        "model_type": "t5", "d_ff": 1024, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
        "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
        "n_positions": 512, "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "pad_token_id": 0,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
        "vocab_size": 32128,
    },
}  # fmt: skip
SOURCE = torch.randint(2, 61, (3, 23), generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(2, 61, (3, 17), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(23) < torch.tensor([[23], [4], [11]])


def published(untied: bool = False, mt5: bool = False, **changes: Any) -> Any:
    torch.manual_seed(1)
    made: Any = transformers.MT5ForConditionalGeneration if mt5 else transformers.T5ForConditionalGeneration
    model: Any = made(made.config_class(**SIZES | changes)).eval()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.1
            elif "relative" in name:
                parameter += torch.randn_like(parameter)
    return model


def logits(model: Any, mask: torch.Tensor = MASK) -> torch.Tensor:
    return model(input_ids=SOURCE, attention_mask=mask.long(), decoder_input_ids=TARGET).logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("case", [*CASES, "mt5"])
@torch.no_grad()
def test_logits_both_ways(case, weights, tmp_path) -> None:
    reference = published(mt5=True, untied=True) if case == "mt5" else published(**CASES[case])
    reference.save_pretrained(tmp_path / "theirs")
    model: Any = checkpoints.load_model(tmp_path / "theirs")
    expected = logits(reference)
    assert expected.std() > 0.1
    for mask in (MASK, MASK.flip(1), torch.ones_like(MASK)):
        assert close(model(SOURCE, TARGET, mask), logits(reference, mask))

    state = model.start(SOURCE, MASK, capacity=17)
    first, rows = model.hidden(TARGET[:, :7], state), torch.tensor([0, 0, 1, 1, 2, 2])
    state.select(rows)
    rest = [model.hidden(TARGET[rows, i : i + 1], state) for i in range(7, 17)]
    assert close(model.logits(torch.cat([first[rows], *rest], 1)), expected[rows])

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert saved.keys() == original.keys()
    assert all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in saved)
    again: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert close(logits(again), expected)
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


@pytest.mark.parametrize("beams", [1, 4])
@torch.no_grad()
def test_beams_are_those_of_transformers(beams, tmp_path) -> None:
    reference = published(untied=True, feed_forward_proj="gated-gelu")
    reference.save_pretrained(tmp_path)
    ours: Any = checkpoints.load_model(tmp_path)
    sources = [SOURCE[0, :9].tolist(), SOURCE[1].tolist(), SOURCE[2, :2].tolist()]
    ids = torch.tensor([source + [0] * (23 - len(source)) for source in sources])
    more: dict[str, Any] = {"num_beams": beams, "early_stopping": "never", "length_penalty": 0.0} if beams > 1 else {}
    written = reference.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=12, do_sample=False, **more)
    search = Search((1,), beams, lambda lengths: torch.ones_like(lengths))
    best = beam_search(EncoderDecoderBeamModel(ours, sources, 12, torch.device("cpu")), search, [12] * 3)
    for row, found in zip(written[:, 1:].tolist(), best, strict=True):
        assert found.tokens == row[: row.index(1) if 1 in row else 12]


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_the_size_of_that_name(name) -> None:
    depth = RELEASED[name].get("num_decoder_layers")
    assert read_config(RELEASED[name], "config.json")[1] == replace(t5.SIZES[name], n_decoder_layers=depth)


def test_a_config_that_is_not_covered_is_refused() -> None:
    json = {"model_type": "t5", **SIZES, "eos_token_id": 1}
    for change, words in (
        ({"feed_forward_proj": "glu-gelu"}, "feed_forward_proj is 'glu-gelu'"),
        ({"feed_forward_proj": "gated-what"}, "activation 'what' is not supported"),
        ({"eos_token_id": [1, 2]}, "eos_token_id has 2 tokens"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder to False"),
        ({"relative_attention_num_buckets": 3}, "n_buckets is 3"),
        ({"relative_attention_max_distance": 16}, "max_distance 16 leaves no distances"),
    ):
        with pytest.raises(ValueError, match=words):
            read_config(json | change, "config.json")


def test_its_sentencepiece_model_has_sentinels_and_an_end(tmp_path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The cat sat on the mat.", "A dog sat there."] * 9), model_writer=out, vocab_size=40,
        hard_vocab_limit=False, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(out.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 7}')
    tokenizer, count = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    assert tokenizer.vocab_size == len(count) + 7 and tokenizer.token_id("<extra_id_0>") == tokenizer.vocab_size - 1
    ids = tokenizer.encode("The cat <extra_id_0> there", special=True, allow_special=True)
    assert ids[-1] == 1 and tokenizer.vocab_size - 1 in ids
    assert tokenizer.encode("The cat sat.") == count.encode("The cat sat.")
