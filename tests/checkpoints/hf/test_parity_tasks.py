"""Decoders with a task's head: transformers' logits from transformers' files, back again, and keifu's own form."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.errors import UserError
from keifu.models import gpt1, gpt2, gpt3, llama, palm, task_head
from keifu.models.task_head import Config

GPT = {"n_embd": 28, "n_layer": 2, "n_head": 4, "n_positions": 19, "vocab_size": 53}
LLAMA = {
    "hidden_size": 24, "intermediate_size": 34, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 53,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
NEO = {
    "hidden_size": 24, "num_layers": 2, "num_heads": 3, "attention_types": [[["global", "local"], 1]], "window_size": 5,
    "vocab_size": 53, "max_position_embeddings": 20,
}  # fmt: skip
KINDS = {
    "openai": ("OpenAIGPT", transformers.OpenAIGPTConfig(**GPT)),
    "gpt2": ("GPT2", transformers.GPT2Config(**GPT)),
    "gpt-neo": ("GPTNeo", transformers.GPTNeoConfig(**NEO)),
    "llama": ("Llama", transformers.LlamaConfig(**LLAMA)),
    "mistral": ("Mistral", transformers.MistralConfig(**LLAMA, sliding_window=4)),
    "qwen2": ("Qwen2", transformers.Qwen2Config(**LLAMA)),
}
LABELS = {0: "art", 1: "food", 2: "war"}


def random(architecture: str, config: Any) -> Any:
    """Return transformers' model, every weight random."""
    torch.manual_seed(1)
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
    return model


