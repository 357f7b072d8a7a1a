"""On a real GPU, CUDA's, ROCm's or Apple's: `make test-gpu`. Parity with the CPU, a run, texts, pictures, memory."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "training")]

from test_on_another_device import CASES, CPU, DRAWERS, SMALL, gradients  # noqa: E402
from training_toys import Sequences, objective, run, settings, toy  # noqa: E402

from keifu import (
    checkpoints,
    devices,  # noqa: E402
)
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer  # noqa: E402
from keifu.inference.images.pixel_diffusion import (
    ImageRequest,
    PixelPipeline,  # noqa: E402
)
from keifu.inference.text.engine import Engine  # noqa: E402
from keifu.inference.text.generate import generate_batch  # noqa: E402
from keifu.inference.text.request import Piece  # noqa: E402
from keifu.inference.text.runner import Span, TorchRunner  # noqa: E402
from keifu.inference.text.sampling_params import SamplingParams  # noqa: E402
from keifu.layers.counter_rng import (
    normal,
    uniform,  # noqa: E402
)
from keifu.layers.quantized import FORMATS, QuantizedLinear, unpack  # noqa: E402
from keifu.models import llama  # noqa: E402
from keifu.training.hardware import cost, flops
from keifu.training.loop import train  # noqa: E402
from keifu.training.objectives.language_modeling import causal_language_modeling  # noqa: E402
from keifu.training.run import checkpoint  # noqa: E402
from keifu.training.settings import Settings  # noqa: E402
from keifu.training.trainer import Trainer  # noqa: E402

GPU = devices.available()[0]
pytestmark = pytest.mark.gpu
if GPU == "cpu":
    pytest.skip("there is no GPU here: nothing was checked on one", allow_module_level=True)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model, aim, batch = CASES[name]()
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    means, expected = gradients(model.train(), aim, batch, CPU)
    model.load_state_dict(kept)
    model.zero_grad()
    found, named = gradients(model.to(GPU).train(), aim, batch, torch.device(GPU))
    assert found == pytest.approx(means, rel=2e-3, abs=1e-3) and named.keys() == expected.keys()
    for key in named:
        torch.testing.assert_close(named[key], expected[key], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "auto", "float16"])
def test_a_run_learns_resumes_and_says_where_it_was(tmp_path: Path, precision: str) -> None:
    chosen = settings(precision=precision, keep=9)
    for where in ("whole", "cut"):
        train(toy().to(GPU), objective, Sequences(), chosen, run(tmp_path / where))
    for step in (9, 12):
        checkpoint.remove(tmp_path / "cut", step)
    train(toy().to(GPU), objective, Sequences(), chosen, run(tmp_path / "cut", resume=True))
    one, other = (checkpoint.latest(tmp_path / where)[0].tensors for where in ("whole", "cut"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)
    recipe = json.loads((tmp_path / "whole" / "recipe.json").read_text())
    assert recipe["resolved"]["device"] == devices.device_name(next(toy().to(GPU).parameters()).device)


def test_random_numbers_are_those_of_the_cpu() -> None:
    seeds = torch.arange(-500, 500) * 2**33
    torch.testing.assert_close(normal(seeds.to(GPU), (7,)).cpu(), normal(seeds, (7,)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(uniform(seeds.to(GPU), seeds.to(GPU)).cpu().double(), uniform(seeds, seeds), rtol=1e-6,
                               atol=1e-7)  # fmt: skip


def test_texts_and_pictures_are_those_of_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama.build(llama.Config(**{**SMALL, "vocab_size": 261, "context_length": 48})).eval()
    tokenizer = Tokenizer(train_tokenizer("bpe", ["ab"], 260, special_tokens=["<|pad|>"]).backend, {})
    wanted = [
        SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=1),
        SamplingParams(max_tokens=5, temperature=0, seed=2),
    ]
    expected = generate_batch(model, tokenizer, [[5, 6, 7], [8]], wanted)
    checkpoints.save(model, tokenizer, tmp_path)
    there, _ = checkpoints.load(tmp_path, device=GPU)
    found = generate_batch(there, tokenizer, [[5, 6, 7], [8]], wanted)
    assert [text.tokens for text in found] == [text.tokens for text in expected]
    network = DRAWERS["ddpm"]().eval()
    picture = PixelPipeline(network).draw(ImageRequest(steps=5), [1, 2])
    assert (PixelPipeline(network.to(GPU)).draw(ImageRequest(steps=5), [1, 2]).int() - picture.int()).abs().max() <= 2


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_matrix_in_blocks_multiplies_as_the_unpacked_one(kind: str, tokens: int) -> None:
    """By PyTorch's operations, or Triton's kernels."""
    numbers, size, _ = FORMATS[kind]
    stored = torch.randint(256, (64 * 512 // numbers, size)).to(torch.uint8) & 0x3F  # so that scales are finite
    layer, x = QuantizedLinear(torch.nn.Linear(512, 64), [(kind, stored)]).to(GPU), torch.randn(tokens, 512)
    expected = x @ unpack(stored, kind).view(64, 512).T + layer.layer.bias.cpu()
    assert torch.equal(layer.unpacked(torch.bfloat16).cpu(), unpack(stored, kind, torch.bfloat16).view(64, 512))
    found = layer(x.to(GPU)).detach().cpu()
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.skipif(not GPU.startswith("cuda"), reason="only CUDA counts the most memory that was taken")
def test_the_memory_that_is_promised_is_that_which_is_taken() -> None:
    model = llama.build(llama.Config(1000, 256, 256, 512, 4, 4)).to(GPU)
    batch = {"tokens": torch.randint(0, 1000, (16, 257), device=GPU)}
    trainer = Trainer(model, causal_language_modeling, Settings(steps=1, precision="bfloat16"))
    promised = cost.estimate(trainer, batch, 16).total_bytes
    torch.cuda.reset_peak_memory_stats()
    cost.backward(trainer, batch)
    trainer.optimizers.step(0)
    assert 0.6 < torch.cuda.max_memory_allocated() / promised < 1.4


def test_the_peak_is_known_or_measured() -> None:
    assert 1e11 < flops.peak(torch.device(GPU), torch.float16) < 1e16


@pytest.fixture
def steps() -> tuple[TorchRunner, list[Span]]:
    """Return a runner on the GPU that has read three prompts, and the step after them."""
    if not GPU.startswith("cuda"):
        pytest.skip("only CUDA has graphs")
    torch.manual_seed(0)
    model = llama.build(llama.Config(1000, 256, 256, 512, 4, 4, 2)).bfloat16().eval().to(GPU)
    runner = TorchRunner(model, 40)
    if not runner.packs or runner.graphs is None:
        pytest.skip("this GPU, or this PyTorch, has no kernel for sequences of any lengths")
    lengths = (5, 40, 130)
    blocks = [[*range(10 * number, 10 * number + 10)] for number in range(3)]
    with torch.inference_mode():
        prompts = [Span(n, [*range(3, 3 + size)], 0, blocks[n], 1) for n, size in enumerate(lengths)]
        runner.run(prompts)
    return runner, [Span(n, [9 + n], size, blocks[n], 1) for n, size in enumerate(lengths)]


def test_a_replayed_step_has_the_bits_of_one_without_a_graph(steps: tuple[TorchRunner, list[Span]]) -> None:
    runner, batch = steps
    assert runner.graphs is not None
    with torch.inference_mode():
        plain, recorded, again = (runner.run(batch).clone() for _ in range(3))
    assert len(runner.graphs.recorded) == 1
    assert torch.equal(plain, recorded) and torch.equal(recorded, again)


def test_a_replayed_step_waits_for_nothing(steps: tuple[TorchRunner, list[Span]]) -> None:
    runner, batch = steps
    with torch.inference_mode():
        for _ in range(2):
            runner.run(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            runner.run(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_launched_while_the_last_one_runs(steps: tuple[TorchRunner, list[Span]]) -> None:
    """With the tokens and figures of the other order, and without a wait for more than the tokens that are read."""
    model, written = steps[0].model, list[list[Piece]]()
    for overlaps in (False, True):
        runner = TorchRunner(model, 40)
        runner.overlaps = overlaps
        engine, pieces = Engine(cast(Any, model), None, runner), list[Piece]()
        for number in range(3):
            asked = SamplingParams(max_tokens=12, temperature=0.8, seed=number, log_probabilities=True)
            engine.add(engine.request([3 + number, 9], asked))
        while engine.work:
            settled = overlaps and 9 < len(pieces) < 27  # the graph is there, and no text ends
            torch.cuda.set_sync_debug_mode("error" if settled else "default")
            try:
                pieces += engine.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        written.append(pieces)
    assert written[0] == written[1] and len(written[0]) == 36


def test_a_step_of_decoding_has_at_most_14_kernels_in_a_layer(steps: tuple[TorchRunner, list[Span]]) -> None:
    """PyTorch's kernel of attention clears two numbers, which is counted here and not on the simulated device."""
    runner, batch = steps
    runner.graphs = None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode():
        runner.run(batch)
        with torch.profiler.profile(activities=activities) as profile:
            runner.run(batch)
            torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if event.key.startswith("cudaLaunchKernel"))
    assert launches <= 4 * (14 + 1) + 60
