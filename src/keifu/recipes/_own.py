"""Training a model of one's own with keifu's loop: any module, any loss, any data; what `keifu.train` is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from keifu import checkpoints
from keifu.data.own_batches import Examples, OwnBatches
from keifu.data.tokenizers import Tokenizer
from keifu.errors import UserError
from keifu.training.loop import Summary
from keifu.training.loop import train as run_loop
from keifu.training.protocols import Batch, Data, Objective, Outcome, Run, Sample
from keifu.training.settings import Settings

Loss = Callable[[nn.Module, Batch], Tensor | Outcome]


def train(
    model: nn.Module,
    objective: Loss,
    data: Data | Mapping[str, Tensor] | Examples,
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
    """Trains a model of your own, on the device where its parameters are, and leaves a run's folder.

    objective: a function of the model and a batch that gives the mean loss over the rows as a scalar, or an `Outcome`
    of sums where something else than rows is counted or further figures are wanted. data: tensors by name whose first
    axis is examples, a data set whose examples are dicts (a tenth of either is held out for validation), or what has
    `fingerprint`, `batch(step)` and `validation()`. settings: steps, batch size, rates, how often what is saved.
    out: the folder with metrics.jsonl, report.html, the saved states and the model (`keifu.load_weights`, or
    `keifu.load` where keifu knows it). sample: from the steps done, a text or a PNG picture. options: what else decides
    the result; it is compared on resuming. unit: what the objective counts.

    Ctrl-C saves and raises `Stopped`; the same call with resume=True goes on, to the same bits as without the pause.
    A folder that holds a run is a `UserError`, unless replace=True starts over. Loss that is not finite, or too little
    memory: a `UserError` after the state is saved.

    >>> import tempfile, torch, keifu
    >>> x = torch.randn(200, 3)
    >>> data = {"x": x, "y": x @ torch.tensor([[1.0], [2.0], [3.0]])}
    >>> def loss(model, batch):
    ...     return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
    >>> settings = keifu.Settings(steps=200, batch_size=32, learning_rate=0.1, weight_decay=0.0)
    >>> summary = keifu.train(torch.nn.Linear(3, 1), loss, data, settings, tempfile.mkdtemp())
    >>> summary.steps, summary.figures["validation_loss"] < 0.01
    (200, True)
    """
    directory = Path(out)
    name = type(model).__name__
    run = Run(
        directory=directory,
        resume=resume,
        replace=replace,
        options={"model": repr(model), **(options or {})},
        about={"title": title or name, "parameters": sum(p.numel() for p in model.parameters())},
        unit=unit,
        how_to_resume=f"the same call of keifu.train with out={str(out)!r} and resume=True",
    )
    batches = data if isinstance(data, Data) else OwnBatches(data, settings.batch_size, settings.seed)

    def save(folder: Path) -> None:
        checkpoints.save(model, tokenizer, folder)

    return run_loop(model, _summed(objective), batches, settings, run, sample, save)


def _summed(objective: Loss) -> Objective:
    """The objective as the loop needs it: a mean over rows as their sum and number."""

    def summed(model: nn.Module, batch: Batch) -> Outcome:
        loss = objective(model, batch)
        if isinstance(loss, Outcome):
            return loss
        if not isinstance(loss, Tensor) or loss.dim():
            seen = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"The objective gave {seen}; it must give the mean loss as one number, or an Outcome.")
        rows = len(next(iter(batch.values())))
        return Outcome(loss * rows, rows)

    return summed
