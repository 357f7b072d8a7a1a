"""Marian's checkpoints give transformers' logits and texts from transformers' files, and back."""

import io
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.checkpoints.registry import read_config
from keifu.data.tokenizers.tokenizer import Tokenizer, put_around_text
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import transformer

SIZES = {
    "vocab_size": 97, "max_position_embeddings": 64, "d_model": 24, "encoder_layers": 3, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 3, "encoder_ffn_dim": 42, "decoder_ffn_dim": 35,
    "pad_token_id": 70, "eos_token_id": 0, "decoder_start_token_id": 70, "activation_function": "swish",
}  # fmt: skip
CASES = {
    "swish-scaled": {"scale_embedding": True},
    "gelu-deeper-decoder": {"activation_function": "gelu", "encoder_layers": 1, "decoder_layers": 4},
    "relu-odd-width": {"activation_function": "relu", "d_model": 21, "encoder_attention_heads": 3,
                       "decoder_attention_heads": 7, "scale_embedding": True},
    "two-vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 71},
    "two-matrices": {"share_encoder_decoder_embeddings": False, "scale_embedding": True},
    "untied": {"tie_word_embeddings": False},
    "two-vocabularies-untied": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 71,
                                "tie_word_embeddings": False},
}  # fmt: skip
SOURCE, TARGET = torch.randint(1, 70, (3, 19), generator=torch.Generator().manual_seed(1)), torch.arange(60).view(3, 20)
MASK = torch.arange(19) < torch.tensor([[19], [4], [11]])


def published(**changes) -> transformers.MarianMTModel:
    torch.manual_seed(1)
    model = transformers.MarianMTModel(transformers.MarianConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
        model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    return model


def logits(model, source=SOURCE, target=TARGET, mask=MASK) -> torch.Tensor:
    return model(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_both_ways(case, weights, tmp_path) -> None:
    reference = published(**CASES[case])
    reference.save_pretrained(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    expected = logits(reference)
    assert expected.std() > 0.1
    assert close(model(SOURCE, TARGET, MASK), expected)
    assert close(model(SOURCE, TARGET), logits(reference, mask=torch.ones_like(MASK)))

    state = model.start(SOURCE, MASK, capacity=20)
    first = model.hidden(TARGET[:, :7], state)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    state.select(rows)
    rest = [model.hidden(TARGET[rows, i : i + 1], state) for i in range(7, 20)]
    assert close(model.logits(torch.cat([first[rows], *rest], 1)), expected[rows])

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    left_out = {"model.shared.weight"} if case == "untied" else set()  # transformers writes it and never uses it
    assert saved.keys() == original.keys() - left_out
    assert all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in saved)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again), expected)


@torch.no_grad()
def test_long_texts_have_exact_positions(tmp_path) -> None:
    reference = published(max_position_embeddings=600)
    reference.save_pretrained(tmp_path)
    long, mask = torch.randint(1, 70, (1, 600)), torch.ones(1, 600, dtype=torch.bool)
    assert close(checkpoints.load_model(tmp_path)(long, long), logits(reference, long, long, mask))


