"""A drawer of stickers: faces in several moods are made by a program, and a small diffusion model learns to draw them.

python examples/projects/sticker_drawer.py --mood happy     # some minutes of training the first time
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

from keifu.cli import main as run

MOODS = ("happy", "sad", "surprised", "sleepy")
COLOURS = ("#ffd34d", "#ff9b85", "#8fd694", "#86b8ff", "#d7a4ff")
SCALE, SIZE = 4, 32  # drawn four times as large, so that edges are smooth


def sticker(mood: str, random: random.Random) -> Image.Image:
    """Draw one face of a mood, with random place, size and colour."""
    side = SIZE * SCALE
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    radius = random.uniform(0.36, 0.46) * side
    x, y = (side / 2 + random.uniform(-0.05, 0.05) * side for _ in range(2))
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=random.choice(COLOURS), outline="#444", width=5)
    eye, mouth = radius * 0.13, radius * 0.45
    for sign in (-1, 1):
        at = x + sign * radius * 0.38, y - radius * 0.22
        if mood == "sleepy":
            draw.line([at[0] - eye * 1.4, at[1], at[0] + eye * 1.4, at[1]], fill="#333", width=6)
        else:
            draw.ellipse([at[0] - eye, at[1] - eye * 1.3, at[0] + eye, at[1] + eye * 1.3], fill="#333")
    low, box = y + radius * 0.15, (x - mouth, x + mouth)
    if mood == "happy":
        draw.arc([box[0], low - mouth * 0.6, box[1], low + mouth * 0.9], 15, 165, fill="#333", width=7)
    elif mood == "sad":
        draw.arc([box[0], low + mouth * 0.3, box[1], low + mouth * 1.7], 200, 340, fill="#333", width=7)
    elif mood == "surprised":
        draw.ellipse([x - mouth * 0.4, low, x + mouth * 0.4, low + mouth], fill="#333")
    else:
        draw.line([x - mouth * 0.6, low + mouth * 0.6, x + mouth * 0.6, low + mouth * 0.6], fill="#333", width=6)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def write(folder: Path, each: int, seed: int = 0) -> None:
    """Write a folder for each mood, as `keifu train ddpm --classes` reads them."""
    chance = random.Random(seed)
    for mood in MOODS:
        (folder / mood).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            sticker(mood, chance).save(folder / mood / f"{number:03}.png")


def main() -> None:
    """Train if nothing is trained yet, then draw a sheet of one mood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mood", choices=MOODS, default="happy")
    parser.add_argument("--count", type=int, default=9)
    parser.add_argument("--steps", type=int, default=800, help="updates of the weights")
    parser.add_argument("--each", type=int, default=200, help="stickers of each mood to learn from")
    parser.add_argument("--out", type=Path, default=Path("runs/stickers"))
    options = parser.parse_args()
    if not (options.out / "recipe.json").exists():
        data = options.out.parent / "sticker-data"
        write(data, options.each)
        size = f"--size {SIZE} --dim 32 --multipliers 1 2 2 --attention 2 --batch-size 16 --steps {options.steps}"
        run(["train", "ddpm", "--data", str(data), "--classes", *size.split(), "--out", str(options.out)])
    sheet = options.out.parent / f"{options.mood}.png"
    drawing = f"--label {options.mood} --guidance 2 --count {options.count} --steps 20 --seed 1 --sampler dpm++-2m"
    run(["draw", str(options.out), *drawing.split(), "-o", str(sheet)])


if __name__ == "__main__":
    main()
