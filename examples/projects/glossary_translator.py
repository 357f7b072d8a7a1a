"""A Japanese-English translator that keeps to a glossary: a small Transformer learns sentences made from it.

python examples/projects/glossary_translator.py "ポンプから異音がします。"  # minutes, the first time
"""

import argparse
import csv
import random
from pathlib import Path

import keifu
from keifu.cli import main as run
from keifu.inference.text.translation import translate

GLOSSARY = {
    "モーター": "motor", "歯車": "gear", "軸受": "bearing", "弁": "valve", "配管": "piping",
    "圧力計": "pressure gauge", "冷却水": "cooling water", "潤滑油": "lubricating oil", "制御盤": "control panel",
    "非常停止ボタン": "emergency stop button", "検出器": "sensor", "電源": "power supply", "ベルト": "belt",
    "ポンプ": "pump", "フィルター": "filter", "警報": "alarm", "安全カバー": "safety cover", "接続端子": "terminal",
    "油圧シリンダー": "hydraulic cylinder", "搬送装置": "conveyor",
}  # fmt: skip
PATTERNS = [
    ("{}を交換してください。", "Please replace the {}."), ("{}を点検してください。", "Please inspect the {}."),
    ("{}は正常です。", "The {} is in order."), ("{}が故障しました。", "The {} has failed."),
    ("{}の温度が高すぎます。", "The temperature of the {} is too high."),
    ("{}を外さないでください。", "Do not remove the {}."), ("{}はどこにありますか。", "Where is the {}?"),
    ("{}を清掃する前に電源を切ります。", "Switch off the power before you clean the {}."),
    ("毎月{}を点検します。", "The {} is inspected every month."),
    ("{}から異音がします。", "There is an unusual noise from the {}."),
]  # fmt: skip
PAIR_PATTERNS = [
    ("{}と{}を点検してください。", "Please inspect the {} and the {}."),
    ("{}が{}に触れています。", "The {} touches the {}."),
    ("{}を交換してから{}を点検します。", "Replace the {}, then inspect the {}."),
]


def sentences(seed: int = 0) -> list[tuple[str, str]]:
    """Return every term in every pattern, and pairs of terms, in a fixed random order."""
    single = [(ja.format(term), en.format(GLOSSARY[term])) for ja, en in PATTERNS for term in GLOSSARY]
    pairs = [
        (ja.format(a, b), en.format(GLOSSARY[a], GLOSSARY[b]))
        for ja, en in PAIR_PATTERNS
        for a in GLOSSARY
        for b in GLOSSARY
        if a != b
    ]
    found = single + pairs
    random.Random(seed).shuffle(found)
    return found


def write(folder: Path) -> Path:
    """Write the sentences as the table that `keifu train transformer` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("ja", "en"), *sentences()])
    return path


def main() -> None:
    """Train if nothing is trained yet, then translate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="ポンプを交換してから弁を点検します。")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/glossary"))
    options = parser.parse_args()
    if not (options.out / "model.safetensors").exists():
        size = [
            "--model.dim",
            "128",
            "--model.hidden-dim",
            "256",
            "--model.n-layers",
            "2",
            "--model.n-decoder-layers",
            "2",
        ]
        data = ["--data", str(write(options.out.parent / "glossary-data")), "--vocab-size", "500"]
        run(["train", "transformer", *data, *size, "--steps", str(options.steps), "--out", str(options.out)])
    model, tokenizer = keifu.load(options.out)
    print(translate(model, tokenizer, [options.text])[0])


if __name__ == "__main__":
    main()
