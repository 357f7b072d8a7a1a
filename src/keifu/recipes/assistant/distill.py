"""Distillation: a student learns all probabilities of a teacher (Hinton et al., 2015; GKD, Agarwal et al., 2023).

Paper: "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes": the divergence is forward or
reverse KL or the generalised Jensen-Shannon divergence, on given answers, on the student's, or on both. The student is
--model. `--student-layers` and `--student-vocabulary` reduce it first: evenly spaced layers and the first merges of the
tokenizer are kept. A teacher with more tokens is reduced to the student's, so that both share ids.
Command: keifu train distill --data summary-instructions --student-layers 7 --student-vocabulary 8000
Cost: printed before it starts, measured on the machine.
Expected: see docs/guides/finetuning.md, "Learn from a larger model".
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from keifu.data.chat import conversations
from keifu.errors import UserError
from keifu.ranges import Count, NotNegative
from keifu.recipes.assistant import finetuning, sft
from keifu.recipes.distilling import DistillAnswers, prune
from keifu.training.job import Jobs, parameters


@dataclass(frozen=True, kw_only=True)
class Recipe(sft.Recipe):
    """Options of the run."""

    model: str = field(default="smollm2", kw_only=False)
    """The student: a run, a directory, a .gguf file, a catalogue name or a hub id; it may be the teacher, to be cut."""
    student_layers: Count | None = None
    """Layers of the student that stay, at even distances, the first and the last always; unset: all."""
    student_vocabulary: Count | None = None
    """Merges of the student's byte-level BPE that stay, with all bytes, special tokens and tokens that the chat
    template writes; unset: all."""
    student_merges: Literal["first", "used"] = "first"
    """Order of the merges. first: that of the tokenizer. used: those first whose tokens the data have most often, which
    changes fewer of the teacher's tokens; the data must be what the student is made for."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate; unset: 3e-4, and 2e-4 for adapters."""
    distill: Annotated[DistillAnswers, tyro.conf.arg(name="")] = field(
        default_factory=lambda: DistillAnswers(teacher="smollm2")
    )
    """Teacher that the student learns from."""

    def rate(self, full: float, adapters: float) -> float:
        """Return the --learning-rate option, or else the default: `full` for all weights, `adapters` for adapters."""
        return super().rate(3e-4, adapters)

    def origin(self) -> dict[str, Any]:
        """Return the values that a resumed run must share."""
        return super().origin() | {
            "layers": self.student_layers, "vocabulary": self.student_vocabulary, "merges": self.student_merges,
        }  # fmt: skip


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training of the student, which keifu chat reads."""
    layers, merges = recipe.student_layers, recipe.student_vocabulary
    if layers is merges is None and recipe.model == recipe.distill.teacher:
        raise UserError(
            f"The student {recipe.model} is its own teacher: give another --model, or cut it with --student-layers or "
            "--student-vocabulary."
        )
    if merges is None and recipe.student_merges != "first":
        raise UserError("--student-merges orders the merges that stay: give --student-vocabulary, or leave it out.")
    if (layers or merges) and recipe.lora.rank:
        raise UserError("Adapters need a saved model: leave out --lora.rank, or --student-layers and -vocabulary.")
    model, tokenizer = finetuning.open_model(recipe.model, recipe.template)
    uses = Counter[int]()
    if merges and recipe.student_merges == "used":
        for chat in conversations.read(recipe.data):
            uses.update(tokenizer.render_turns(chat)[0])
    model, tokenizer = prune(model, tokenizer, layers, merges, uses)
    task = sft.make_task(recipe, model, tokenizer)
    print(f"The student has {parameters(task.model) / 1e6:.1f} M parameters and {tokenizer.vocab_size:,} tokens.")
    title = f"{recipe.model} learns from {recipe.distill.teacher}"
    finetuning.show_folder((yield sft.job_of(recipe, task, title, "Agarwal et al., GKD (2023)")))
