"""`keifu.train` and `keifu.job`: training of a user's model, with any module, loss and data."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from keifu.data.epochs import IndexedExamples, OwnBatches
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.recipes.running import train_job
from keifu.training.job import Job, RunFacts, parameters
from keifu.training.loop import Summary
from keifu.training.protocols import Batch, Data, LossOutput, Objective, Sample
from keifu.training.settings import Settings

Loss = Callable[[nn.Module, Batch], Tensor | LossOutput]


def job(
    model: nn.Module,
    objective: Loss,
    data: Data | Mapping[str, Tensor] | IndexedExamples,
    settings: Settings = Settings(),  # noqa: B008 (it is frozen)
    *,
    tokenizer: Tokenizer | None = None,
    sample: Sample | None = None,
    title: str | None = None,
    options: Mapping[str, Any] | None = None,
    unit: str = "rows",
) -> Job:
    """Return the training of a model of your own, on the device of its parameters, as a recipe yields it
    (docs/python.md). The arguments are those of `train`."""
    return Job(
        model=model, objective=_summed(objective), settings=settings, tokenizer=tokenizer, sample=sample,
        data=data if isinstance(data, Data) else OwnBatches(data, settings.batch_size, settings.seed),
        facts=RunFacts(
            title=title or type(model).__name__, about={"parameters": parameters(model)},
            options={"model": repr(model), **(options or {})}, unit=unit,
        ),
    )  # fmt: skip


def train(
    model: nn.Module,
    objective: Loss,
    data: Data | Mapping[str, Tensor] | IndexedExamples,
    settings: Settings = Settings(),  # noqa: B008 (it is frozen)
    out: str | Path = "runs/own",
    *,
    resume: bool = False,
    replace: bool = False,
    **description: Any,
) -> Summary:
    """Train a model of your own, on the device of its parameters, and write a run's folder (docs/python.md).

    Args:
        objective: Function of the model and a batch: the mean loss over the rows, or a `LossOutput` of sums.
        data: Tensors by name, a data set (a tenth of either is held out), or an object with batches.
        description: tokenizer, sample, title, options and unit, as for `job`. options: other values that decide the
            result; they are compared on resuming.

    Examples:
        >>> import tempfile, torch, keifu
        >>> data = {"x": torch.eye(3).repeat(70, 1), "y": torch.arange(3.0).repeat(70)}
        >>> def loss(model, batch): return torch.nn.functional.mse_loss(model(batch["x"]).squeeze(-1), batch["y"])
        >>> keifu.train(torch.nn.Linear(3, 1), loss, data, keifu.Settings(steps=200), tempfile.mkdtemp()).steps
        200
    """
    return train_job(job(model, objective, data, settings, **description), Path(out), resume, replace)


def _summed(objective: Loss) -> Objective:
    """Convert the objective to the loop's form: a mean over rows becomes a sum and a count."""

    def summed(model: nn.Module, batch: Batch) -> LossOutput:
        loss = objective(model, batch)
        if isinstance(loss, LossOutput):
            return loss
        if not isinstance(loss, Tensor) or loss.dim():
            description = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"The objective gave {description}; it must give the mean loss as one number, or a LossOutput."
            )
        rows = len(next(iter(batch.values())))
        return LossOutput(loss * rows, rows)

    return summed
