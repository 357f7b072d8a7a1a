"""Accuracy of a Whisper that was trained here on unseen voices: its word errors on spoken digits.

python benchmarks/spoken_digits.py [--steps 1000] [--seed 0] [--run FOLDER] [--write docs/results/data/sentences.json]

The recipe of keifu train whisper trains on 2,000 recordings of espeak-ng (synthetic speech). The 300 test recordings
have other voices and other speeds. --run measures an existing run.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from _results import write_table
from _rounds import machine

from keifu import checkpoints
from keifu.data.audio.recordings import DIGITS
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text.transcription import evaluate
from keifu.recipes.running import run_jobs
from keifu.recipes.speech import whisper


def main() -> None:
    """Train and transcribe; print and write the errors and the wrong transcripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a run that is measured, and not trained")
    parser.add_argument("--write", type=Path, help="data file that gets the table")
    options = parser.parse_args()
    run = options.run or Path(tempfile.mkdtemp()) / "run"
    if options.run is None:
        training = replace(whisper.LEARNING, steps=options.steps, seed=options.seed)
        run_jobs(whisper.jobs(whisper.Recipe(training=training)), run)
    model, tokenizer = checkpoints.load(run)
    found = evaluate(model, tokenizer, EvalRequest(on=DIGITS))
    print(machine(), *(f"{name}: {value}" for name, value in found.figures.items()), sep="\n")
    if options.write and found.items:
        figures = found.figures
        low, high = (float(each) for each in str(figures["word error rate, 95% interval"]).split(" to "))
        row = [
            "keifu train whisper", str(figures["words"]), f"{figures['word error rate']:.1%}",
            f"{100 * low:.1f} to {100 * high:.1f}%", f"{figures['recordings without an error']:.1%}",
        ]  # fmt: skip
        columns = ["", "words", "word error rate", "95% interval", "recordings without an error"]
        keys = ("voice", "said", "written")
        wrong = {name: dict(zip(keys, each, strict=True)) for name, *each, count in found.items.rows if count}
        how = "--run runs/whisper" if options.run else f"--steps {options.steps} --seed {options.seed}"
        command = f"python benchmarks/spoken_digits.py {how}"
        write_table(options.write, "Learning to hear", command, columns, [row], {"with errors": wrong})


if __name__ == "__main__":
    main()
