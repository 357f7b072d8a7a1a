"""Launches and waits on a GPU, counted on the simulated device: one table of budgets for training and generation.

A change that is fast in a CPU's cache is often slow on a GPU: smaller and more operations, or a number that the host
reads. Each row has the kernels of a layer and of all else, and the waits. A simulated device has one kernel for
attention and for RMSNorm, as CUDA has; what CUDA's libraries add to an operation is not counted.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import simulated_device  # noqa: E402
from simulated_device import LAUNCHED, MEMORIES, READ, RECORD, SENT, Graph, _one_kernel, _Stream, device, simulated  # noqa: E402
from test_on_another_device import CASES, TRANSLATORS  # noqa: E402

from keifu.inference.text import runner, sampler  # noqa: E402
from keifu.inference.text.engine import Engine  # noqa: E402
from keifu.inference.text.paged import graphs  # noqa: E402
from keifu.inference.text.sampler import History, RowSettings  # noqa: E402
from keifu.inference.text.sampling_params import SamplingParams  # noqa: E402
from keifu.inference.text.translation import TranslationParams, search  # noqa: E402
from keifu.layers.losses import (
    cross_entropy as ce,  # noqa: E402
    head,  # noqa: E402
)
from keifu.layers.losses.log_probabilities import token_log_probabilities  # noqa: E402
from keifu.models import gpt2, llama  # noqa: E402
from keifu.models.mixture import mixtral  # noqa: E402
from keifu.training.objectives.language_modeling import causal_language_modeling  # noqa: E402
from keifu.training.protocols import LossOutput  # noqa: E402
from keifu.training.settings import Settings  # noqa: E402
from keifu.training.trainer import Trainer  # noqa: E402

SIZE: dict[str, Any] = {"vocab_size": 257, "context_length": 24, "dim": 8, "hidden_dim": 16, "n_heads": 2}


class Row(NamedTuple):
    """Budget of a micro-batch: kernels of a layer, kernels of all else, waits."""

    build: Callable[[int], nn.Module]
    objective: Any
    layer: int
    rest: int
    waits: int = 0


def gpt(layers: int, **more: Any) -> nn.Module:
    return gpt2.build(gpt2.Config(**{**SIZE, "dropout": 0.0, **more}, n_layers=layers))


def scores(model: Any, batch: dict) -> LossOutput:
    """Return the log-probabilities that PPO, GRPO and DPO learn by."""
    hidden, targets = model.hidden(batch["tokens"][:, :-1]), batch["tokens"][:, 1:].flatten()
    found, _ = token_log_probabilities(hidden.flatten(0, 1), model.head_weight, targets)
    return LossOutput(-found.sum(), len(targets), {})


def small_llama(layers: int) -> nn.Module:
    return llama.build(llama.Config(**SIZE, n_layers=layers))


TABLE = {
    "gpt2": Row(partial(gpt, vocab_size=50_257), causal_language_modeling, 67, 61),  # 865 with 12 layers
    "gpt2 with dropout": Row(partial(gpt, dropout=0.1), causal_language_modeling, 131, 124),
    "llama": Row(small_llama, causal_language_modeling, 67, 65),
    "z-loss": Row(gpt, partial(causal_language_modeling, z_loss=1e-4), 67, 67),
    "log-probabilities": Row(gpt, scores, 67, 53),
}


def micro_batch(row: Row, layers: int, rows: int) -> tuple[int, int]:
    """Return the kernels and the waits of a forward and a backward pass."""
    torch.manual_seed(0)
    with simulated():
        model = row.build(layers).train().to(device())
        settings = Settings(batch_size=rows, micro_batch=rows, precision="bfloat16")
        trainer = Trainer(model, row.objective, settings)
        tokens = torch.randint(257, (rows, 25)).to(device())
        trainer.gradient(0, {"tokens": tokens})  # allocates what later steps reuse
        for counter in (LAUNCHED, READ, SENT):
            counter.clear()
        trainer.dropout.set(0, 0, rows)
        outcome = trainer.forward({"tokens": tokens})
        outcome.total.backward()
        return sum(LAUNCHED.values()), sum(READ.values()) + sum(SENT.values())


@pytest.mark.parametrize("name", TABLE)
def test_a_micro_batch_keeps_its_budget_of_launches_and_waits(name: str) -> None:
    row = TABLE[name]
    one, two = micro_batch(row, 1, 2), micro_batch(row, 2, 2)
    layer = two[0] - one[0]
    found = {"kernels of a layer": layer, "other kernels": one[0] - layer, "waits": one[1]}
    budget = {"kernels of a layer": row.layer, "other kernels": row.rest, "waits": row.waits}
    assert all(found[key] <= budget[key] for key in budget), f"{name}: {found}, and the budget is {budget}"
    assert 12 * layer + found["other kernels"] <= 1_100 or "dropout" in name
    assert micro_batch(row, 1, 5)[0] == one[0], "the number of kernels depends on the rows"


class OneKernel:
    """The kernel of Triton for the loss and its gradient."""

    @staticmethod
    def cross_entropy_(
        logits: Tensor, targets: Tensor, counts: Tensor, smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        def cross_entropy() -> tuple[Tensor, Tensor]:
            loss, nats, gradient = ce._loss_and_gradient(logits, targets, smoothing, z_loss, None)
            logits.copy_(gradient * counts[:, None])
            return loss[:, 0] * counts, nats[:, 0] * counts

        return _one_kernel(cross_entropy)


def test_the_loss_keeps_its_budget_for_each_part_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels of PyTorch and with Triton's, which also needs no probabilities in float32."""
    totals, per_part = list[float](), list[int]()
    for kernels in (None, OneKernel):
        monkeypatch.setattr(ce, "triton_kernels", lambda where, kernels=kernels: kernels)
        launched = []
        for rows in (3, 1):  # at a time
            monkeypatch.setattr(head, "LOGITS_AT_A_TIME", rows * 41)
            with simulated():
                torch.manual_seed(0)
                hidden, weight = (torch.randn(count, 8).to(device()).requires_grad_() for count in (3, 41))
                LAUNCHED.clear()
                total, _ = ce.linear_cross_entropy(hidden, weight, None, torch.tensor([7, -100, 40]).to(device()))
                total.backward()
                launched.append(LAUNCHED.total())
                totals.append(float(total.detach().cpu()))
        per_part.append((launched[1] - launched[0]) // 2)
    assert totals == pytest.approx([totals[0]] * 4) and per_part[0] <= 27 and per_part[1] <= 11, per_part


class Step(NamedTuple):
    """Budget of a step of the engine: kernels of a layer, of all else, copies to the device and from it.

    ahead: whether it is launched before the tokens of the last one are read.
    """

    lengths: tuple[int, ...]
    step: int
    layer: int
    rest: int
    sent: int = 1
    read: int = 1
    ahead: bool = False


STEPS = {  # the first step of the engine reads a prompt, the second one the others, and later ones decode
    "one sequence": Step((20,), 2, 14, 54),
    "16 sequences of different lengths": Step(tuple(range(20, 100, 5)), 3, 14, 54),
    "16 sequences, launched ahead": Step(tuple(range(20, 100, 5)), 3, 14, 55, ahead=True),
    "64 prompts": Step(tuple(range(40, 72)) * 2, 1, 16, 54),  # with the memory that grows for them
}


def engine(
    lengths: tuple[int, ...], layers: int, most: Callable[[int], int] = lambda number: 9, blocks: int = 2000,
    ahead: bool = False, **sampling: Any,
) -> Engine:  # fmt: skip
    """Return an engine on the device with a prompt of each length, whose numbers SmolLM2-135M would have."""
    torch.manual_seed(0)
    config = llama.Config(vocab_size=261, context_length=2048, dim=24, hidden_dim=32, n_layers=layers, n_heads=3,
                          n_kv_heads=1)  # fmt: skip
    model = llama.build(config).bfloat16().eval().to(device())
    steps = runner.TorchRunner(model, blocks)
    steps.overlaps = ahead
    made = Engine(model, None, steps, max_running=64, step_tokens=8192)
    for number, length in enumerate(lengths):
        prompt = [(number + 3 * place + number * place) % 260 for place in range(length)]
        settings = SamplingParams(max_tokens=most(number), temperature=0.8, seed=number, **sampling)
        made.add(made.request(prompt, settings))
    return made


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the device the kernel for sequences of different lengths, as an NVIDIA GPU has it."""
    monkeypatch.setattr(runner, "has_kernel", lambda device: device.type == "sim")
    monkeypatch.setattr(graphs, "capture", Graph.capture)
    monkeypatch.setattr(graphs, "new_memory", object)


def counted(row: Step, layers: int) -> tuple[int, int, int]:
    """Return the kernels of a step and its copies to the device and from it."""
    with simulated():
        made = engine(row.lengths, layers, ahead=row.ahead)
        cast(Any, made.runner).graphs = None
        for _ in range(row.step + 1):
            for counter in (LAUNCHED, READ, SENT):
                counter.clear()
            made.step()
        return sum(LAUNCHED.values()), sum(SENT.values()), sum(READ.values())


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_the_engine_keeps_its_budget(name: str, flash: None) -> None:
    row = STEPS[name]
    (one, sent, read), (two, *_) = counted(row, 1), counted(row, 2)
    layer = two - one
    found = {"kernels of a layer": layer, "other kernels": one - layer, "to it": sent, "from it": read}
    budget = {"kernels of a layer": row.layer, "other kernels": row.rest, "to it": row.sent, "from it": row.read}
    assert all(found[key] <= budget[key] for key in budget), f"{name}: {found}, and the budget is {budget}"
    assert 30 * layer + found["other kernels"] <= 1_200


class Event:
    """An event of CUDA's: the copies before it are there when the host has waited."""

    waits: ClassVar[list[tuple[int, int]]] = []  # which event was waited for, and how many had been recorded by then
    made = 0

    def record(self, stream: Any) -> None:
        Event.made += 1
        self.number, self.end = Event.made, stream.record_event()

    def synchronize(self) -> None:
        Event.waits.append((self.number, Event.made))
        self.end.synchronize()


@pytest.mark.parametrize("kind", ["plain", "graphs", "pinned", "shortlist"])
def test_a_step_is_launched_before_the_tokens_of_the_last_one_are_read(
    kind: str, flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all tokens and figures stay the same. The first token is the prompt's; texts end after 6, 9 and 12."""
    written, launches = [], []
    settings: dict[str, Any] = {"log_probabilities": True}
    if kind == "shortlist":
        settings |= {"top_k": 5, "top_p": 0.9}
        monkeypatch.setattr(sampler, "LARGE", 261)
    if kind == "pinned":
        monkeypatch.setattr(sampler, "copies_later", lambda device: True)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
        monkeypatch.setattr(Event, "waits", [])
        monkeypatch.setattr(Event, "made", 0)
    with simulated():
        for ahead in (False, True):
            made = engine((20, 27, 40), 2, lambda number: 6 + 3 * number, ahead=ahead, **settings)
            steps: Any = made.runner
            steps.graphs = steps.graphs if kind == "graphs" else None
            READ.clear()
            reads, run = list[int](), steps.run
            steps.run = lambda *given, run=run, reads=reads: reads.append(READ.total()) or run(*given)
            pieces = []
            while made.work:
                pieces += made.step()
            launches.append(reads)
            written.append(pieces)
    assert written[0] == written[1] and len(written[0]) == 6 + 9 + 12
    if kind == "pinned":
        plain, later = Event.waits[:12], Event.waits[12:]
        assert plain == [(n, n) for n in range(1, 13)] and len(later) == 12
        assert [recorded - number for number, recorded in later] == [1] * 5 + [0] + [1, 1, 0] * 2
    elif kind != "shortlist":
        assert launches[0] == [*range(12)]
        assert launches[1] == [0, 0, 1, 2, 3, 4, 6, 6, 7, 9, 9, 10]  # the first after an end waits for it
    else:
        assert launches[1] == [0, 0, 1, 2, 3, 4, 6, 6, 7, 9, 9, 10] and launches[0] == [*range(0, 24, 2)]


def test_two_steps_of_decoding_could_be_one_cuda_graph(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the same operations on tensors of the same shapes and places, with the same numbers."""
    monkeypatch.setattr(simulated_device, "RECORDS", True)
    steps = []
    with simulated():
        made = engine((20, 27, 40), 2)
        cast(Any, made.runner).graphs = None
        for _ in range(5):
            RECORD.clear()
            made.step()
            steps.append([*RECORD])
    assert len(steps[3]) > 100 and steps[3] == steps[4]


def test_replayed_steps_write_what_steps_without_a_graph_write(flash: None) -> None:
    """All that changes from step to step is in the memory that a graph reads, which stays where it is."""
    written = []
    with simulated():
        for replays in (False, True):
            made = engine((20, 27, 40, 300, 30), 2, lambda number: 4 + 5 * number)  # from 5 sequences to 1
            steps: Any = made.runner
            steps.graphs = steps.graphs if replays else None
            logits, run, places = list[Tensor](), steps.run, set()
            steps.run = lambda batch, run=run, logits=logits: logits.append(run(batch)) or logits[-1]
            while made.work:
                made.step()
                recorded = cast(Any, steps.graphs).recorded if replays else {}
                places |= {(key, each.numbers.data_ptr(), each.logits.data_ptr()) for key, each in recorded.items()}
            written.append([torch.tensor(each.tolist()) for each in logits])
            buckets = {key for key, *_ in places}
            assert len(places) == len(buckets)
            assert len({logits for *_, logits in places}) == len({key[0] for key in buckets})  # one for each width
    assert len(written[0]) > 20 and all(map(torch.equal, *written))
    assert {key[0] for key in buckets} == {1, 2, 4, 8}


def test_memory_on_a_gpu_is_what_the_scheduler_counts(flash: None) -> None:
    """And one token, where padding is written. Six texts do not fit 32 blocks at once: some are preempted."""
    with simulated():
        made = engine((20, 27, 40, 300, 30, 90), 2, lambda number: 20, blocks=32)
        most = 0
        while made.work:
            made.step()
            pool = cast(Any, made.runner)._pool
            most = max(most, sum(x.nbytes for x in (*pool.keys, *pool.values, pool.states.numbers)))
    counted = made.runner.n_blocks * made.runner.block_size * made.runner.token_bytes
    assert most == counted + made.runner.token_bytes


def test_graphs_share_the_memory_of_their_steps_which_is_reserved(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step gathers the keys and values of one layer at a time; the largest copy fits what was left for it."""
    copies, select = [0], Tensor.index_select

    def counted(x: Tensor, *given: Any) -> Tensor:
        found = select(x, *given)
        copies.append(found.nbytes)
        return found

    with simulated():
        made = engine((20, 27, 40, 300, 30), 2, lambda number: 4 + 5 * number, blocks=64)
        made.runner = runner.runner_of(made.model, memory=2**16, native=False)
        made.scheduler.blocks = runner.blocks_of(made.runner)
        capacities = set()
        monkeypatch.setattr(Tensor, "index_select", counted)
        while made.work:
            made.step()
            capacities.add(cast(Any, made.runner)._pool.capacity)
        assert len(MEMORIES) > len(capacities) >= len({*map(id, MEMORIES)}) > 0
        pool = made.runner.n_blocks * made.runner.block_size
    assert 0 < max(copies) <= cast(Any, made.runner).copied_bytes * pool
    assert pool * (made.runner.token_bytes + cast(Any, made.runner).copied_bytes) <= 2**16


def test_a_layer_that_reads_the_device_keeps_a_step_out_of_graphs(flash: None) -> None:
    sizes = {**SIZE, "dim": 16}
    mixture = mixtral.build(mixtral.Config(**sizes, n_layers=1, n_kv_heads=2, n_experts=3))
    with simulated():
        for model, expected in ((mixture, False), (llama.build(llama.Config(**sizes, n_layers=1)), True)):
            made = runner.TorchRunner(cast(Any, model).bfloat16().to(device()), 6)
            assert made.packs and (made.graphs is not None) == expected


def test_more_texts_than_learned_positions_are_replayed(flash: None) -> None:
    with simulated(), torch.inference_mode():
        made = runner.TorchRunner(cast(Any, gpt(1, dim=16)).bfloat16().eval().to(device()), 40)
        for at in range(3):
            made.run([runner.Span(number, [5], at, [number], 1, []) for number in range(32)])
        assert made.context_length < 32 and cast(Any, made.graphs).recorded


@pytest.mark.parametrize("window", [None, 5])
def test_sequences_in_one_kernel_have_the_logits_of_the_cpu(window: int | None, flash: None) -> None:
    torch.manual_seed(0)
    config = llama.Config(**{**SIZE, "vocab_size": 61, "dim": 32}, n_layers=2, n_kv_heads=1, sliding_window=window)
    model = llama.build(config).bfloat16().eval()
    spans = [[runner.Span(n, [*range(3, 3 + size)], 0, [2 * n, 2 * n + 1], 1, []) for n, size in enumerate((7, 20, 1))]]
    spans.append([runner.Span(n, [9, 4], size, [2 * n, 2 * n + 1], 2, []) for n, size in enumerate((7, 20, 1))])
    with torch.inference_mode():
        here = runner.TorchRunner(model, 6)
        expected = [here.run(each) for each in spans]
    with simulated(), torch.inference_mode():
        there = runner.TorchRunner(model.to(device()), 6)
        assert there.packs
        found = [there.run(each).cpu() for each in spans]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("name", ["seq2seq", "transformer"])
def test_a_step_of_beam_search_waits_twice_at_most(name: str) -> None:
    torch.manual_seed(0)
    waits = []
    with simulated():
        model = TRANSLATORS[name]().eval().to(device())
        for length in (6, 12):
            READ.clear()
            SENT.clear()
            search(model, [[3, 4, 5, 6], [7], [8, 9]], TranslationParams(beam=3, max_tokens=length))
            waits.append(sum(READ.values()) + sum(SENT.values()))
    assert waits[1] - waits[0] <= 2 * 6


SAMPLING = {  # kernels and reads of the choice of a token from 20,000, by settings
    "top-k, top-p and min-p": ({"top_k": 40, "top_p": 0.95, "min_p": 0.05}, 41, 1),
    "top-p": ({"top_p": 0.9}, 41, 1),
    "temperature": ({}, 8, 0),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_the_choice_of_a_token_keeps_its_budget(name: str) -> None:
    """The host asks once whether the likeliest tokens were enough; the number of rows changes nothing."""
    given, kernels, reads = SAMPLING[name]
    for rows in (1, 16):
        with simulated() as read:
            settings = RowSettings([SamplingParams(temperature=0.8, **given)] * rows, device())
            logits = torch.randn(rows, 20_000, generator=torch.Generator().manual_seed(0)).mul(6).to(device())
            u = torch.full((rows,), 0.3, device=device())
            for counter in (LAUNCHED, READ, SENT):
                counter.clear()
            settings.choose(logits, History(None, None), u)
            found = LAUNCHED.total(), read.total() + SENT.total()
        assert found[0] <= kernels and found[1] <= reads, f"{name}: {found}, and the budget is {kernels, reads}"


WAITS = dict.fromkeys(("dpo", "grpo", "ppo"), 1) | {  # where the tokens of answers are; how many tokens an expert has
    "mixtral": 2, "qwen3-moe": 1, "olmoe": 2, "deepseek-v3": 1, "gpt-oss": 2, "qwen3-next": 2,
}  # fmt: skip


QUICK = ("llama", "transformer", "ddpm", "dpo", "clip")  # of which the default run has the bfloat16 ones


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if name in QUICK and kind == "bfloat16" else pytest.mark.slow)
        for name in CASES
        for kind in ("bfloat16", "float16")
    ],
)
def test_an_objective_under_cudas_autocast_does_not_wait(name: str, kind: str) -> None:
    """The loss is that of float32 but for the rounding, though CUDA casts other operations than the CPU."""
    torch.manual_seed(0)
    model, objective, batch = CASES[name]()
    losses = {}
    with simulated():
        model = model.eval().to(device())
        there = {key: tensor.to(device()) for key, tensor in batch.items()}
        for precision in ("float32", kind):
            chosen = Settings(steps=1, batch_size=3, micro_batch=3)
            trainer = Trainer(model, objective, chosen, dtype=getattr(torch, precision))
            READ.clear()
            SENT.clear()
            outcome = trainer.forward(there)
            waits = sum(READ.values()) + sum(SENT.values())
            if precision == kind:
                outcome.total.backward()
            losses[precision] = float(outcome.total.detach().cpu())
    assert losses[kind] == pytest.approx(losses["float32"], rel=0.06, abs=0.02)
    assert waits <= WAITS.get(name, 0), f"{waits} waits: {dict(READ)}, {dict(SENT)}"
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.cpu().isfinite().all()), key
