"""What the samples of runs that draw from text show; knows no model."""

from keifu.errors import UserError

PROMPTS = (
    "red heart", "cat face", "green book", "full moon face", "blue apple", "red cat face",
    "赤いハート", "ネコの顔", "緑の本", "ヒマワリ", "青いリンゴ", "緑のハート",
)  # fmt: skip
COLUMNS = 6  # pictures of a row


def check_prompts(prompts: tuple[str, ...]) -> None:
    """Refuses to sample nothing."""
    if not prompts:
        raise UserError("There is no prompt for the samples: give at least one.")
