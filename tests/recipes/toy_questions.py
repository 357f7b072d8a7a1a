"""A folder of coloured shapes with questions about them."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS, SHAPES = ("red", "blue"), ("round", "square")


def coloured_shapes(folder: Path, count: int, size: int = 12) -> Path:
    """Write `count` pictures, each with a question about its colour and one about its form; the last four are for the
    test."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        colour, shape = COLOURS[number % 2], SHAPES[number // 2 % 2]
        image = Image.new("RGB", (size, size), "white")
        pen, box = ImageDraw.Draw(image), (1, 1, size - 3, size - 3)
        (pen.ellipse if shape == "round" else pen.rectangle)(box, fill=colour)
        image.save(folder / f"{number}.png")
        part = {"part": "test"} if number >= max(3, count - 4) else {}
        for question, answer in (("what color?", colour), ("what shape?", shape)):
            rows.append({"image": f"{number}.png", "question": question, "answer": answer, **part})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
