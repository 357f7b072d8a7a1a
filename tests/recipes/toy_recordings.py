"""A folder of recordings whose words are tones."""

import json
import math
import random
import wave
from array import array
from pathlib import Path

TONES = {"low": 300, "middle": 900, "high": 2700}  # Hz
RATE = 16_000


def tones(folder: Path, count: int, most: int = 2) -> Path:
    """Write `count` recordings of one to `most` words, by four speakers of other loudness; each third is for the test.

    A word has 0.12 seconds, and 0.04 of silence after it.
    """
    folder.mkdir(parents=True)
    chance, rows = random.Random(0), []
    for number in range(count):
        words = chance.choices(list(TONES), k=chance.randint(1, most))
        sound = array("h")
        for word in words:
            step, loud = 2 * math.pi * TONES[word] / RATE, 3000 * (1 + number % 4)
            sound.extend(int(loud * math.sin(step * place)) for place in range(1920))
            sound.extend([0] * 640)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(sound.tobytes())
        part = {"part": "test"} if number % 3 == 2 else {}
        rows.append({"file_name": f"{number}.wav", "text": " ".join(words), "speaker": f"s{number % 4}", **part})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
