"""Bad input to `load`: one sentence each, with the name and the numbers that are needed to put it right."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.checkpoints.hf.native_config import check_types
from keifu.errors import UserError


@pytest.fixture(scope="module")
def sound(published, tmp_path_factory):
    """Return a directory that loads."""
    path = tmp_path_factory.mktemp("sound")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=42, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    published(config).save_pretrained(path)
    checkpoints.load_model(path)
    return path


@pytest.fixture
def folder(sound, tmp_path):
    """Return a copy of that directory, for the test to damage."""
    return shutil.copytree(sound, tmp_path / "model")


def refuses(path, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        checkpoints.load_model(path)
    text = str(caught.value)
    assert all(part in text for part in parts), text
    return text


def edit(folder, **changes) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def tensors(folder, change) -> None:
    path = folder / "model.safetensors"
    kept = change(load_file(path))
    path.unlink()  # the old one is still mapped
    save_file(kept, path)


def test_all_that_is_wrong_with_the_tensors_is_one_error(folder) -> None:
    def spoil(weights):
        kept = {name: tensor for name, tensor in weights.items() if "up_proj" not in name}
        kept["model.norm.weight"] = torch.zeros(23)
        return kept | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3), "stray.weight": torch.zeros(2)}

    tensors(folder, spoil)
    text = refuses(
        folder, "12 missing", "model.layers.9.mlp.up_proj.weight", "and 2 more",
        "1 not part of the model (stray.weight)",
        "1 of another shape (model.norm.weight is [23] where the config asks for [24])",
    )  # fmt: skip
    assert "inv_freq" not in text


@pytest.mark.parametrize("keep", [0, 5, 100, 5_000, -1])
def test_truncated_weights_are_named_with_both_sizes(folder, keep) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:keep])
    size = len(whole[:keep])
    text = refuses(folder, str(path), "truncated or corrupt", f"{size:,} bytes")
    assert size < 9 or f"{len(whole):,}" in text or "the header alone" in text


def test_weights_that_are_no_safetensors(folder) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(500))
    refuses(folder, "model.safetensors is truncated or corrupt")


def test_a_missing_shard_is_named(published, tmp_path) -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=20, n_layer=2, n_head=5)
    published(config).save_pretrained(tmp_path, max_shard_size=40_000)
    shard = sorted(tmp_path.glob("model-00002*"))[0]
    shard.unlink()
    refuses(tmp_path, "lacks 1 of its", shard.name)


def test_pickled_weights_are_never_opened(folder) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refuses(folder, "pytorch_model.bin", "never unpickles", "save_pretrained")
    refuses(folder / "pytorch_model.bin", "never unpickles")


def test_nothing_to_load(folder, tmp_path) -> None:
    (folder / "model.safetensors").rename(folder / "models.safetensors")
    refuses(folder, "holds no model.safetensors, but it does hold models.safetensors")
    (folder / "config.json").unlink()
    refuses(folder, "holds no config.json")
    (folder / "recipe.json").write_text("{}")
    refuses(folder, "holds no config.json, which a run writes when it ends or is stopped")
    (tmp_path / "notes.txt").write_text("hello")
    refuses(tmp_path / "notes.txt", "is no model")


def test_config_that_is_no_json(folder) -> None:
    (folder / "config.json").write_text('{\n "model_type": "llama",\n oops }')
    refuses(folder, "config.json is not JSON", "line 3")
    (folder / "config.json").write_text("[1]")
    refuses(folder, "holds a list")
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refuses(folder, "config.json is not UTF-8 text: byte 0 is 0xff")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "lama"}, ["the model_type 'lama', which keifu does not implement", "llama, llava, marian"]),
        ({"architectures": 0.5}, ["0.5 as architectures: it must be a list"]),
        ({"model_type": "absent"}, ["no model_type"]),
        ({"hidden_size": "absent"}, ["config.json", "no field 'hidden_size'", "'llama'"]),
        ({"num_hidden_layers": "absent"}, ["no field 'num_hidden_layers'"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": "absent"}, ["n_heads (5) must divide dim"]),
        ({"num_key_value_heads": 3}, ["n_kv_heads (3) must divide n_heads (4)"]),
        ({"hidden_size": "wide"}, ["config.json", "'wide'"]),
        ({"num_hidden_layers": 0}, ["0 for n_layers", "at least 1"]),
        ({"vocab_size": 97.5}, ["config.json", "97.5"]),
        ({"hidden_act": "cubic"}, ["activation 'cubic'"]),
        ({"rms_norm_eps": "small"}, ["config.json", "rms_norm_eps cannot be 'small'"]),
        ({"rms_norm_eps": None}, ["config.json", "rms_norm_eps cannot be None"]),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, ["longrope needs", "factors"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5"]),
        ({"rope_parameters": "linear"}, ["config.json cannot be read as a 'llama' model"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"num_hidden_layers": 10**9}, ["111 tensors, too few for its config's 1000000000 layers"]),
        ({"num_hidden_layers": 10**12}, ["gives 1000000000000 for n_layers", "at most 2,147,483,647"]),
        ({"hidden_size": 10**12, "head_dim": "absent"}, ["gives 1000000000000 for dim", "at most 2,147,483,647"]),
        ({"hidden_size": 28}, ["model.embed_tokens.weight is [97, 24] where the config asks for [97, 28]"]),
    ],
)
def test_configs_that_cannot_be(folder, changes, parts) -> None:
    edit(folder, **changes)
    refuses(folder, *parts)


@pytest.mark.parametrize("kind", ["deepseek_v2", "gemma4", "qwen3_5"])
def test_another_architecture_is_never_guessed(folder, kind) -> None:
    edit(folder, model_type=kind)
    with pytest.raises(UserError, match=kind) as error:
        checkpoints.load_model(folder)
    assert "Did you mean" not in str(error.value)


@dataclass(frozen=True)
class Plain:
    """A Config whose types no test hook checks before `check_types` does."""

    dim: int = 3
    window: int | None = None
    eps: float = 1.0
    name: str = "x"
    first_window_layer: int = 0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"dim": "wide"}, "'wide' for dim, which must be int."),
        ({"dim": True}, "True for dim, which must be int."),
        ({"dim": 0}, "0 for dim, which must be at least 1."),
        ({"window": 2.5}, "2.5 for window, which must be int or null."),
        ({"eps": "small"}, "'small' for eps, which must be float."),
        ({"name": None}, "None for name, which must be str."),
    ],
)
def test_fields_of_the_wrong_type(values, text) -> None:
    check_types(Plain(), "config.json")
    with pytest.raises(UserError) as caught:
        check_types(Plain(**values), "config.json")
    assert str(caught.value) == f"config.json gives {text}"


def test_settings_of_gpt2_that_change_the_numbers(published, tmp_path) -> None:
    settings = {"scale_attn_by_inverse_layer_idx": True}
    config = transformers.GPT2Config(vocab_size=97, n_embd=20, n_layer=2, n_head=5, **settings)
    published(config).save_pretrained(tmp_path)
    refuses(tmp_path, "scale_attn_by_inverse_layer_idx", "True", "does not implement")


def test_stored_types_that_are_not_read(folder) -> None:
    tensors(folder, lambda weights: weights | {"model.norm.weight": torch.zeros(24, dtype=torch.int8)})
    refuses(folder, "model.norm.weight as I8")


def test_what_is_no_type_of_weights_is_no_fault_of_the_file(sound) -> None:
    with pytest.raises(UserError, match="^dtype is torch.int8: give a floating-point type of torch"):
        checkpoints.load_model(sound, torch.int8)


def test_tokenizer_that_does_not_fit(folder, tokenizer) -> None:
    tokenizer.save(folder)
    with pytest.raises(UserError, match=f"{tokenizer.vocab_size} tokens and the model embeds 97"):
        checkpoints.load(folder)
    with pytest.raises(UserError, match="embeds 97"):
        checkpoints.save(checkpoints.load_model(folder), tokenizer, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_no_tokenizer_is_an_error_only_where_text_is_asked_for(folder) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        checkpoints.load(folder)
    checkpoints.load_model(folder)


def test_names_that_are_nothing(sound, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    refuses("smolm2", "no model 'smolm2'", "Did you mean 'smollm2'?")
    refuses(sound.parent / (sound.name[:-1] + "x"), "Did you mean", sound.name)
    refuses("sotu", "not a model")
    refuses("someone/some-model", "someone/some-model", "the hub does not answer")
    refuses("model.gguf", "no model 'model.gguf'")
    refuses("/nowhere/at/all", "There is no file or folder '/nowhere/at/all'.")


@pytest.mark.parametrize("value", [{"a": 1}, ["llama"], 3, None])
def test_a_model_type_that_is_no_name_is_told(folder, value) -> None:
    edit(folder, model_type=value)
    refuses(folder, "config.json has the model_type", "which must be a name")
