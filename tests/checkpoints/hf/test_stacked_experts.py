"""gpt-oss's experts, several in one tensor: in MXFP4 as they were published, and unpacked."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from keifu import checkpoints
from keifu.checkpoints.hf.stacked_experts import unpack_mxfp4, unstack, unstack_rows
from keifu.checkpoints.plan import StoredTensor
from keifu.errors import UserError
from keifu.models.mixture import gpt_oss, mixtral

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5,
}  # fmt: skip


def test_every_number_of_four_bits_and_every_scale_is_that_of_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(2, 1, 1)
    scales = torch.tensor([0, 1, 64, 100, 117, 120, 125, 126, 127, 128, 129, 135, 150, 200, 250, 252])
    scales = scales.to(torch.uint8).repeat(2, 1)
    theirs = convert_moe_packed_tensors(blocks[None], scales[None])[0].mT  # they turn it for their layout
    assert torch.equal(unpack_mxfp4(blocks, scales), theirs)


def test_a_tensor_without_numbers_is_not_split_into_experts() -> None:
    """A file of a few bytes can give it any number of them."""
    stored = {"model.layers.0.mlp.experts.down_proj": StoredTensor((10**15, 0, 2), "F32", torch.float32)}
    assert unstack(stored, lambda: None)[0] == unstack_rows(stored, lambda: None)[0] == stored


def test_rows_that_are_not_two_halves_are_refused() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(UserError, match=f"{name} has 7 rows"):
        unstack_rows({name: StoredTensor((3, 7, 2), "F32", torch.float32)}, lambda: None)


@torch.no_grad()
def test_a_file_in_mxfp4_is_the_model_with_its_unpacked_numbers(published, tmp_path) -> None:
    reference = published(transformers.GptOssConfig(**SIZES)).bfloat16()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(123, 127, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        reference.get_parameter(name).copy_(convert_moe_packed_tensors(blocks, scales))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": gpt_oss.MXFP4}))

    assert any(row.stored == "MXFP4" and "dequantised" in row.done for row in checkpoints.inspect(tmp_path).rows)
    model, tokens = checkpoints.load_model(tmp_path, dtype=torch.float32), torch.randint(0, 97, (2, 21))
    exact = published(transformers.GptOssConfig(**SIZES))  # whose rotary frequencies were never rounded
    exact.load_state_dict(reference.state_dict())
    torch.testing.assert_close(model(tokens), exact(tokens).logits, rtol=1e-5, atol=1e-5)

    checkpoints.save(checkpoints.load_model(tmp_path), None, tmp_path / "unpacked")
    saved = load_file(tmp_path / "unpacked" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "unpacked" / "config.json").read_text())
    for name, parameter in reference.named_parameters():
        assert torch.equal(saved[name], parameter), name

    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="quantization_config"):
        checkpoints.load_model(tmp_path)


@torch.no_grad()
def test_shards_of_stacked_experts(published, tmp_path) -> None:
    reference = published(transformers.GptOssConfig(**SIZES))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=60_000)
    model = checkpoints.load_model(tmp_path / "theirs")
    checkpoints.save(model, None, tmp_path / "ours", max_shard_bytes=60_000)
    assert len([*(tmp_path / "ours").glob("model-*")]) > 1
    again, tokens = checkpoints.load_model(tmp_path / "ours"), torch.randint(0, 97, (1, 9))
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("module", [mixtral, gpt_oss])
def test_more_experts_than_there_are_tensors_are_refused_unbuilt(module, tmp_path) -> None:
    sizes = {"vocab_size": 97, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "n_experts": 4}
    checkpoints.save(module.build(module.Config(**sizes, n_kv_heads=2)), None, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_local_experts": 10**9}))
    with pytest.raises(UserError, match="too few for its config's 1000000000 experts"):
        checkpoints.load_model(tmp_path)


@pytest.mark.timeout(60)
def test_many_experts_in_many_layers_of_a_small_file_are_refused_unbuilt(tmp_path) -> None:
    sizes = {"vocab_size": 97, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "n_experts": 4}
    checkpoints.save(mixtral.build(mixtral.Config(**sizes, n_kv_heads=2)), None, tmp_path)
    file = tmp_path / "config.json"
    more = {"num_local_experts": 1024, "num_hidden_layers": 17}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    with pytest.raises(UserError, match="numbers, too few for 1024 experts in 17 layers"):
        checkpoints.load_model(tmp_path)


def test_stacks_of_single_numbers_stay_whole() -> None:
    shapes = {"gate_up": (10**15, 2, 1), "down": (10**15, 1, 2)}
    stored = {f"a.experts.{part}_proj": StoredTensor(shape, "F32", torch.float32) for part, shape in shapes.items()}
    for found, _ in (unstack(stored, torch.zeros), unstack_rows(stored, torch.zeros)):
        assert found == stored
