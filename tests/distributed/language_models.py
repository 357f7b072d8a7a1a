"""Every language model on several processes: its weights after some steps on a mesh, and on one process.

The table of models is the one of `tests/test_learning.py`, so that a new model there is trained here too.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.processes import current
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_learning import LANGUAGE_MODELS  # noqa: E402

STEPS, ROWS = 2, 8


def build(name: str, dropout: float = 0.1) -> nn.Module:
    """Return a toy of the model, with its number of heads of keys and its windows; each has dropout."""
    module, config = LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    return module.build(type(config)(**{**vars(config), "dropout": dropout})).train()


def trained(name: str, micro_batch: int = 2) -> dict[str, Tensor]:
    """Return the weights after some steps on the processes of the current mesh, gathered."""
    torch.set_num_threads(1)
    model = build(name)
    settings = Settings(
        steps=STEPS, warmup=1, batch_size=ROWS, micro_batch=micro_batch, learning_rate=1e-2, weight_decay=0.0,
        epsilon=1e-3, precision="float32", schedule="constant",
    )  # fmt: skip
    trainer = Trainer(model, causal_language_modeling, settings)
    for step in range(STEPS):
        tokens = torch.randint(0, 31, (ROWS, 14), generator=torch.Generator().manual_seed(step))
        gradient = trainer.gradient(step, {"tokens": tokens})
        assert gradient
        trainer.update(gradient)
    names = {name: p for name, p in model.named_parameters()}
    return {name: current().full_tensor(name, p.detach()).clone() for name, p in names.items()}


def every_model(folder: Path, names: Iterable[str] = LANGUAGE_MODELS, micro_batch: int = 2) -> dict[str, Any]:
    """Write the weights of each model that trained on the current mesh. Returns the refusals of the others."""
    folder.mkdir(exist_ok=True)
    refused = {}
    for name in names:
        try:
            weights = trained(name, micro_batch)
        except UserError as error:
            refused[name] = str(error)
            continue
        if current().is_main:
            save_file(weights, folder / f"{name}.safetensors")
    return refused
