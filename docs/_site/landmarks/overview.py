"""Picture of the whole lineage: the landmarks of lineage.json in order of years, with arrows from parent to child."""
# ruff: noqa: E501

import json
import os
import re
from pathlib import Path

from landmarks.drawing import Drawing

ROWS = Path(__file__).parents[2] / "lineage/lineage.json"
LEFT, ACROSS, DOWN, WIDE = 74, 79, 40, 78
SHORT = {
    "perceptron": ("Perceptron", "パーセプトロン"), "mlp": ("MLP", "MLP"), "lstm": ("LSTM", "LSTM"), "word2vec": ("Word2vec", "Word2vec"), "ngram": ("N-grams", "n-gram"), "seq2seq": ("Attention", "注意機構"), "latent_diffusion": ("Latent diff.", "潜在拡散"),
    "transformer": ("Transformer", "Transformer"), "unclip": ("unCLIP", "unCLIP"), "instructgpt": ("InstructGPT", "InstructGPT"), "mixture": ("MoE", "MoE"),
"vae": ("VAE", "VAE"), "gan": ("GAN", "GAN"), "vq": ("VQ-VAE", "VQ-VAE"), "rag": ("RAG", "RAG"), "score": ("Scores, SDE", "スコア、SDE"), "vit": ("ViT", "ViT"), "dit": ("DiT", "DiT"), "chinchilla": ("Chinchilla", "Chinchilla"), "dpo": ("DPO", "DPO"), "gated_delta": ("DeltaNet", "DeltaNet"), "deepseek_v3": ("DeepSeek-V3", "DeepSeek-V3"), "long_context": ("Long context", "長い文脈"), "gpt_oss": ("gpt-oss", "gpt-oss"), "deepseek_r1": ("R1, GRPO", "R1、GRPO"),
}  # fmt: skip


def lineage(drawing: Drawing) -> None:
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    areas, year = {}, None
    for index, row in enumerate(rows):
        y = 12 + index * DOWN
        if row["year"] != year:
            year = row["year"]
            drawing.note(3, y + 19, str(year), "start")
        label = SHORT.get(row["name"], (row["title"], row["title_ja"]))
        areas[row["name"]] = drawing.box(LEFT + row["lane"] * ACROSS, y, "", tone=TONES[row["lane"]], width=WIDE)
        drawing.write(areas[row["name"]].x, y + 19, label, "remark", WIDE)
        for parent in row["from"]:
            start = areas[parent]
            end = areas[row["name"]]
            shift = 0 if start.x == end.x else (8 if start.x > end.x else -8)
            bend = end.top[1] - 6
            drawing.line(
                (start.x - shift, start.bottom[1]),
                (start.x - shift, bend),
                (end.x + shift, bend),
                (end.x + shift, end.top[1]),
            )


TONES = ("norm", "layer", "attention", "goal")


PICTURE = re.compile(r'<img [^>]*?alt="([^"]*)"[^>]*?src="[^"]*diagrams/(lineage(?:\.ja)?\.svg)"[^>]*>')
BOX = re.compile(r'<rect class="(?!paper)[^>]*/><text class="remark"[^>]*>[^<]*</text>')
PICTURES = Path(__file__).parents[2] / "pictures/diagrams"


def linked(html: str, address: str) -> str:
    """Return a page of the site with the drawing of the lineage in it, each box a link to its landmark's page.

    The drawing's own style is left out, because it would hold for the whole page; assets/style.css has it.
    """
    folder = "ja/lineage" if address.startswith("ja/") else "lineage"
    up = os.path.relpath(folder, Path(address).parent)

    def inline(found: re.Match[str]) -> str:
        names = iter(row["name"] for row in json.loads(ROWS.read_text(encoding="utf-8")))
        svg = re.sub(r"<style>.*?</style>", "", (PICTURES / found[2]).read_text(encoding="utf-8").strip())
        svg = BOX.sub(lambda box: f'<a href="{up}/{next(names)}.html">{box[0]}</a>', svg)
        return f'<span class="lineage" role="group" aria-label="{found[1]}">{svg}</span>'

    return PICTURE.sub(inline, html)