def rows(shape: tuple[int, ...], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random ids on whose right some are padding, and the mask."""
    mask = torch.arange(shape[-1]) < torch.randint(2, shape[-1] + 1, (*shape[:-1], 1))
    return torch.randint(1, 53, shape).masked_fill(~mask, pad), mask


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def same_tensors(first: Path, second: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    if "transformer.tokens_embed.weight" in ours.keys() - theirs.keys():  # the shared matrix has two names
        theirs["transformer.tokens_embed.weight"] = theirs.pop("lm_head.weight")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_gives_their_logits_and_goes_back_bit_by_bit(kind: str, tmp_path: Path) -> None:
    stem, config = KINDS[kind]
    config.id2label, config.pad_token_id, config.label2id = LABELS, 0, {v: k for k, v in LABELS.items()}
    theirs = random(f"{stem}ForSequenceClassification", config)
    theirs.save_pretrained(tmp_path / "theirs")
    model: Any = checkpoints.load_model(tmp_path / "theirs")
    assert model.config.labels == ("art", "food", "war") and model.config.form == "classification"
    tokens, mask = rows((5, 13))
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask.long()).logits
        close(model.classify(tokens[:, None], mask[:, None]), expected)
    checkpoints.save(model, None, tmp_path / "ours")
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", pad_token_id=0
    )
    with torch.no_grad():
        assert torch.equal(back.eval()(tokens, attention_mask=mask.long()).logits, expected)
    assert back.config.id2label == LABELS


@pytest.mark.parametrize("kind", ["openai", "gpt2"])
def test_two_heads_give_their_logits_and_go_back_bit_by_bit(kind: str, tmp_path: Path) -> None:
    stem, config = KINDS[kind]
    theirs = random(f"{stem}DoubleHeadsModel", config)
    theirs.save_pretrained(tmp_path / "theirs")
    model: Any = checkpoints.load_model(tmp_path / "theirs")
    assert model.config.form == "choice"
    tokens, mask = rows((3, 4, 13))
    with torch.no_grad():
        expected = theirs(tokens, mc_token_ids=mask.sum(-1) - 1)
        close(model.classify(tokens, mask), expected.mc_logits)
        close(model.decoder(tokens.flatten(0, 1)).unflatten(0, (3, 4))[mask], expected.logits[mask])
    checkpoints.save(model, None, tmp_path / "ours")
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    back = getattr(transformers, f"{stem}DoubleHeadsModel").from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(back.eval()(tokens, mc_token_ids=mask.sum(-1) - 1).mc_logits, expected.mc_logits)


SMALL = {"vocab_size": 53, "context_length": 16, "dim": 24, "hidden_dim": 48, "n_layers": 2, "n_heads": 3}
IDS = {"start_id": 50, "delimiter_id": 51, "extract_id": 52, "classifier_dropout": 0.25}
TWO = ("no", "yes")
SAVED = {
    "gpt1 entailment": (gpt1, gpt1.Config(**SMALL | {"hidden_dim": 96}), "entailment", "OpenAIGPTForSequence"),
    "gpt2 classification": (gpt2, gpt2.Config(**SMALL), "classification", "GPT2ForSequence"),
    "gpt2 choice": (gpt2, gpt2.Config(**SMALL), "choice", "GPT2DoubleHeads"),
    "gpt2 untied": (gpt2, gpt2.Config(**SMALL, tied=False), "classification", "GPT2ForSequence"),
    "gpt2 similarity": (gpt2, gpt2.Config(**SMALL), "similarity", "keifu"),
    "gpt1 odd": (gpt1, gpt1.Config(**SMALL), "classification", "keifu"),
    "llama untied": (llama, llama.Config(**SMALL), "entailment", "LlamaForSequence"),
    "llama choice": (llama, llama.Config(**SMALL), "choice", "keifu"),
    "gpt3": (gpt3, gpt3.Config(**SMALL, band=4), "classification", "keifu"),
    "palm": (palm, palm.Config(**SMALL, head_dim=8), "classification", "keifu"),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_is_loaded_again_with_every_bit(name: str, tmp_path: Path) -> None:
    module, config, form, architecture = SAVED[name]
    torch.manual_seed(2)
    config = Config(config, form, () if form == "choice" else TWO, **IDS)
    model = task_head.builder(module.build)(config).eval()
    checkpoints.save(model, None, tmp_path)
    again: Any = checkpoints.load_model(tmp_path)
    if config.decoder != again.config.decoder:  # a dense GPT-3 would be a GPT-2, and None a default
        assert replace(config, decoder=None) == replace(again.config, decoder=None)
    tokens, mask = rows((2, 1 if form != "similarity" else 2, 7), pad=50)
    with torch.no_grad():
        close(model.classify(tokens, mask), again.classify(tokens, mask))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0].startswith(architecture)
    told = str(checkpoints.inspect(tmp_path))
    assert "task_head.project.weight" in told and "form" in told and "n_layers" in told


def test_transformers_loads_an_untied_one_and_leaves_the_head_for_words_out(tmp_path: Path) -> None:
    module, config, form, _ = SAVED["llama untied"]
    model = task_head.builder(module.build)(Config(config, form, TWO, **IDS)).eval()
    checkpoints.save(model, None, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, pad_token_id=50).eval()
    tokens, mask = rows((4, 9), pad=50)
    with torch.no_grad():
        close(model.classify(tokens[:, None], mask[:, None]), theirs(tokens, attention_mask=mask.long()).logits)


def test_what_is_not_implemented_or_missing_is_one_sentence(tmp_path: Path) -> None:
    random("GPT2DoubleHeadsModel", transformers.GPT2Config(**GPT)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for changes, sentence in [
        ({"summary_type": "mean"}, "summary_type to 'mean', which keifu does not implement"),
        ({"architectures": ["GPT2ForSequenceClassification"], "num_labels": 1}, "not part of the model"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "not part of the model"),
        ({"keifu_task": 3}, "needs an object in its field 'keifu_task'"),
        ({"keifu_task": {"start_id": -2}}, "gives -2 for start_id, which must be at least 1"),
        ({"keifu_task": {"start_id": "x"}}, "start_id"),
        ({"model_type": "keifu_finetuned"}, "needs an object in its field 'decoder'"),
        ({"keifu_task": {"form": "poem"}}, "no form 'poem'"),
    ]:
        changed = {k: v for k, v in config.items() if k not in ("id2label", "label2id")} | changes
        file.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=sentence):
            checkpoints.load_model(tmp_path)
    file.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["multiple_choice_head.summary.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing .multiple_choice_head.summary.bias"):
        checkpoints.load_model(tmp_path)
