"""The best of several pictures of a text, as a CLIP sees them (DALL-E's reranking); knows no model that draws."""

from typing import TYPE_CHECKING

from keifu.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def check(count: int, best_of: int | None, clip: str | None, text: str | None) -> None:
    """Refuses options that do not fit each other, before anything is loaded."""
    if best_of is None:
        if clip:
            raise UserError("--clip ranks pictures for --best-of, which was not given: add it, or leave --clip out.")
        return
    if clip is None:
        raise UserError("--best-of needs a CLIP that ranks the pictures: name one with --clip.")
    if text is None:
        raise UserError("--best-of ranks pictures by the text that they were drawn from, and there is none.")
    if best_of < count:
        raise UserError(f"The best of {best_of} pictures cannot be {count}: raise --best-of, or lower --count.")


def best_of(pictures: "Tensor", text: str, clip: str, count: int) -> list[int]:
    """Which of the pictures fit the text best, the best one first."""
    import torch

    from keifu.checkpoints import load
    from keifu.evaluation.clip_score import best, cosines

    towers, tokenizer = load(clip, torch.float32)
    if tokenizer is None:
        raise UserError(f"{clip} has no tokenizer, and the text must be read: give a CLIP that has one.")
    return best(cosines(towers, tokenizer, pictures, [text] * len(pictures)), count)
