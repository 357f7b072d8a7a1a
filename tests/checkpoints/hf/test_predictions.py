"""Blocks that predict further tokens: read with an argument, equal to another computation, and saved back."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_next import modeling_qwen3_next

from keifu import checkpoints
from keifu.checkpoints.gguf.write import save_gguf
from keifu.errors import UserError
from keifu.models.hybrid import qwen3_5, qwen3_next
from keifu.training.objectives.language_modeling import causal_language_modeling, multi_token_prediction

DIM, EXPERTS, EPS = 24, 4, 0.01


def qwen() -> transformers.Qwen3NextConfig:
    """Return two layers; the second has attention, and so has the block that predicts further tokens."""
    turns = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return transformers.Qwen3NextConfig(
        vocab_size=97, hidden_size=DIM, intermediate_size=42, num_hidden_layers=2, num_attention_heads=4, head_dim=12,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=EPS, linear_num_key_heads=2,
        num_experts=EXPERTS, linear_num_value_heads=4, linear_key_head_dim=5, linear_value_head_dim=7,
        moe_intermediate_size=20, shared_expert_intermediate_size=14, num_experts_per_tok=2, rope_parameters=turns,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


@pytest.fixture
def stored(published, weights, tmp_path):
    """Return transformers' model in the folder "theirs", and the added tensors: a second layer with attention."""
    reference = published(qwen())
    reference.save_pretrained(tmp_path / "theirs")
    path, prefix = tmp_path / "theirs" / "model.safetensors", "model.layers.1."
    files = load_file(path)
    layer = {name.removeprefix(prefix): tensor for name, tensor in files.items() if name.startswith(prefix)}
    torch.manual_seed(2)
    shapes = {f"mtp.layers.0.{name}": tensor.shape for name, tensor in layer.items()}
    shapes |= {"mtp.fc.weight": (DIM, 2 * DIM), "mtp.norm.weight": (DIM,)}
    shapes |= {f"mtp.pre_fc_norm_{part}.weight": (DIM,) for part in ("embedding", "hidden")}
    further = {name: torch.randn(shape) * 0.15 for name, shape in shapes.items()}
    save_file(files | further, path, metadata={"format": "pt"})
    return reference, further


