"""Logits of packed models: those of PyTorch with the same numbers, and the same bits whatever else is computed."""

import ctypes
import gc
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from native_toys import GROUPED, OF_THIS_MACHINE, TOYS, everywhere, toy, unpacked
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.inference.text.engine import Engine
from keifu.inference.text.runner import Span
from keifu.inference.text.sampling_params import SamplingParams
from keifu.models import llama
from keifu.models.mixture import mixtral
from keifu.native.model import NativeLM, NativeRunner, native_form, pack

pytestmark = pytest.mark.usefixtures("opened")
WEIGHTS = ("f32", "bf16", "int8", "int4")
slow = partial(pytest.param, marks=pytest.mark.slow)
MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss", "mixtral of one expert each", "olmoe")
ALONE = ("gemma3", "palm", "qwen3-moe", "gpt-oss", "qwen2", "gpt3", "mixtral", "olmoe")
FEW = ("llama", "gemma3", "qwen3-moe", "gpt-oss", "gpt2", "palm")  # whose kernels the other kinds use too


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("instructions", "kind", "weights"), everywhere(TOYS, FEW, WEIGHTS), indirect=["instructions"])
def test_logits_are_those_of_the_same_numbers_in_pytorch(kind: str, weights: str, instructions: str) -> None:
    """What is left is the rounding of what goes between the layers: to float32, to bfloat16, or to int8 in groups."""
    model = toy(kind)
    packed = pack(model, weights)
    rows = torch.tensor([tokens(40), tokens(40, seed=1)])
    with torch.inference_mode():
        expected = unpacked(model, packed)(rows)
    error = (packed(rows) - expected).norm(dim=-1) / expected.norm(dim=-1)
    exact = weights == "f32"
    assert error.max() < (1e-5 if exact else 0.05) and error.median() < (1e-6 if exact else 0.02)


