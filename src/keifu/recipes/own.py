"""`keifu.train`: trains a user's model, with any module, loss and data."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from keifu import checkpoints
from keifu.data.epochs import IndexedExamples, OwnBatches
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.recipes.runs import Batch, Data, Objective, Run, Sample, Settings, Summary
from keifu.training.job import parameters
from keifu.training.loop import train as run_loop
from keifu.training.protocols import LossOutput

Loss = Callable[[nn.Module, Batch], Tensor | LossOutput]


def train(
    model: nn.Module,
    objective: Loss,
    data: Data | Mapping[str, Tensor] | IndexedExamples,
    settings: Settings = Settings(),  # noqa: B008 (it is frozen)
    out: str | Path = "runs/own",
    *,
    tokenizer: Tokenizer | None = None,
    sample: Sample | None = None,
    title: str | None = None,
    options: Mapping[str, Any] | None = None,
    unit: str = "rows",
    resume: bool = False,
    replace: bool = False,
) -> Summary:
    """Train a model of your own, on the device of its parameters, and write a run's folder (docs/python.md).

    Args:
        objective: Function of the model and a batch: the mean loss over the rows, or a `LossOutput` of sums.
        data: Tensors by name, a data set (a tenth of either is held out), or an object with batches.
        options: Other values that decide the result; they are compared on resuming.

    Examples:
        >>> import tempfile, torch, keifu
        >>> data = {"x": torch.eye(3).repeat(70, 1), "y": torch.arange(3.0).repeat(70)}
        >>> def loss(model, batch): return torch.nn.functional.mse_loss(model(batch["x"]).squeeze(-1), batch["y"])
        >>> keifu.train(torch.nn.Linear(3, 1), loss, data, keifu.Settings(steps=200), tempfile.mkdtemp()).steps
        200
    """
    deciding = {"model": repr(model), **(options or {})}
    about = {"title": title or type(model).__name__, "parameters": parameters(model)}
    run = Run(Path(out), resume, replace, deciding, about, unit)
    batches = data if isinstance(data, Data) else OwnBatches(data, settings.batch_size, settings.seed)
    save = partial(checkpoints.save, model, tokenizer)
    return run_loop(model, _summed(objective), batches, settings, run, sample, save)


def _summed(objective: Loss) -> Objective:
    """Convert the objective to the loop's form: a mean over rows becomes a sum and a count."""

    def summed(model: nn.Module, batch: Batch) -> LossOutput:
        loss = objective(model, batch)
        if isinstance(loss, LossOutput):
            return loss
        if not isinstance(loss, Tensor) or loss.dim():
            seen = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"The objective gave {seen}; it must give the mean loss as one number, or a LossOutput.")
        rows = len(next(iter(batch.values())))
        return LossOutput(loss * rows, rows)

    return summed
