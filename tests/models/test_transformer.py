"""The Transformer of 2017: its sizes, its start, its two ways of writing a target, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from keifu.checkpoints import load_model, save, save_gguf
from keifu.inference.text.model import causal
from keifu.layers.linear import JoinedLinear
from keifu.models import transformer
from keifu.models.sizes import count, published_sizes
from keifu.training.objectives.language_modeling import translation

SMALL = transformer.Config(
    vocab_size=37, context_length=16, dim=24, hidden_dim=40, n_layers=3, n_decoder_layers=2, n_heads=4,
    n_decoder_heads=3,
)  # fmt: skip
SOURCE, TARGET = torch.arange(4, 31).reshape(3, 9), torch.arange(2, 32).reshape(3, 10)
PAPER = {size.name: size.paper for size in published_sizes()}
MASK = torch.arange(9) < torch.tensor([[9], [5], [7]])


def built(**changes) -> transformer.EncoderDecoder:
    torch.manual_seed(3)
    return transformer.build(replace(SMALL, **changes)).eval()


@pytest.mark.parametrize("name", transformer.SIZES)
def test_the_papers_sizes_have_the_papers_parameters(name):
    counted = count(transformer, transformer.SIZES[name])
    assert abs(counted / PAPER[name] - 1) < 0.04


def test_the_start_is_xaviers_part_by_part_and_scaled_embeddings_have_variance_one():
    model = transformer.build(transformer.Config(vocab_size=4000, dim=64, hidden_dim=128, n_layers=1))
    scaled = model.embedding.weight * model.scale
    assert abs(scaled.std() - 1) < 0.01 and abs(scaled.mean()) < 0.01
    for module in model.modules():
        if isinstance(module, nn.Linear):
            parts = module.parts if isinstance(module, JoinedLinear) else (module.out_features,)
            for part in module.weight.split(list(parts)):
                bound = (6 / sum(part.shape)) ** 0.5
                assert 0.95 * bound < part.abs().max() <= bound
            assert not module.bias.any()


@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_token_by_token_is_the_whole(mask):
    model = built()
    whole = model(SOURCE, TARGET, mask)
    state = model.start(SOURCE, mask, capacity=10)
    parts = [model.hidden(TARGET[:, a:b], state) for a, b in ((0, 1), (1, 4), (4, 5), (5, 10))]
    assert torch.allclose(model.logits(torch.cat(parts, 1)), whole, atol=1e-5) and state.length == 10
    with pytest.raises(ValueError, match="room for 10 tokens and was given 11"):
        model.hidden(TARGET[:, :1], state)


CHOICES = {
    "two beams each": [0, 0, 1, 1, 2, 2],
    "unequal": [2, 0, 0, 0],
    "reordered": [2, 0, 1],
    "one source left": [1, 1],
    "apart": [0, 1, 0, 1],
}


@pytest.mark.parametrize("rows", CHOICES.values(), ids=CHOICES)
@torch.no_grad()
def test_selected_rows_go_on_as_if_they_had_been_alone(rows):
    model = built()
    state = model.start(SOURCE, MASK, capacity=10)
    model.hidden(TARGET[:, :4], state)
    state.select(torch.tensor(rows))
    assert state.rows == len(rows) and state.length == 4
    state.select(torch.tensor([*range(len(rows))][::-1]))
    rows = rows[::-1]
    new = torch.randint(4, 37, (len(rows), 3))
    got = model.logits(torch.cat([model.hidden(new[:, i : i + 1], state) for i in range(3)], 1))
    expected = model(SOURCE[rows], torch.cat([TARGET[rows, :4], new], 1), MASK[rows])[:, 4:]
    assert torch.allclose(got, expected, atol=1e-5)


@torch.no_grad()
def test_beams_of_a_source_share_its_keys_and_values():
    state = built().start(SOURCE, MASK, capacity=4)
    before = [pair[0].data_ptr() for pair in state.memory]
    state.select(torch.tensor([0, 0, 1, 1, 2, 2]))
    state.select(torch.tensor([1, 0, 2, 2, 5, 5]))
    assert [pair[0].data_ptr() for pair in state.memory] == before and state.rows == 6
    state.select(torch.tensor([0, 1, 4, 5]))
    assert [len(pair[0]) for pair in state.memory] == [2, 2]
    state.select(torch.tensor([], dtype=torch.long))
    assert state.rows == 0


@torch.no_grad()
def test_padding_of_the_source_changes_nothing():
    model = built()
    together = model(SOURCE, TARGET, MASK)
    for row, length in enumerate((9, 5, 7)):
        alone = model(SOURCE[row : row + 1, :length], TARGET[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-5)


@torch.no_grad()
def test_the_two_orders_of_sines_and_cosines_are_one_model():
    """Renumbering the dimensions of the stream turns one into the other."""
    halves, interleaved = built(), built(interleaved=True)
    order = torch.arange(24).reshape(2, 12).T.flatten()  # where each interleaved dimension is among the halves
    reads, writes = (".qkv.weight", ".q.weight", ".kv.weight", ".up.weight", "embedding.weight"), (".out.", ".down.")
    state = interleaved.state_dict()
    for name, tensor in halves.state_dict().items():
        if name.endswith(reads):
            tensor = tensor[:, order]
        elif "norm" in name or any(part in name for part in writes):
            tensor = tensor[order]
        state[name] = tensor
    interleaved.load_state_dict(state)
    assert torch.allclose(interleaved(SOURCE, TARGET, MASK), halves(SOURCE, TARGET, MASK), atol=1e-5)
    assert not torch.allclose(built(interleaved=True)(SOURCE, TARGET), halves(SOURCE, TARGET), atol=1e-2)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_acts_in_training_alone(kind):
    model = built(**{"dropout": 0.0} | {kind: 0.3})
    still, moving = model(SOURCE, TARGET), model.train()(SOURCE, TARGET)
    assert not torch.allclose(still, moving, atol=1e-3)
    assert torch.equal(model.eval()(SOURCE, TARGET), still)
    assert torch.allclose(built(dropout=0.0).train()(SOURCE, TARGET), still, atol=1e-5)


@pytest.mark.parametrize("mask", [None, MASK])
def test_bfloat16_trains_and_writes(mask):
    model = built(dropout=0.0)
    exact = model(SOURCE, TARGET, mask)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(SOURCE, TARGET, mask)
        state = model.start(SOURCE, mask, capacity=10)
        parts = torch.cat([model.hidden(TARGET[:, i : i + 1], state) for i in range(10)], 1)
        written = model.logits(parts)
    spread = exact.std()
    assert (logits - exact).abs().max() < 0.1 * spread and (written - exact).abs().max() < 0.1 * spread
    logits.float().logsumexp(-1).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_the_objective_sees_no_padding():
    model = built(dropout=0.0)
    target_mask = torch.arange(10) < torch.tensor([[10], [4], [6]])
    batch = {"source": SOURCE, "source_mask": MASK, "target": TARGET, "target_mask": target_mask}
    changed = batch | {"source": SOURCE.where(MASK, 3), "target": TARGET.where(target_mask, 3)}
    one, other = translation(model, batch), translation(model, changed)
    assert torch.allclose(one.total, other.total, atol=1e-4) and float(one.weight) == 9 + 3 + 5


def test_positions_made_while_generating_serve_training():
    model = built(dropout=0.0)
    with torch.inference_mode():
        model(SOURCE, TARGET)
    model(SOURCE, TARGET).sum().backward()
    assert model.embedding.weight.grad is not None


def test_what_does_not_fit_is_refused():
    model = built()
    with pytest.raises(ValueError, match="17 tokens do not fit the 16"):
        model.start(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="for 3 targets and was given tokens of 2"):
        model.hidden(TARGET[:2], model.start(SOURCE))
    with pytest.raises(ValueError, match="one vocabulary, not 37 and 29"):
        built(target_vocab_size=29)


@torch.no_grad()
def test_two_vocabularies_and_a_head_of_its_own():
    model = built(shared=False, tied=False, target_vocab_size=33)
    assert model(SOURCE, TARGET).shape == (3, 10, 33)
    assert model.head_weight is model.head.weight is not model.target_embedding.weight


@torch.no_grad()
def test_what_marian_cannot_say_is_saved_as_keifus_own(tmp_path):
    model = built(interleaved=True, start_id=0, n_decoder_layers=None)
    save(model, None, tmp_path)
    assert '"keifu_transformer"' in (tmp_path / "config.json").read_text()
    again = load_model(tmp_path)
    assert again.config == model.config and torch.equal(again(SOURCE, TARGET), model(SOURCE, TARGET))


def test_a_request_to_continue_a_text_is_answered_with_what_it_does_instead():
    with pytest.raises(ValueError, match="an encoder-decoder, it turns one text into another .* use keifu translate"):
        causal(built())


def test_gguf_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"keifu writes no GGUF of .*transformer; it can be written as"):
        save_gguf(built(), None, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
