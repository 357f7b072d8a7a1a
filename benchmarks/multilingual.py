"""Pretraining on many languages: translation by examples after a multilingual mixture and after English alone.

python benchmarks/multilingual.py [--steps 6000] [--items 200] [--shots 0 1 3] [--out FOLDER] [--picture PNG]

Two left-to-right models of PaLM's block begin with the same seed and read as many tokens: one the mixture
`multilingual` (14 sources; a fifth of the tokens are pairs of sentences), the other only its English sources, with the
same relative shares. Each has a tokenizer of the same size trained on its text. PaLM 2's report (Anil et al., 2023,
section 1) says that its mixture serves many languages "without causing a drop in English language understanding
performance", so both are also measured on the English sources, in bits per byte.

Then each model reads some pairs of a sentence and its English translation, and one more sentence. The right one of
eight English sentences must be the likeliest. The others are translations of other sentences of similar length; a guess
is right in 12.5%; intervals are Wilson's, 95%. A second score divides each sentence's likelihood by its likelihood
after "English:" alone, which leaves the effect of the question (Brown et al., 2020, section 2.4). No test sentence was
in any training text. With --out an interrupted run is resumed.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from _charts import chart
from _rounds import machine
from torch import nn

from keifu import checkpoints
from keifu.data.text.mixture import Mixture, read_mixture
from keifu.data.text.span_corruption import CausalBatches
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.translation import tatoeba
from keifu.evaluation.intervals import wilson
from keifu.evaluation.text.mixture import losses
from keifu.inference.text.likelihood import ScoredPair, likelihoods
from keifu.models import palm
from keifu.recipes.language.palm2 import LEARNING, PreparedMixture, Recipe, job_of, prepare
from keifu.recipes.running import train_job
from keifu.training.run import checkpoint

LANGUAGES = ("ja", "de", "fr", "es")
CHOICES, CONTEXT = 8, 256
PLAIN, DIVIDED = "likeliest", "likeliest, divided"
BYTES = 39  # maximal bytes of a sentence: an English tokenizer may encode it byte by byte
Pair = tuple[str, str]
Share = tuple[float, float, float]


def mixtures() -> dict[str, Mixture]:
    """Return the whole mixture, and its English part with the same relative weights."""
    whole = read_mixture("multilingual")
    foreign = {name for name, codes in tatoeba.names().items() if codes != ("en",)}
    english = [source for source in whole.sources if source.data not in foreign]
    total = sum(source.weight for source in english)
    parts = tuple(replace(source, weight=source.weight / total) for source in english)
    return {"multilingual": whole, "English alone": replace(whole, name="multilingual, English alone", sources=parts)}


def trained(name: str, found: PreparedMixture, options: argparse.Namespace, out: Path) -> tuple[nn.Module, Tokenizer]:
    """Train the model of a mixture and return it. A run that is already in the folder is resumed."""
    model = palm.Config(
        context_length=CONTEXT, dim=options.dim, hidden_dim=4 * options.dim, n_layers=options.layers,
        n_heads=options.dim // 64, head_dim=64,
    )  # fmt: skip
    training = replace(
        LEARNING, steps=options.steps, batch_size=options.batch, warmup=min(LEARNING.warmup, options.steps // 10),
        seed=options.seed, evaluate_every=max(1, options.steps // 4), sample_every=0, keep=1,
        save_every=max(1, options.steps // 10),
    )  # fmt: skip
    recipe = Recipe(
        mixture="multilingual", objective="causal", vocab_size=options.vocab, model=model, training=training
    )  # fmt: skip
    summary = train_job(job_of(recipe, found), out, bool(checkpoint.steps(out)))
    print(f"{name}: {options.steps:,} steps in {summary.seconds:.0f} s", flush=True)
    read, tokenizer = checkpoints.load(str(out))
    assert tokenizer is not None
    return read, tokenizer


def english(model: nn.Module, found: PreparedMixture, names: Sequence[str], options: argparse.Namespace) -> float:
    """Return the bits per byte on the held-out part of the English sources, weighted by their shares."""
    task = CausalBatches(CONTEXT - 1)
    own = [source for source in found.sources if source.name in names]
    total, sum_of = sum(source.weight for source in own), 0.0
    for source in own:
        loss = losses(model, source.shards, {"all": task}, context=CONTEXT, rows=64, batch_size=options.batch)[
            "all"
        ].loss
        sum_of += source.weight / total * source.shards.bits_per_byte(loss)
    return sum_of


def items(code: str, options: argparse.Namespace) -> list[tuple[list[Pair], str, list[str]]]:
    """Return held-out examples: example pairs, a sentence, and eight English sentences of which the first is its
    translation."""
    held = [row for row in map(tatoeba.sentences_of, tatoeba.rows(0.02)[1]) if {code, "en"} <= row.keys()]
    unlike = {
        row["en"]: (row[code], row["en"]) for row in held if len(row["en"]) <= 40 and len(row[code].encode()) <= BYTES
    }
    pairs = sorted({source: (source, target) for source, target in unlike.values()}.values())
    random.Random(options.seed).shuffle(pairs)
    most = max(options.shots)
    count = min(options.items, len(pairs) - most)
    asked, shown = pairs[:count], pairs[count:]
    made = []
    for number, (source, target) in enumerate(asked):
        near = sorted((other for _, other in pairs if other != target), key=lambda each: abs(len(each) - len(target)))
        examples = [shown[(number * most + place) % len(shown)] for place in range(most)]
        made.append((examples, source, [target, *near[: CHOICES - 1]]))
    return made


def asked(
    model: nn.Module, tokenizer: Tokenizer, code: str, shots: int, options: argparse.Namespace
) -> dict[str, Share]:
    """Return the share of questions answered correctly, with its interval, for each measure."""
    foreign = tatoeba.LANGUAGES[code]
    rows = items(code, options)
    scored, alone = [], tuple(tokenizer.encode("English:"))
    for examples, source, choices in rows:
        text = "".join(f"{foreign}: {a}\nEnglish: {b}\n" for a, b in examples[:shots])
        prompt = tuple(tokenizer.encode(f"{text}{foreign}: {source}\nEnglish:"))
        ids = [tuple(tokenizer.encode(f" {choice}\n")) for choice in choices]
        scored += [ScoredPair(before, each) for before in (prompt, alone) for each in ids]
    sums = torch.tensor([each.total for each in likelihoods(model, scored, options.batch)]).view(len(rows), 2, CHOICES)
    values = {PLAIN: sums[:, 0], DIVIDED: sums[:, 0] - sums[:, 1]}
    right = {name: int((each[:, 0] > each[:, 1:].max(1).values).sum()) for name, each in values.items()}
    return {name: (count / len(rows), *wilson(count, len(rows))) for name, count in right.items()}


def draw(found: dict[str, dict[str, dict[int, dict[str, Share]]]], shots: Sequence[int], path: Path) -> None:
    """Draw a panel for each language: the share of right answers by the second score over the number of examples."""
    with chart(path, (11, 3.4), len(LANGUAGES), legend=None, sharey=True) as panels:
        for axes, code in zip(panels, LANGUAGES, strict=True):
            for name, languages in found.items():
                points = [languages[code][count][DIVIDED] for count in shots]
                errors = [[share - low for share, low, _ in points], [high - share for share, _, high in points]]
                axes.errorbar(range(len(shots)), [p[0] for p in points], yerr=errors, marker="o", capsize=3, label=name)
            axes.axhline(1 / CHOICES, color="grey", linestyle=":", label="a guess")
            axes.set_xticks(range(len(shots)), list(map(str, shots)))
            axes.set(title=f"{tatoeba.LANGUAGES[code]} to English", xlabel="examples", ylim=(0, 0.5))
        panels[0].set_ylabel("right answers of eight choices")
        panels[0].legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"steps": 6000, "batch": 32, "dim": 192, "layers": 4, "vocab": 8192, "items": 200, "seed": 0}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, dict[int, dict[str, Share]]]] = {}
    both = mixtures()
    names = [source.name for source in both["English alone"].sources]
    heads = [f"{tatoeba.LANGUAGES[code]}, {count} examples" for code in LANGUAGES for count in options.shots]
    lines = [f"| | English, bits per byte | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(heads)]
    with tempfile.TemporaryDirectory() as directory:
        for name, mixture in both.items():
            ready = prepare(mixture, options.vocab)
            torch.manual_seed(options.seed)
            model, tokenizer = trained(name, ready, options, (options.out or Path(directory)) / name.split()[0])
            found[name] = {
                code: {n: asked(model, tokenizer, code, n, options) for n in options.shots} for code in LANGUAGES
            }
            bits = english(model, ready, names, options)
            for measure in (PLAIN, DIVIDED):
                shares = [each[measure] for own in found[name].values() for each in own.values()]
                cells = [f"{share:.1%} ({low:.1%} to {high:.1%})" for share, low, high in shares]
                lines.append(f"| {name}, {measure} | {bits:.3f} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    tokens = options.steps * options.batch * CONTEXT
    print(f"\n{machine()}; {tokens / 1e6:.1f} M tokens read by each, seed {options.seed}\n")
    print("\n".join(lines))
    if options.picture:
        draw(found, options.shots, options.picture)


if __name__ == "__main__":
    main()
