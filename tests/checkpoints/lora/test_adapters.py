"""Low-rank adapters: PEFT's numbers and files, both ways."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CohereConfig, GPT2Config, LlamaConfig, Qwen2Config

from keifu import checkpoints
from keifu.checkpoints.lora.peft import adapt, linears, load_adapter, save_adapter
from keifu.errors import UserError
from keifu.layers.lora import LoraSettings, adapters, merge
from keifu.models import llama

SIZES = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 67, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32}
LLAMA, TIED = LlamaConfig(**SIZES, **HEADS), LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True)
PATTERNS = {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.o_proj": 7}, "alpha_pattern": {"v_proj": 5}}
CASES = {  # a base, the targets, and what else PEFT is told
    "llama": (LLAMA, ["q_proj", "v_proj"], {"r": 3}),
    "llama, all": (TIED, "all-linear", {"r": 4}),
    "llama, one part and DoRA": (LLAMA, ["k_proj", "up_proj", "down_proj"], {"r": 2, "use_dora": True}),
    "qwen2, biases and DoRA": (Qwen2Config(**SIZES, **HEADS), ["q_proj", "k_proj"], {"r": 5, "use_dora": True}),
    "gpt2, joined": (GPT2Config(**GPT2), ["c_attn", "c_proj"], {"r": 4, "fan_in_fan_out": True, "use_rslora": True}),
    "gpt2, DoRA": (GPT2Config(**GPT2), ["c_attn", "c_fc"], {"r": 4, "fan_in_fan_out": True, "use_dora": True}),
    "cohere": (CohereConfig(**SIZES, **HEADS, tie_word_embeddings=True), ["v_proj", "gate_proj"], {"r": 4}),
    "patterns": (LLAMA, ["q_proj", "v_proj", "o_proj"], {"r": 4, **PATTERNS}),
}


@pytest.fixture(scope="module", params=CASES)
def theirs(request: Any, published: Any, tmp_path_factory: Any) -> tuple[Path, Path, Any]:
    """Return the paths of a base and an adapter as PEFT wrote them, and PEFT's model."""
    config, targets, options = CASES[request.param]
    wanted = peft.LoraConfig(lora_alpha=6, task_type="CAUSAL_LM", target_modules=targets, **options)
    folder = tmp_path_factory.mktemp("peft")
    base = published(config)
    base.save_pretrained(folder / "base")
    torch.manual_seed(3)
    model = peft.get_peft_model(base, wanted).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", model


def tokens() -> torch.Tensor:
    return torch.randint(0, 67, (3, 11), generator=torch.Generator().manual_seed(5))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.detach().abs().max().item())


@torch.no_grad()
def test_their_adapters_give_their_logits_and_merge(theirs: Any) -> None:
    base, adapter, model = theirs
    ours = load_adapter(checkpoints.load_model(base), adapter)
    expected = model(tokens()).logits
    plain = checkpoints.load_model(base)(tokens())
    assert not torch.allclose(plain, expected, atol=1e-2)
    close(ours(tokens()), expected)
    close(ours(tokens()[:1, :1]), expected[:1, :1])
    assert merge(ours) is ours and not list(adapters(ours))
    close(ours(tokens()), expected)


def test_saved_back_nothing_changes_and_they_read_it(theirs: Any, tmp_path: Path) -> None:
    base, adapter, model = theirs
    ours = load_adapter(checkpoints.load_model(base), adapter)
    save_adapter(ours, tmp_path, str(base))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    read = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).eval(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == model.peft_config["default"].fan_in_fan_out
    with torch.no_grad():
        close(read(tokens()).logits, model(tokens()).logits)


@torch.no_grad()
def test_load_takes_the_folder_of_an_adapter(theirs: Any, tmp_path: Path) -> None:
    base, adapter, model = theirs
    save_adapter(load_adapter(checkpoints.load_model(base), adapter), tmp_path, str(base))
    assert f"The adapters of {tmp_path} are added to these tensors." in checkpoints.inspect(tmp_path).notes
    close(checkpoints.load_model(tmp_path)(tokens()), model(tokens()).logits)


CONFIG = llama.Config(vocab_size=67, context_length=32, dim=48, hidden_dim=80, n_layers=2, n_heads=4, n_kv_heads=2)


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_change_nothing_and_only_they_learn(dora: bool) -> None:
    torch.manual_seed(0)
    model = llama.build(CONFIG)
    whole = copy.deepcopy(model)
    adapt(model, ["q_proj", "v_proj", "gate_proj"], LoraSettings(rank=3, alpha=6.0, dora=dora))
    close(model(tokens()), whole(tokens()))
    model(tokens()).square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, parameter in model.named_parameters() if ".adapters." in name}
    assert len(learning) == 2 * 3 * (3 if dora else 2)


def test_dora_learns_as_peft_does(published: Any, tmp_path: Path) -> None:
    """Gradients too, with the row norms held fixed."""
    base = published(LlamaConfig(**SIZES, **HEADS))
    base.save_pretrained(tmp_path)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True))
    model.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(checkpoints.load_model(tmp_path), tmp_path / "adapter")
    model(tokens()).logits.square().mean().backward()
    ours(tokens()).square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for place, adapter in enumerate(adapters(ours)):
        for end, mine in {"lora_B": adapter.b, "lora_magnitude_vector": adapter.length}.items():
            [expected] = [g for name, g in found.items() if f"layers.{place}." in name and f"{end}.default" in name]
            torch.testing.assert_close(mine.grad, expected, rtol=1e-4, atol=1e-6)


def test_names_and_bad_input(tmp_path: Path) -> None:
    model = llama.build(CONFIG)
    assert len(linears(model)) == 14 and "model.layers.1.mlp.up_proj" in linears(model)
    with pytest.raises(UserError, match=r"'q_prj'.*q_proj"):
        adapt(model, ["q_prj"], LoraSettings())
    with pytest.raises(UserError, match="at least 1"):
        LoraSettings(rank=0, alpha=1.0)
    with pytest.raises(UserError, match="no adapters"):
        save_adapter(model, tmp_path, "x")
    adapt(model, ["all-linear"], LoraSettings(rank=2))
    save_adapter(model, tmp_path, "nowhere")
    other = llama.build(llama.Config(**{**vars(CONFIG), "dim": 32, "n_layers": 1}))
    with pytest.raises(UserError, match=r"layers\.1\..*belongs to no layer.*"):
        load_adapter(other, tmp_path)
    wider = llama.build(llama.Config(**{**vars(CONFIG), "hidden_dim": 96}))
    with pytest.raises(UserError, match=r"lora_B.weight has the shape \(80, 2\) where \(96, 2\)"):
        load_adapter(wider, tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        checkpoints.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": None}, "adapter_config.json has None as lora_alpha: it must be a number"),
        ({"r": "x"}, "adapter_config.json has 'x' as r: it must be a number"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's own weights"),
    ],
)
def test_a_config_that_says_more_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = adapt(llama.build(CONFIG), ["o_proj"], LoraSettings())
    save_adapter(model, tmp_path, "base")
    where = tmp_path / "adapter_config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_adapter(llama.build(CONFIG), tmp_path)
