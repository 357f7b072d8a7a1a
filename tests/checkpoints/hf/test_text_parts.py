"""Text models inside models that see, tensors of multi-token prediction, and routers that are wider than the rest."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.errors import UserError

SIZES = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 42, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SEES = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24}
TURNS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1]}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "head_dim": 8}


def hybrid(make):
    """Return five layers, of which the fourth has attention."""
    return make(
        **SIZES | {"num_hidden_layers": 5}, rms_norm_eps=0.01, head_dim=12, linear_num_key_heads=2, num_experts=6,
        linear_num_value_heads=6, linear_key_head_dim=5, linear_value_head_dim=7, moe_intermediate_size=20,
        shared_expert_intermediate_size=14, num_experts_per_tok=2, rope_parameters=TURNS,
    )  # fmt: skip


def deepseek():
    """Return one dense layer, and two with four experts."""
    return transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, kv_lora_rank=10, q_lora_rank=14, qk_rope_head_dim=6, qk_nope_head_dim=5,
        v_head_dim=7, n_group=1, topk_group=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
        first_k_dense_replace=1, num_nextn_predict_layers=0,
    )  # fmt: skip


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def qwen(kind: str, text):
    """Return Qwen3.5 with a small tower for pictures; the mixture's file has the experts of a layer in one tensor."""
    config = getattr(transformers, f"{kind}Config")(
        text_config=text.to_dict(), vision_config=SEES, image_token_id=94, video_token_id=95,
        vision_start_token_id=96, vision_end_token_id=93,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def mistral():
    text = transformers.Ministral3Config(**SIZES, head_dim=10, rope_parameters=YARN | {"llama_4_scaling_beta": 0.1})
    config = transformers.Mistral3Config(text_config=text.to_dict(), vision_config=PIXTRAL, image_token_index=95)
    return transformers.Mistral3ForConditionalGeneration(config)


def gemma(**changes):
    """Return Gemma 4 with small towers for pictures and sound. Its last two layers share keys, and its file has keys
    of their own for them, as published files do."""
    kinds = ["sliding_attention", "full_attention"] * 2
    text = transformers.Gemma4TextConfig(
        **SIZES | {"num_hidden_layers": 4},
        head_dim=10,
        global_head_dim=12,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=6,
        sliding_window=5,
        layer_types=kinds,
        num_kv_shared_layers=2,
        rms_norm_eps=0.01,
        **changes,
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma4Config(
        text_config=text.to_dict(),
        audio_config=sizes | {"subsampling_conv_channels": [4, 4], "output_proj_dims": 16},
        vision_config=sizes | {"intermediate_size": 20, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4},
        image_token_id=94,
        audio_token_id=95,
        video_token_id=96,
    )
    return transformers.Gemma4ForConditionalGeneration(config)


SEEING = {
    "gemma4": gemma,
    "qwen3.5": lambda: qwen("Qwen3_5", hybrid(transformers.Qwen3_5TextConfig)),
    "qwen3.5-moe": lambda: qwen("Qwen3_5Moe", hybrid(transformers.Qwen3_5MoeTextConfig)),
    "mistral3": mistral,
}


def random(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
    return model.eval()


def add(directory, **tensors) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", SEEING)
@torch.no_grad()
def test_the_text_model_of_a_model_that_sees(case, tmp_path) -> None:
    torch.manual_seed(1)
    reference = random(SEEING[case]())
    reference.save_pretrained(tmp_path / "theirs")
    extra = {"mtp.fc.weight": torch.ones(24, 48)} if "qwen" in case else {}
    if case == "gemma4":
        extra = {f"model.language_model.layers.3.self_attn.{part}_proj.weight": torch.ones(24, 24) for part in "kv"}
    add(tmp_path / "theirs", **extra)
    tokens = torch.randint(0, 90, (2, 61))
    expected = reference(input_ids=tokens).logits
    model = checkpoints.load_model(tmp_path / "theirs")
    assert close(model(tokens), expected)
    report = checkpoints.inspect(tmp_path / "theirs")
    assert any("without its other parts" in note for note in report.notes)
    names = {name.replace("model.language_model.", "model.") for name in extra}
    assert names <= {*report.skipped} and len(report.skipped) > 5
    checkpoints.save(model, None, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert close(again(tokens).logits, expected)


@torch.no_grad()
def test_layers_that_predict_further_tokens_are_left_out(published, tmp_path) -> None:
    reference = published(deepseek())
    reference.save_pretrained(tmp_path)
    further = {"model.layers.3.eh_proj.weight": torch.ones(24, 48), "model.layers.3.mlp.up_proj.weight": torch.ones(4)}
    add(tmp_path, **further)
    tokens = torch.randint(0, 97, (1, 12))
    assert close(checkpoints.load_model(tmp_path)(tokens), reference(tokens).logits)
    assert sorted(checkpoints.inspect(tmp_path).skipped) == sorted(further)
    add(tmp_path, **{"model.layers.4.mlp.up_proj.weight": torch.ones(4)})
    with pytest.raises(UserError, match=r"model\.layers\.4"):
        checkpoints.load_model(tmp_path)


@torch.no_grad()
def test_a_router_in_full_precision_stays_so(published, weights, tmp_path) -> None:
    published(deepseek()).bfloat16().save_pretrained(tmp_path / "narrow")
    mixed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.bfloat16)
    mixed.save_pretrained(tmp_path / "theirs")
    stored = weights(tmp_path / "theirs")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
    model = checkpoints.load_model(tmp_path / "theirs", torch.bfloat16)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.blocks[1].feedforward.router.gate.weight.dtype == torch.float32
    assert model(torch.randint(0, 97, (1, 12))).isfinite().all()
    checkpoints.save(model, None, tmp_path / "ours")
    saved = weights(tmp_path / "ours")
    assert saved.keys() == stored.keys()
    assert all(saved[name].dtype == stored[name].dtype and torch.equal(saved[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "need llama_4_scaling_beta"),
        ({"quantization_config": {"quant_method": "fp8"}}, "sets quantization_config"),
    ],
)
def test_what_a_text_part_cannot_be(change, words, tmp_path) -> None:
    mistral().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    inside = config["text_config"] if "rope_parameters" in change else config
    inside |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        checkpoints.load_model(tmp_path)
