"""Draws the diagrams of the pages: `python docs/_site/diagrams.py` writes them to docs/pictures.

The diagrams of the lineage, in landmarks/, go to docs/pictures/diagrams: NAME.svg in English and NAME.ja.svg in Japanese.
"""
# ruff: noqa: E501

from html import escape
from pathlib import Path

from landmarks import language, neurons, overview, pictures, training
from landmarks.drawing import LANGUAGES, Drawing

PICTURES = Path(__file__).parent.parent / "pictures"
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 190, 58, 40, 44, 12
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#123;text-anchor:middle}.small{font-size:11px;fill:#456}"
    "rect{fill:#e6f4f1;stroke:#0b7a6b}path{fill:none;stroke:#345;marker-end:url(#head)}.note{fill:#345;font-size:11px}"
)
HEAD = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" style="fill:#345;stroke:none;marker-end:none"/></marker>'

Box = tuple[int, int, str, str]  # column, row, name, file or remark
Arrow = tuple[str, str, str]  # from, to, what goes along it

LOOP: tuple[list[Box], list[Arrow]] = (
    [
        (0, 0, "data", "batch(step)"), (1, 0, "objective", "sums over elements"), (2, 0, "trainer", "gradients, micro-batches"),
        (2, 1, "optimizer", "one step, rate of the step"), (1, 1, "metrics", "a line a step"), (0, 1, "state", "every save_every steps"),
        (0, 2, "run's folder", "weights, state, report"), (1, 2, "validation, samples", "between two steps"),
    ],
    [
        ("data", "objective", "batch"), ("objective", "trainer", "loss"), ("trainer", "optimizer", ""), ("optimizer", "metrics", "figures"),
        ("metrics", "state", ""), ("state", "run's folder", ""), ("metrics", "validation, samples", ""), ("validation, samples", "run's folder", ""),
    ],
)  # fmt: skip
ENGINE: tuple[list[Box], list[Arrow]] = (
    [
        (0, 0, "request", "tokens, SamplingParams, seed"), (1, 0, "scheduler", "who runs in this step"), (2, 0, "block manager", "blocks of keys and values"),
        (1, 1, "runner", "PyTorch or native"), (2, 1, "model", "logits of the last tokens"), (0, 1, "sampler", "filters, seeded choice"),
        (0, 2, "piece", "token, text, log-probability"),
    ],
    [
        ("request", "scheduler", "add"), ("scheduler", "block manager", ""), ("scheduler", "runner", "spans"), ("runner", "model", ""),
        ("runner", "sampler", "logits"), ("sampler", "piece", ""),
    ],
)  # fmt: skip
CHECKPOINTS: tuple[list[Box], list[Arrow]] = (
    [
        (0, 0, "name or path", "run, directory, .gguf, hub id"), (1, 0, "source", "tensors by name, config"), (2, 0, "registry", "model_type to a file"),
        (2, 1, "from_published", "config.json to Config"), (1, 1, "build", "an empty model"), (0, 1, "plan", "WEIGHT_NAMES, both ways"),
        (0, 2, "report", "missing, extra, misshapen"), (1, 2, "model, tokenizer", "a plain nn.Module"),
    ],
    [
        ("name or path", "source", ""), ("source", "registry", ""), ("registry", "from_published", ""), ("from_published", "build", ""),
        ("build", "plan", ""), ("plan", "report", ""), ("plan", "model, tokenizer", "tensors"),
    ],
)  # fmt: skip


def centre(box: Box) -> tuple[float, float]:
    column, row, *_ = box
    return MARGIN + column * (WIDTH + GAP_X) + WIDTH / 2, MARGIN + row * (HEIGHT + GAP_Y) + HEIGHT / 2


def drawn_box(box: Box) -> str:
    """Return a rectangle with a name and a remark."""
    x, y = centre(box)
    return (
        f'<rect x="{x - WIDTH / 2}" y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{x}" y="{y - 4}">{escape(box[2])}</text><text class="small" x="{x}" y="{y + 15}">{escape(box[3])}</text>'
    )


def drawn_arrow(start: Box, end: Box, label: str) -> str:
    """Return a straight arrow from edge to edge with its label."""
    (x0, y0), (x1, y1) = centre(start), centre(end)
    across = abs(x1 - x0) / WIDTH > abs(y1 - y0) / HEIGHT or y0 == y1
    if across and y0 == y1:
        side = WIDTH / 2 if x1 > x0 else -WIDTH / 2
        x0, x1 = x0 + side, x1 - side
    else:
        side = HEIGHT / 2 if y1 > y0 else -HEIGHT / 2
        y0, y1 = y0 + side, y1 - side
    beside = (
        f'<text class="note" x="{(x0 + x1) / 2 + 22 * (x0 == x1)}" y="{(y0 + y1) / 2 - 6 * (x0 != x1) + 4 * (x0 == x1)}">{escape(label)}</text>'
        if label
        else ""
    )
    return f'<path d="M{x0} {y0}L{x1} {y1}"/>{beside}'


def diagram(boxes: list[Box], arrows: list[Arrow]) -> str:
    """Return the whole picture as SVG."""
    named = {box[2]: box for box in boxes}
    width = 2 * MARGIN + (max(box[0] for box in boxes) + 1) * (WIDTH + GAP_X) - GAP_X
    height = 2 * MARGIN + (max(box[1] for box in boxes) + 1) * (HEIGHT + GAP_Y) - GAP_Y
    drawn = [drawn_arrow(named[start], named[end], label) for start, end, label in arrows] + [
        drawn_box(box) for box in boxes
    ]
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    background = f'<rect width="{width}" height="{height}" style="fill:#fff;stroke:none"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style><defs>{HEAD}</defs>{background}{"".join(drawn)}</svg>\n'


DIAGRAMS = {"inside-loop.svg": LOOP, "inside-engine.svg": ENGINE, "inside-checkpoints.svg": CHECKPOINTS}

LINEAGE = (
    neurons.perceptron, neurons.mlp, neurons.lstm, neurons.seq2seq,
    language.ngram, language.word2vec, language.transformer, language.bert, language.t5, language.rag, language.gpt1, language.gpt2, language.gpt3, language.llama, language.palm, language.palm2, language.mixture, language.lora, language.whisper, language.gated_delta, language.deepseek_v3, language.gpt_oss, language.long_context, language.llada,
    pictures.gan, pictures.vq, pictures.ddpm, pictures.score, pictures.unet, pictures.dalle, pictures.clip, pictures.latent_diffusion, pictures.unclip, pictures.vae, pictures.vit, pictures.dit, pictures.llava,
    training.instructgpt, training.dpo, training.deepseek_r1, training.pathways, training.chinchilla, overview.lineage,
)  # fmt: skip


def lineage_drawings() -> dict[str, Drawing]:
    """Return the diagrams of the lineage by the name of their file, in both languages."""
    drawn = {}
    for draw in LINEAGE:
        for language_name in LANGUAGES:
            name = draw.__name__ + ("" if language_name == "en" else f".{language_name}")
            drawn[f"{name}.svg"] = Drawing(language_name)
            draw(drawn[f"{name}.svg"])
    return drawn


if __name__ == "__main__":
    for name, parts in DIAGRAMS.items():
        (PICTURES / name).write_text(diagram(*parts), encoding="utf-8")
    (PICTURES / "diagrams").mkdir(exist_ok=True)
    for name, drawing in lineage_drawings().items():
        (PICTURES / "diagrams" / name).write_text(drawing.svg(), encoding="utf-8")
        for text in drawing.tight:
            print(f"{name}: no room for {text!r}")
