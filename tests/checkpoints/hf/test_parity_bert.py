"""BERT with every head: transformers' outputs from transformers' files, and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.checkpoints.registry import describe, read_config
from keifu.errors import UserError
from keifu.models import bert

SIZES = {
    "vocab_size": 97, "hidden_size": 30, "intermediate_size": 42, "num_hidden_layers": 3, "num_attention_heads": 5,
    "max_position_embeddings": 33, "type_vocab_size": 3,
}  # fmt: skip
LABELS = {0: "art", 1: "food", 2: "war"}
CASES = {
    "pretraining": ("BertForPreTraining", {}),
    "words": ("BertForMaskedLM", {"hidden_act": "relu"}),
    "next": ("BertForNextSentencePrediction", {"layer_norm_eps": 0.1}),
    "classification": ("BertForSequenceClassification", {"id2label": LABELS, "hidden_act": "gelu_new"}),
    "score": ("BertForSequenceClassification", {"id2label": {0: "LABEL_0"}, "problem_type": "regression"}),
    "plain": ("BertModel", {"hidden_act": "silu"}),
    "unpooled": ("BertModel", {}),
}


def made(case: str) -> Any:
    """Return transformers' model of a case, every weight random, biases and norms too."""
    torch.manual_seed(1)
    name, changes = CASES[case]
    config = transformers.BertConfig(**SIZES | changes, attn_implementation="eager")
    options = {"add_pooling_layer": False} if case == "unpooled" else {}
    model = getattr(transformers, name)(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Return rows of unequal length with three kinds of segments."""
    real = torch.arange(31) < torch.tensor([31, 17, 1])[:, None]
    return {
        "input_ids": torch.randint(0, 97, (3, 31)),
        "token_type_ids": torch.randint(0, 3, (3, 31)),
        "attention_mask": real.long(),
    }


def outputs(model: bert.Bert, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return everything that a model of ours gives, under transformers' names."""
    row = given["input_ids"], given["token_type_ids"], given["attention_mask"].bool()
    found = {"last_hidden_state": model.encode(*row)}
    hidden, config = found["last_hidden_state"], model.config
    if config.pooled:
        found["pooler_output"] = model.pool(hidden)
    if config.words:
        found |= {"prediction_logits": model.words(hidden), "logits": model.words(hidden)}
    if config.next_sentence:
        found["seq_relationship_logits"] = found["next_logits"] = model.next_sentence(found["pooler_output"])
    if config.labels:
        found["logits"] = model.classify(*row)
    return found


def close(ours: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor) -> bool:
    if ours.ndim == 3:  # what stands at padding means nothing
        ours, theirs = ours[real], theirs[real]
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def compared(model: bert.Bert, reference: Any, given: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of the outputs that both models have, after checking that they are equal."""
    ours, expected = outputs(model, given), reference(**given)
    if model.config.next_sentence and not model.config.words:
        ours["logits"] = ours["next_logits"]
    names = set(expected.keys()) & set(ours)
    assert all(close(ours[name], expected[name], given["attention_mask"].bool()) for name in names)
    return names


EXPECTED = {
    "pretraining": {"prediction_logits", "seq_relationship_logits"},
    "words": {"logits"},
    "next": {"logits"},
    "classification": {"logits"},
    "score": {"logits"},
    "plain": {"last_hidden_state", "pooler_output"},
    "unpooled": {"last_hidden_state"},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_each_head_both_ways(case, weights, tmp_path) -> None:
    reference, given = made(case), batch()
    reference.save_pretrained(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    assert isinstance(model, bert.Bert)
    assert compared(model, reference, given) == EXPECTED[case]

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    kind = CASES[case][0].removeprefix("BertFor").replace("BertModel", "")
    auto = getattr(transformers, f"AutoModel{'For' if kind else ''}{kind}")
    again = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for parameter in again.parameters():  # aligned, because the rounding of a head of one label depends on it
        parameter.data = parameter.data.clone()
    first = next(iter(EXPECTED[case]))
    assert torch.equal(again(**given)[first], reference(**given)[first])
    assert model.config == checkpoints.load_model(tmp_path / "ours").config
    if model.config.labels:
        names = CASES[case][1]["id2label"]
        assert again.config.id2label == names and model.config.labels == tuple(names.values())


def rewritten(directory: Path, change: Any) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configured(directory: Path, **changes: Any) -> None:
    """Change fields of a config.json. None removes a field."""
    path = directory / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@torch.no_grad()
def test_a_file_as_google_released_it(tmp_path) -> None:
    """As bert-base-uncased: TensorFlow's names of norms, copies of tensors, all heads though its config names one."""
    reference = made("pretraining")
    reference.save_pretrained(tmp_path)

    def old(tensors):
        named = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in tensors.items()
        }
        copies = {
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
            "bert.embeddings.position_ids": torch.arange(33)[None],
        }
        return named | copies

    rewritten(tmp_path, old)
    configured(tmp_path, architectures=["BertForMaskedLM"])
    model = checkpoints.load_model(tmp_path)
    assert isinstance(model, bert.Bert) and model.config.next_sentence and model.config.pooled
    assert compared(model, reference, batch()) == EXPECTED["pretraining"]
    assert len(checkpoints.inspect(tmp_path).skipped) == 3

    rewritten(tmp_path, lambda t: t | {"cls.predictions.decoder.bias": t["cls.predictions.bias"] + 1})
    with pytest.raises(UserError, match=r"not part of the model \(cls.predictions.decoder.bias\)"):
        checkpoints.load_model(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "unpooled"])