NAMES = ["model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]


@pytest.mark.parametrize("kept", [[*NAMES, "lm_head.weight"], NAMES[2:], ["lm_head.weight"]], ids=len)
@torch.no_grad()
def test_one_matrix_under_any_of_its_names(kept, tmp_path) -> None:
    """Older files hold it four times, converted ones under whichever name was kept, and the sinusoids too."""
    reference = published()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    shared = tensors.pop("model.shared.weight")
    tensors |= {name: shared.clone() for name in kept}
    tensors |= {f"model.{side}.embed_positions.weight": torch.zeros(64, 24) for side in ("encoder", "decoder")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = checkpoints.load_model(tmp_path)
    assert model.head is None and close(model(SOURCE, TARGET, MASK), logits(reference))
    skipped = checkpoints.inspect(tmp_path).skipped
    assert len(skipped) == len(kept) + 1 and any("embed_positions" in name for name in skipped)


@torch.no_grad()
def test_a_head_that_differs_is_kept_apart(tmp_path) -> None:
    reference = published()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.shared.weight"] + 0.25
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = checkpoints.load_model(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert model.head is not None and close(model(SOURCE, TARGET, MASK), logits(again))
    assert any("they are kept apart" in note for note in checkpoints.inspect(tmp_path).notes)
    checkpoints.save(model, None, tmp_path / "own")
    assert torch.equal(checkpoints.load_model(tmp_path / "own")(SOURCE, TARGET), model(SOURCE, TARGET))
    assert not any("kept apart" in note for note in checkpoints.inspect(tmp_path / "own").notes)


def test_pickled_weights_name_what_converts_them(tmp_path) -> None:
    """Most of opus-mt is published so."""
    published().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"never unpickles.*MarianMTModel\.from_pretrained\(DIRECTORY\)"):
        checkpoints.load(tmp_path)


OPUS = {  # the config.json of Helsinki-NLP/opus-mt-en-de, as transformers 4 wrote it
    "_name_or_path": "", "_num_labels": 3, "activation_dropout": 0.0, "activation_function": "swish",
    "add_bias_logits": False, "add_final_layer_norm": False, "architectures": ["MarianMTModel"],
    "attention_dropout": 0.0, "bad_words_ids": [[58100]], "bos_token_id": 0, "classif_dropout": 0.0, "d_model": 512,
    "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layerdrop": 0.0, "decoder_layers": 6,
    "decoder_start_token_id": 58100, "dropout": 0.1, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
    "encoder_layerdrop": 0.0, "encoder_layers": 6, "eos_token_id": 0, "extra_pos_embeddings": 58101,
    "id2label": {"0": "LABEL_0"}, "init_std": 0.02, "is_encoder_decoder": True, "max_length": 512,
    "max_position_embeddings": 512, "model_type": "marian", "normalize_before": False, "normalize_embedding": False,
    "num_beams": 6, "num_hidden_layers": 6, "pad_token_id": 58100, "scale_embedding": True,
    "static_position_embeddings": True, "vocab_size": 58101,
}  # fmt: skip


def test_the_published_config_is_read() -> None:
    family, config = read_config(OPUS, "config.json")
    assert family.model_type == "marian"
    assert config == transformer.Config(
        vocab_size=58_101, decoder_hidden_dim=2048, n_decoder_layers=6, n_decoder_heads=8, activation="silu",
        start_id=58_100, end_id=0, pad_id=58_100,
    )  # fmt: skip
    with pytest.raises(ValueError, match="normalize_before to True"):
        read_config(OPUS | {"normalize_before": True}, "config.json")
    with pytest.raises(ValueError, match="no field 'pad_token_id'"):
        read_config({k: v for k, v in OPUS.items() if k != "pad_token_id"}, "config.json")


@pytest.fixture(scope="module")
def joint() -> Tokenizer:
    """Return one tokenizer for both languages, which ends a text with </s>."""
    texts = ["The cat sat on the mat and the dog sat on the cat.", "猫はマットの上に座った。犬は猫の上に座った。"] * 4
    made = train_tokenizer("unigram", texts, 340, special_tokens=["<pad>"])
    put_around_text(made.backend, made.special, bos=False, eos=True)
    return Tokenizer(made.backend, made.special | {"pad_token": "<pad>"})


@torch.no_grad()
def test_what_keifu_trains_translates_in_transformers(joint, tmp_path) -> None:
    ids = {"start_id": joint.bos_id, "end_id": joint.eos_id, "pad_id": joint.pad_id}
    sizes = {"dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "context_length": 64}
    config = transformer.Config(joint.vocab_size, **sizes, **ids)
    model = transformer.build(config).eval()
    checkpoints.save(model, joint, tmp_path)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = their_tokenizer(["The cat sat.", "猫は座った。犬も"], padding=True, return_tensors="pt")
    found = [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)]
    assert found == joint.encode_batch(["The cat sat.", "猫は座った。犬も"], special=True)
    assert found[0][-1] == joint.eos_id
    assert their_tokenizer.decode(found[1], skip_special_tokens=True) == "猫は座った。犬も"
    mask = batch.attention_mask.bool()
    expected = logits(theirs, batch.input_ids, TARGET[:2], mask)
    assert close(model(batch.input_ids, TARGET[:2], mask), expected)

    written = theirs.generate(**batch, num_beams=1, do_sample=False, max_new_tokens=8)
    assert (written[:, 0] == config.start_id).all() and not (written[:, 1:] == config.start_id).any()
    whole = model(batch.input_ids, written[:, :-1], mask)
    whole[..., [config.start_id, config.pad_id]] = -torch.inf  # never written
    going = (written[:, :-1] != config.end_id) & (torch.arange(written.shape[1] - 1) < 7)  # the last token is forced
    assert torch.equal(whole.argmax(-1)[going], written[:, 1:][going])

    again, same = checkpoints.load(tmp_path)
    assert same.fingerprint == joint.fingerprint and same.pad_id == joint.pad_id
    assert torch.equal(again(SOURCE, TARGET), model(SOURCE, TARGET))


def test_a_marian_directory_whole(tmp_path) -> None:
    """Its two SentencePiece models and vocabulary go with the model, and take the place of another tokenizer."""
    sentencepiece = pytest.importorskip("sentencepiece")

    def pieces(texts: list[str]) -> bytes:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
        return out.getvalue()

    directory = tmp_path / "theirs"
    published().save_pretrained(directory)
    english, japanese = ["The cat sat on the mat.", "A dog sat there."] * 9, ["猫が座った。", "犬も猫も座った。"] * 9
    (directory / "source.spm").write_bytes(pieces(english))
    (directory / "target.spm").write_bytes(pieces(japanese))
    words = dict.fromkeys(["</s>", "<unk>", *(f"▁{c}" for c in "Theat"), *"Thecatsonm.", *"猫が座った。犬も", "▁"])
    vocabulary = {word: number for number, word in enumerate(words)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary | {"<pad>": len(vocabulary)}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    model, tokenizer = checkpoints.load(directory)

    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "tokenizer.json").write_text("{}")  # of an earlier save
    checkpoints.save(model, tokenizer, tmp_path / "ours")
    assert not (tmp_path / "ours" / "tokenizer.json").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = ["The cat sat on the mat.", "猫 at the zoo", ""]
    assert theirs(texts).input_ids == tokenizer.encode_batch(texts, special=True)
    assert checkpoints.load(tmp_path / "ours")[1].fingerprint == tokenizer.fingerprint
