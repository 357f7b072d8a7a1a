"""A batch that several ranks share: the sums, gradients and weights are those of one rank."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from training_toys import Sequences, objective, settings, toy

from keifu import processes as ranks
from keifu.errors import UserError
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models import bert, llama
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.diffusion import ddpm
from keifu.processes import Processes
from keifu.training.objectives.contrastive import contrastive_loss
from keifu.training.objectives.diffusion import DiffusionLoss, draw_noise
from keifu.training.objectives.language_modeling import causal_language_modeling, masked_language_modeling
from keifu.training.protocols import Batch, LossOutput
from keifu.training.trainer import Trainer


class Threads:
    """torch.distributed's exchanges between threads of this process, one for each rank."""

    ReduceOp = distributed.ReduceOp

    def __init__(self, world: int):
        self.world = world
        self.barrier = threading.Barrier(world, timeout=300)
        self.given: list[Any] = [None] * world
        self.rank = threading.local()

    def exchanged(self, tensor: Tensor) -> list[Tensor]:
        self.given[self.rank.value] = tensor.clone()
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def all_reduce(self, tensor: Tensor, operation: Any, group: None) -> None:
        assert operation == distributed.ReduceOp.MAX
        tensor.copy_(torch.stack(self.exchanged(tensor)).amax(0))

    def all_to_all_single(self, found: Tensor, tensor: Tensor, group: None) -> None:
        parts = [other.view(self.world, -1)[self.rank.value] for other in self.exchanged(tensor)]
        found.copy_(torch.cat(parts))

    def all_gather(self, found: list[Tensor], tensor: Tensor, group: None) -> None:
        for place, other in zip(found, self.exchanged(tensor), strict=True):
            place.copy_(other)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Run the work on every rank and return the results."""
        results: list[Any] = [None] * self.world

        def on(rank: int) -> None:
            self.rank.value = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


def weighted(model: nn.Module, batch: Batch) -> LossOutput:
    """Return a loss whose rows have different weights: in each row the first `lengths` tokens count."""
    tokens = batch["tokens"]
    counts = torch.arange(5) < batch["lengths"][:, None]
    targets = tokens[:, 1:].masked_fill(~counts, -100)
    total = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum")
    return LossOutput(total, counts.sum(), {"counted": counts.sum()})


SMALL = {"vocab_size": 31, "context_length": 16, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}


def clip_model() -> nn.Module:
    text = clip_text.Config(31, 8, 32, 48, 1, 4, end_id=30, embedding_dim=16)
    return clip.build(clip.Config(text, clip_image.Config(12, 4, 3, 32, 48, 1, 4, embedding_dim=16)))


def pairs(rows: int) -> Batch:
    tokens = torch.cat([torch.randint(0, 30, (rows, 6)), torch.full((rows, 1), 30)], 1)
    return {"pictures": torch.randint(0, 256, (rows, 3, 12, 12)).byte(), "tokens": tokens}


def masked_tokens(rows: int) -> Batch:
    return {
        "tokens": torch.randint(1, 31, (rows, 13)), "targets": torch.randint(1, 31, (rows, 3)),
        "places": torch.arange(1, 10, 3).expand(rows, 3), "mask": torch.ones(rows, 13, dtype=torch.bool),
        "segments": (torch.arange(13) > 6).long().expand(rows, 13), "random_next": torch.randint(0, 2, (rows,)),
        "word_weight": torch.full((rows,), 13 / 3), "pair_weight": torch.full((rows,), 13.0),
    }  # fmt: skip


def pictures(rows: int) -> Batch:
    return {"pictures": torch.randint(0, 256, (rows, 1, 8, 8)).byte(), "draws": draw_noise(0, 0, rows)}


UNET = ddpm.Config(size=8, channels=1, dim=16, n_residual_blocks=1, multipliers=(1, 2), norm_groups=4, dropout=0.1)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[int], Batch]]] = {
    "gpt": (
        lambda: llama.build(llama.Config(**SMALL, n_kv_heads=2, tied=True)), causal_language_modeling,
        lambda rows: {"tokens": torch.randint(0, 31, (rows, 13))},
    ),
    "bert": (lambda: bert.build(bert.Config(**SMALL, dropout=0.1)), masked_language_modeling, masked_tokens),
    "unet": (lambda: ddpm.build(UNET), DiffusionLoss(Noise()), pictures),
    "clip": (clip_model, contrastive_loss(lambda pixels: pixels / 127.5 - 1), pairs),
}  # fmt: skip


def made(name: str, rows: int) -> tuple[nn.Module, Any, Batch]:
    build, aim, data = CASES[name]
    torch.manual_seed(0)
    return build().train(), aim, data(rows)


def trained(trainer: Trainer, batch: Batch, steps: int = 3) -> list[float]:
    """Train some steps. Return the loss and the gradient norm of each, and the validation loss."""
    found: list[float] = []
    for step in range(steps):
        gradient = trainer.gradient(step, batch)
        assert gradient is not None
        found += [gradient.sums.means()["loss"], float(gradient.norm)]
        trainer.update(gradient)
    return [*found, trainer.validation([batch])["loss"]]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16])
def test_every_row_is_of_one_rank_in_as_many_parts_as_the_others(world: int, rows: int) -> None:
    for total in range(world, 12):
        parts = [Processes(rank, world).micro_batches({"x": torch.arange(total)}, rows) for rank in range(world)]
        assert len({len(each) for each in parts}) == 1
        flat = [part for each in parts for part in each]
        assert torch.cat([part.batch["x"] for part in flat]).tolist() == list(range(total))
        assert all(part.first == part.batch["x"][0] for part in flat)
        assert max(len(part.batch["x"]) for part in flat) <= rows + (world > 1)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_weighted_losses_and_their_gradients_are_those_of_one_rank(
    world: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with no weight at all on one rank, dropout, and clipping by the norm of the whole gradient."""
    batch = Sequences(rows=7).batch(0) | {"lengths": torch.tensor([5, 1, 3, 5, 2, 0, 0])}
    chosen = settings(batch_size=7, micro_batch=micro_batch, clip=0.05)
    alone = toy()
    expected = Trainer(alone, weighted, chosen).gradient(3, batch)
    threads = Threads(world)
    monkeypatch.setattr(ranks, "distributed", threads)
    models = [toy() for _ in range(world)]
    trainers = [Trainer(model, weighted, chosen, processes=Processes(rank, world)) for rank, model in enumerate(models)]
    found = threads.run(lambda rank: trainers[rank].gradient(3, batch))
    assert expected is not None
    for gradient, model in zip(found, models, strict=True):
        assert gradient.sums.means() == pytest.approx(expected.sums.means(), rel=1e-6)
        assert gradient.sums["weight"] == 16 and float(gradient.norm) == pytest.approx(float(expected.norm), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, alone.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_ranks_learn_what_one_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows for three ranks; and a validation of fewer rows than there are ranks."""
    model, aim, batch = made(name, 5)
    chosen = settings(batch_size=5, micro_batch=1, steps=3)
    small = {key: tensor[:2] for key, tensor in batch.items()}
    trainer = Trainer(model, aim, chosen)
    expected = trained(trainer, batch, 2)
    validated = trainer.validation([batch, small])
    threads = Threads(3)
    monkeypatch.setattr(ranks, "distributed", threads)
    trainers = [Trainer(made(name, 5)[0], aim, chosen, processes=Processes(rank, 3)) for rank in range(3)]
    found = threads.run(lambda rank: (trained(trainers[rank], batch, 2), trainers[rank].validation([batch, small])))
    for result, last in found:
        assert result == pytest.approx(expected, rel=1e-4) and last == pytest.approx(validated, rel=1e-4)


def test_a_batch_smaller_than_the_ranks_is_refused() -> None:
    trainer = Trainer(toy(), objective, settings(), processes=Processes(1, 7))
    with pytest.raises(UserError, match="The batch of step 2 has 6 rows for 7 processes"):
        trainer.gradient(2, Sequences().batch(0))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_gradients_are_added_in_the_order_of_the_ranks(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, for tensors that fill no exchange evenly, of two types, in several exchanges."""
    threads = Threads(world)
    monkeypatch.setattr(ranks, "distributed", threads)
    monkeypatch.setattr(ranks, "BUCKET", 20)
    shapes = [(3, 7), (5,), (1,), (2, 2, 3)]
    given = [[torch.randn(shape, dtype=torch.float64 if len(shape) == 1 else torch.float32) for shape in shapes]
             for _ in range(world)]  # fmt: skip
    copies = [[tensor.clone() for tensor in each] for each in given]
    expected = [sum(parts[1:], start=parts[0]) for parts in zip(*copies, strict=True)]
    threads.run(lambda rank: ranks.sum_in_order(given[rank], world))
    for each in given:
        assert all(torch.equal(one, other) for one, other in zip(each, expected, strict=True))


def test_a_weight_that_no_rank_uses_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight decay would change it otherwise; one that a single rank uses has that rank's."""
    threads = Threads(2)
    monkeypatch.setattr(ranks, "distributed", threads)
    given = [{name: nn.Parameter(torch.ones(3)) for name in ("unused", "one", "both")} for _ in range(2)]
    given[0]["one"].grad = torch.ones(3)
    for each in given:
        each["both"].grad = torch.ones(3)
    threads.run(lambda rank: Processes(rank, 2).sum_gradients(given[rank]))
    for each in given:
        assert each["unused"].grad is None
        assert torch.equal(each["one"].grad, torch.ones(3)) and torch.equal(each["both"].grad, torch.full((3,), 2.0))