@pytest.mark.parametrize("k", [1, 3, 16])
def test_experts_are_chosen_as_in_pytorch_if_they_score_nearly_the_same(k: int, instructions: str) -> None:
    """With random routers, whose scores are close; in float32, where nothing is rounded."""
    torch.manual_seed(4)
    model = mixtral.build(mixtral.Config(**GROUPED, n_experts=16, n_experts_per_token=k)).eval()
    rows = torch.tensor([tokens(60, seed) for seed in range(4)])
    with torch.inference_mode():
        expected = model(rows)
    assert torch.allclose(pack(model, "f32")(rows), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(
    ("instructions", "kind", "weights"),
    everywhere(MIXTURES, MIXTURES, WEIGHTS),
    indirect=["instructions"],
)
def test_experts_that_no_token_chose_are_not_read(kind: str, weights: str, instructions: str) -> None:
    """All bytes of the others are set, which makes NaN of numbers and of scales: a product with them would show."""
    packed, text = pack(toy(kind), weights), tokens(1)
    expected, read, idle = run_alone(packed, text), 0, 0
    for (name, _), matrix in packed.packer.matrices.items():
        if ".experts." not in name:
            continue
        size = packed.library.call("packed_size", matrix.format, matrix.rows, matrix.columns)
        kept = ctypes.string_at(matrix.data, size)
        ctypes.memset(matrix.data, 255, size)
        if torch.equal(run_alone(packed, text), expected):
            idle += size
        else:
            ctypes.memmove(matrix.data, kept, size)
            read += 1
    mixtures = [each for each in packed._layers if each.n_experts]
    assert torch.equal(run_alone(packed, text), expected) and read == 3 * sum(each.n_chosen for each in mixtures)
    assert packed.idle_bytes(1) == pytest.approx(idle)


@pytest.mark.parametrize(
    ("instructions", "kind", "weights"),
    everywhere(ALONE, ALONE, WEIGHTS),
    indirect=["instructions"],
)
def test_same_bits_alone_together_in_pieces_and_on_any_number_of_threads(
    kind: str, weights: str, instructions: str
) -> None:
    packed = pack(toy(kind), weights)
    texts = [tokens(length, length) for length in (70, 1, 33, 32, 5, 64, 17, 2, 40)]
    packed.library.call("use_threads", 1)
    alone = [run_alone(packed, text) for text in texts]
    packed.library.call("use_threads", 2)
    for number, text in enumerate(texts):
        assert torch.equal(run_alone(packed, text), alone[number])
    for seed in range(3):
        for number, rows in run_together(packed.runner(40), texts, random.Random(seed)).items():
            assert torch.equal(rows, alone[number]), f"text {number}, seed {seed}"


@pytest.mark.parametrize("weights", ["f32", "int8"])
@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt3"])
def test_token_by_token_is_the_whole_text(kind: str, weights: str, instructions: str) -> None:
    """Keys are read from the first tile of a window on: each position is once the first one of a pass."""
    packed, text = pack(toy(kind), weights), tokens(80)
    runner, blocks = packed.runner(3), [0, 1, 2]
    rows = [runner.run([Span(0, [token], position, blocks, 1)]) for position, token in enumerate(text)]
    assert torch.equal(torch.cat(rows), run_alone(packed, text))


def test_layers_may_have_different_hidden_widths(instructions: str) -> None:
    model = toy("llama")
    model.get_submodule("blocks.1").feedforward = (
        llama.build(llama.Config(**{**GROUPED, "hidden_dim": 200})).blocks[0].feedforward
    )
    with torch.inference_mode():
        expected = model(torch.tensor([tokens(40)]))
    assert torch.allclose(pack(model, "f32")(torch.tensor([tokens(40)])), expected, rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_may_change_between_and_beside_forwards() -> None:
    packed, text = pack(toy("llama"), "int8"), tokens(5)
    before = packed.library.call("threads")
    expected = run_alone(packed, text)
    with ThreadPoolExecutor(1) as beside:
        resizing = beside.submit(lambda: [packed.library.call("use_threads", 1 + n % 7) for n in range(300)])
        while not resizing.done():
            assert torch.equal(run_alone(packed, text), expected)
    packed.library.call("use_threads", before)


def run_alone(packed: NativeLM, text: list[int]) -> Tensor:
    return packed(torch.tensor([text]))[0]


def run_together(runner: NativeRunner, texts: list[list[int]], chance: random.Random) -> dict[int, Tensor]:
    """Return logits of all texts. They go through the runner together, in pieces of random lengths and in random
    blocks."""
    free = chance.sample(range(40), 40)
    tables: list[list[int]] = [[] for _ in texts]
    done = [0] * len(texts)
    found: dict[int, list[Tensor]] = {number: [] for number in range(len(texts))}
    while going := [number for number, text in enumerate(texts) if done[number] < len(text)]:
        batch, chosen = [], chance.sample(going, chance.randint(1, len(going)))
        for number in chosen:
            text, start = texts[number], done[number]
            end = min(len(text), start + chance.choice((1, 1, 3, 16, 50)))
            while len(tables[number]) * runner.block_size < end:
                tables[number].append(free.pop())
            batch.append(Span(number, text[start:end], start, tables[number], end - start))
            done[number] = end
        pieces = runner.run(batch).split([span.wanted for span in batch])
        for number, piece in zip(chosen, pieces, strict=True):
            found[number].append(piece)
    return {number: torch.cat(pieces) for number, pieces in found.items()}


@pytest.mark.parametrize(
    ("kind", "window"), [("mistral", 7), ("gpt3", None), ("gemma3", None), ("gemma3 of windows", 9)]
)
def test_the_widest_window_is_that_of_all_layers(kind: str, window: int | None) -> None:
    assert pack(toy(kind), "int4").runner(1).window == window


@pytest.mark.parametrize("instructions", OF_THIS_MACHINE[:1] + [*map(slow, OF_THIS_MACHINE[1:])], indirect=True)
@pytest.mark.parametrize("weights", ["int8", *map(slow, ("f32", "bf16", "int4"))])
def test_blocks_before_the_window_are_given_to_others(weights: str, instructions: str) -> None:
    """Long texts beside each other in a pool that holds only their windows: the tokens that each writes alone."""
    torch.manual_seed(3)
    config: dict[str, Any] = {**GROUPED, "context_length": 400}
    packed = pack(llama.build(llama.Config(**config, sliding_window=37)), weights)
    asked = [(tokens(n, n), SamplingParams(temperature=1, seed=n, max_tokens=20)) for n in (260, 33, 270, 191, 250)]

    def write(requests: list[tuple[list[int], SamplingParams]], blocks: int) -> tuple[list[list[int]], int]:
        engine, found, most = Engine(packed, None, packed.runner(blocks), max_running=5, step_tokens=29), {}, 0
        for prompt, sampling in requests:
            found[engine.add(engine.request(prompt, sampling))] = []
        while engine.work:
            for piece in engine.step():
                found[piece.index].append(piece.token)
            most = max(most, len(engine.scheduler.running))
        assert engine.scheduler.blocks.free == blocks
        return list(found.values()), most

    together, running = write(asked, 11)
    assert together == [write([each], 40)[0][0] for each in asked]
    assert running > 2, "two of these texts have 20 blocks, more than the pool has"


def test_only_wanted_logits_come_back() -> None:
    packed = pack(toy("llama"), "int8")
    text, runner = tokens(40), packed.runner(8)
    alone = run_alone(packed, text)
    batch = [Span(0, text[:30], 0, [0], 0), Span(1, text, 0, [2, 3], 3), Span(2, text[:20], 0, [4], 1)]
    batch[0] = Span(0, text[:30], 0, [0], 0)
    assert torch.equal(runner.run(batch), torch.cat([alone[-3:], alone[19:20]]))
    assert torch.equal(runner.run([Span(0, text[30:], 30, [0, 1], 1)]), alone[-1:])


def test_more_tokens_than_fit_one_pass() -> None:
    packed = pack(toy("llama"), "int8")
    text = tokens(78)
    batch = [Span(n, text, 0, [3 * n, 3 * n + 1, 3 * n + 2], 78 if n % 2 else 2) for n in range(9)]
    alone = run_alone(packed, text)
    expected = [alone if n % 2 else alone[-2:] for n in range(9)]
    assert torch.equal(packed.runner(27).run(batch), torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_type_are_packed(dtype: torch.dtype) -> None:
    model = toy("qwen2").to(torch.bfloat16)
    expected = pack(model, "int8")(torch.tensor([tokens(9)]))
    assert torch.equal(pack(model.to(dtype), "int8")(torch.tensor([tokens(9)])), expected)


def test_bfloat16_weights_stay_what_they_are() -> None:
    model = toy("gpt2").to(torch.bfloat16)
    for name, each in unpacked(model, pack(model, "bf16")).named_parameters():
        assert torch.equal(each, model.get_parameter(name).float()), name


NOT_FINITE = {
    "blocks.1.feedforward.gate_up.weight": (
        "blocks.1.feedforward.gate_up.weight cannot be packed, of the rows from 88 on: Row "
    ),
    "blocks.2.attention_norm.weight": "blocks.2.attention_norm.weight holds a number that is not finite",
    "embedding.weight": "embedding.weight cannot be packed, of the rows from 0 on: Row ",
}


@pytest.mark.parametrize(
    ("instructions", "name", "weights"), everywhere(NOT_FINITE, NOT_FINITE, WEIGHTS), indirect=["instructions"]
)
def test_a_weight_that_is_no_number_is_named(name: str, weights: str, instructions: str) -> None:
    model = toy("llama")
    for place in (-1, -20, -40):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[place] = torch.nan
        with pytest.raises(UserError, match=NOT_FINITE[name]):
            pack(model, weights)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[place] = 0.0


def test_unknown_weights_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="There is no format of weights 'int5'. Did you mean 'int"):
        pack(toy("llama"), "int5")


def test_tokens_and_places_out_of_range_are_refused() -> None:
    runner = pack(toy("llama"), "int8").runner(4)
    for span in (Span(0, [101], 0, [0]), Span(0, [-1], 0, [0]), Span(0, [1], 0, [4]), Span(0, [1], 80, [0, 1, 2])):
        with pytest.raises(UserError):
            runner.run([span])


def test_a_tied_head_is_packed_once() -> None:
    names = [name for name, _ in pack(toy("qwen2"), "bf16").packer.matrices]
    assert names.count("embedding.weight") == 1 and "head.weight" not in names


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's numbers. A tensor inside a transform of another test has none."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def test_what_was_packed_does_not_stay_in_memory() -> None:
    model = toy("llama")
    place = model.get_parameter("embedding.weight").data_ptr()
    packed = pack(model, "int8")
    del model
    gc.collect()
    held = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    assert packed.nbytes and place not in set(map(address, held))


def test_bfloat16_weights_are_packed_without_being_asked_and_anew_when_they_change() -> None:
    model = toy("llama").to(torch.bfloat16)
    first = native_form(model)
    assert first is not None and native_form(model) is first and native_form(first) is first
    with torch.no_grad():
        model.get_parameter("norm.weight").mul_(2)
    again, rows = native_form(model), torch.tensor([tokens(5)])
    assert again is not None and not torch.equal(again(rows), first(rows))
    assert torch.equal(again(rows), pack(model, "bf16")(rows))


def test_a_model_holds_its_packed_form_and_its_copies_do_not() -> None:
    model: Any = toy("llama").to(torch.bfloat16)
    packed = native_form(model)
    assert packed is not None and model.native.packed is packed
    copied, read = deepcopy(model), pickle.loads(pickle.dumps(model))
    assert copied.native is None and read.native is None and list(copied.state_dict()) == list(model.state_dict())
    assert native_form(copied) is not None and native_form(copied) is not packed
    assert native_form(toy("llama").to(torch.bfloat16)) is not packed


def test_a_model_that_leaves_bfloat16_leaves_native_code() -> None:
    model = toy("llama").to(torch.bfloat16)
    assert native_form(model) is not None
    assert native_form(model.float()) is None and native_form(model.to(torch.bfloat16)) is not None


def test_other_weights_stay_in_pytorch() -> None:
    assert native_form(toy("llama")) is None
    assert native_form(toy("llama").to(torch.bfloat16).to("meta")) is None


def test_bfloat16_weights_that_native_code_lacks_are_told(capfd) -> None:
    model = toy("llama").to(torch.bfloat16)
    model.get_submodule("blocks.0").register_forward_hook(lambda *_: None)
    assert native_form(model) is None
    told = "PyTorch generates, not the native step: blocks.0 has hooks, which native code does not call.\n"
    assert capfd.readouterr().err == told