def test_a_plain_model_with_its_prefix_and_without_an_architecture(case, tmp_path) -> None:
    reference = made(case)
    reference.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: {f"bert.{name}": tensor for name, tensor in tensors.items()})
    configured(tmp_path, architectures=None)
    assert compared(checkpoints.load_model(tmp_path), reference, batch()) == EXPECTED[case]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["BertForQuestionAnswering"]}, "architecture 'BertForQuestionAnswering' is not among"),
        ({"problem_type": "regression"}, "problem_type to 'regression'"),
        ({"problem_type": "multi_label_classification"}, "problem_type to 'multi_label_classification'"),
        (
            {"id2label": {"0": "LABEL_0"}, "problem_type": "single_label_classification"},
            "with 1 labels keifu",
        ),
        (
            {"id2label": {"0": "a"}, "sentence_transformers": {"activation_fn": "torch.nn.GELU"}},
            "torch.nn.GELU",
        ),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type to 'relative_key'"),
        ({"is_decoder": True}, "is_decoder to True"),
        ({"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}, "classifier.weight is \\[3, 30\\]"),
        ({"hidden_size": None}, "no field 'hidden_size'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, sentence, tmp_path) -> None:
    made("classification").save_pretrained(tmp_path)
    configured(tmp_path, **changes)
    with pytest.raises(UserError, match=sentence):
        checkpoints.load_model(tmp_path)


def test_a_head_that_the_architecture_has_and_the_file_lacks_is_missing(tmp_path) -> None:
    made("unpooled").save_pretrained(tmp_path)
    configured(tmp_path, architectures=["BertForSequenceClassification"])
    with pytest.raises(UserError, match="missing .*pooler.dense.weight"):
        checkpoints.load_model(tmp_path)


def test_a_head_for_words_of_its_own_is_refused(tmp_path) -> None:
    made("words").save_pretrained(tmp_path)
    configured(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match="not tied to the embedding"):
        checkpoints.load_model(tmp_path)


def test_what_no_architecture_has_is_saved_as_keifu_s_own(tmp_path) -> None:
    config = bert.Config(11, 8, 12, 24, 1, 3, words=True, next_sentence=True, labels=("a", "b"))
    model = bert.build(config)
    checkpoints.save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "keifu_bert"
    again = checkpoints.load_model(tmp_path)
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_released_config_is_the_size_of_that_name() -> None:
    released = {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 4096, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 16, "num_hidden_layers": 24, "pad_token_id": 0, "position_embedding_type": "absolute",
        "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
    }  # fmt: skip
    family, config = read_config(released, "config.json")
    assert family.model_type == "bert" and config == replace(
        bert.SIZES["bert-large"], pooled=False, next_sentence=False
    )
    for size in bert.SIZES.values():
        assert describe(size)[0].model_type == "bert"


@torch.no_grad()
def test_minilm_is_what_transformers_makes_of_it() -> None:
    """The real weights; left out where the archive cannot be had."""
    from keifu.data.catalogue.catalogue import fetch

    try:
        path = fetch("minilm")
    except (UserError, OSError) as error:
        pytest.skip(f"MiniLM cannot be had here: {error}")
    model, tokenizer = checkpoints.load("minilm")
    reference = transformers.AutoModel.from_pretrained(path).eval()
    texts = ["The capital of France is Paris.", "Encoders read both ways; decoders cannot see what comes.", "Hi"]
    theirs = transformers.AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    rows = [row[mask.bool()].tolist() for row, mask in zip(theirs.input_ids, theirs.attention_mask, strict=True)]
    assert tokenizer.encode_batch(texts, special=True) == rows
    mask = theirs.attention_mask.bool()
    hidden = model.encode(theirs.input_ids, theirs.token_type_ids, mask)
    expected = reference(**theirs)
    assert close(hidden, expected.last_hidden_state, mask) and close(model.pool(hidden), expected.pooler_output, mask)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