def norm(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (1 + weight)


def expected_states(reference, further: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Return the states of the block, by transformers' layer with attention."""
    layer = modeling_qwen3_next.Qwen3NextDecoderLayer(reference.config, 1).eval()
    prefix = "mtp.layers.0."
    state = {name.removeprefix(prefix): tensor for name, tensor in further.items() if name.startswith(prefix)}
    experts = [
        {part: state.pop(f"mlp.experts.{i}.{part}_proj.weight") for part in ("gate", "up", "down")}
        for i in range(EXPERTS)
    ]
    state["mlp.experts.gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in experts])
    state["mlp.experts.down_proj"] = torch.stack([one["down"] for one in experts])
    layer.load_state_dict(state)
    hidden = reference.model(tokens).last_hidden_state[:, :-1]
    embeddings = reference.model.embed_tokens(tokens[:, 1:])
    joined = [
        norm(further["mtp.pre_fc_norm_embedding.weight"], embeddings),
        norm(further["mtp.pre_fc_norm_hidden.weight"], hidden),
    ]
    x = torch.cat(joined, -1) @ further["mtp.fc.weight"].T
    length = x.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    turned = reference.model.rotary_emb(x, torch.arange(length)[None])
    x = layer(x, position_embeddings=turned, attention_mask=mask)
    return norm(further["mtp.norm.weight"], x[0] if isinstance(x, tuple) else x)


@torch.no_grad()
def test_a_block_is_read_computed_and_saved(stored, weights, tmp_path) -> None:
    reference, further = stored
    model = checkpoints.load_model(tmp_path / "theirs", predictions=True)
    tokens = torch.randint(0, 97, (2, 11))
    assert torch.allclose(model(tokens), reference(tokens).logits, atol=1e-5)
    states = model.further_hidden(tokens, model.hidden(tokens))
    expected = expected_states(reference, further, tokens)
    assert len(states) == 1
    assert (states[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    checkpoints.save(model, None, tmp_path / "ours")
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert checkpoints.load_model(tmp_path / "ours", predictions=True).config == model.config
    with pytest.raises(UserError, match="n_predictions"):
        save_gguf(model, None, tmp_path / "model.gguf")


@torch.no_grad()
def test_a_load_leaves_the_block_out(stored, tmp_path) -> None:
    reference, further = stored
    model = checkpoints.load_model(tmp_path / "theirs")
    assert model.config.n_predictions == 0 and not any("predictions" in name for name in model.state_dict())
    assert {*further} == {*checkpoints.inspect(tmp_path / "theirs").skipped}
    checkpoints.save(model, None, tmp_path / "plain")
    with pytest.raises(UserError, match="no tensors that predict further tokens"):
        checkpoints.load_model(tmp_path / "plain", predictions=True)


def test_the_loss_is_that_of_all_targets(stored, tmp_path) -> None:
    model = checkpoints.load_model(tmp_path / "theirs", predictions=True).train()
    tokens = torch.randint(0, 97, (2, 9))
    hidden = model.hidden(tokens[:, :-1])
    nats = F.cross_entropy(model.logits(hidden).mT, tokens[:, 1:], reduction="sum")
    state = model.further_hidden(tokens[:, :-1], hidden)[0]
    further_nats = F.cross_entropy(model.logits(state).mT, tokens[:, 2:], reduction="sum")
    output = multi_token_prediction(model, {"tokens": tokens}, weight=0.5)
    assert output.total.item() == pytest.approx((nats + 0.5 * further_nats).item(), rel=1e-5)
    output.total.backward()
    assert model.predictions[0].projection.weight.grad.abs().sum() > 0
    model.eval()
    held_out = multi_token_prediction(model, {"tokens": tokens}).total
    assert held_out.item() == pytest.approx(causal_language_modeling(model, {"tokens": tokens}).total.item(), rel=1e-6)


def test_documents_are_predicted_apart(stored, tmp_path) -> None:
    """A row with two documents has the loss of both alone, and the first tokens of the second as further targets."""
    model = checkpoints.load_model(tmp_path / "theirs", predictions=True).train()
    first, second = torch.randint(0, 97, (1, 6)), torch.randint(0, 97, (1, 7))
    of_rows = partial(multi_token_prediction, model)
    documents = torch.tensor([[0] * 6 + [1] * 7])
    mask = torch.ones(1, 13, dtype=torch.bool)
    mask[0, 6] = False  # the second document's first token has nothing before it
    joined = of_rows({"tokens": torch.cat([first, second], 1), "documents": documents, "mask": mask}).figures
    alone = [of_rows({"tokens": tokens}).figures for tokens in (first, second)]
    for name in ("nats", "further_nats"):
        assert joined[name].item() == pytest.approx(sum(each[name].item() for each in alone), rel=1e-5)


def test_new_blocks_are_initialised_after_the_decoder() -> None:
    models = {}
    for n_predictions in (0, 1):
        torch.manual_seed(3)
        sizes = {"n_layers": 2, "n_heads": 4, "head_dim": 12, "rope_dim": 6, "n_experts": 4, "n_experts_per_token": 2}
        config = qwen3_next.Config(97, 64, 48, 42, 20, 14, **sizes, n_predictions=n_predictions)
        models[n_predictions] = qwen3_next.build(config).state_dict()
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    further = {name: tensor for name, tensor in models[1].items() if name not in models[0]}
    out = "predictions.0.block.attention.out.weight"
    assert further["predictions.0.projection.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert further[out].std().item() == pytest.approx(0.02 / 2**0.5, rel=0.1)


@pytest.mark.parametrize("n_experts", [None, 4])
def test_qwen3_5_has_the_same_block(n_experts, weights, tmp_path) -> None:
    sizes = {"n_layers": 2, "n_heads": 4, "head_dim": 12, "rope_dim": 6, "n_experts": n_experts}
    config = qwen3_5.Config(97, 64, 48, 42, 20, 14, **sizes, n_experts_per_token=2, n_predictions=1)
    model = qwen3_5.build(config)
    checkpoints.save(model, None, tmp_path)
    stored = [name for name in weights(tmp_path) if name.startswith("mtp.")]
    assert {"mtp.fc.weight", "mtp.layers.0.self_attn.q_norm.weight"} < {*stored}
    again = checkpoints.load_model(tmp_path, predictions=True)
    assert again.config.n_predictions == 1
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {*checkpoints.inspect(tmp_path).skipped} == {*stored}
