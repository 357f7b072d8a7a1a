"""`keifu train palm2`: from a mixture to a checkpoint that others load, with figures by source."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import keifu
from keifu import cli
from keifu.data.text.span_corruption import MODES
from keifu.errors import UserError
from keifu.inference.text.fill import infill, split_spans

SMALL = {
    "model.dim": 32, "model.hidden-dim": 48, "model.n-layers": 2, "model.n-heads": 2, "model.head-dim": 16,
    "model.context-length": 32, "vocab-size": 460, "batch-size": 8, "warmup": 1, "precision": "float32",
}  # fmt: skip
NOUNS, COMMANDS = ("cat", "dog", "bird", "fish", "horse"), ("sees", "hears", "likes", "leaves")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three small texts, one of them pairs, and the file that mixes them."""
    folder = tmp_path_factory.mktemp("mixture")
    prose = "".join(f"The {NOUNS[n % 5]} {COMMANDS[n % 4]} the {NOUNS[n * 7 % 5]} in {n} houses. " for n in range(500))
    (folder / "prose.txt").write_text(prose)
    (folder / "sums.txt").write_text("".join(f"{n} + {n + 1} = {2 * n + 1}\n" for n in range(700)))
    (folder / "pairs.tsv").write_text("".join(f"{n} 匹の猫\t{n} cats\n" for n in range(1, 900)))
    (folder / "mix.yaml").write_text(
        "sources:\n  prose: {data: prose.txt, weight: 0.5}\n  sums: {data: sums.txt, weight: 0.3}\n"
        "  both: {data: pairs.tsv, weight: 0.2, languages: [Japanese, English]}\n"
    )
    return folder / "mix.yaml"


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path_factory.getbasetemp() / "palm2-cache"))


def train(mixture: Path, out: Path, *words: str, **changes: object) -> None:
    options = SMALL | {name.replace("_", "-"): value for name, value in changes.items()}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    cli.main(["train", "palm2", "--mixture", str(mixture), "--out", str(out), *flags, *words])


def test_a_run_leaves_a_model_that_transformers_loads_and_figures_by_source(mixture, tmp_path, capsys) -> None:
    train(mixture, tmp_path, "--gaps", "The ___ sees the ___.", "--prompts", "The cat", steps=4)
    said = capsys.readouterr()
    assert "validation loss" in said.err + said.out and "prose/" not in said.err + said.out  # these go to the files
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for line in lines for name, value in line.items()}
    for source in ("prose", "sums", "both"):
        # four steps teach little: a token costs about ln of the vocabulary
        assert last[f"validation_{source}/infilling"] == pytest.approx(math.log(460), rel=0.25)
    report = (tmp_path / "report.html").read_text()
    assert "<td>sums</td>" in report and "bits per byte" in report
    _, sample = sorted((tmp_path / "samples").iterdir())  # before the first step and after the last
    assert sample.read_text().startswith("The ___ sees the ___.\n  = The")
    facts = json.loads((tmp_path / "recipe.json").read_text())["data"]
    assert [row["source"] for row in facts] == ["prose", "sums", "both"] and all(row["epochs"] > 0 for row in facts)

    model, tokenizer = keifu.load(tmp_path)
    assert tokenizer.special["bos_token"] == "[S2S]" and len(tokenizer.encode("2024")) == 4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("The cat 猫")["input_ids"]
    assert ids == tokenizer.encode("The cat 猫", special=True) and ids[0] == tokenizer.token_id("[S2S]")
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-5)

    cli.main(["evaluate", str(tmp_path), "--on", str(tmp_path / "mixture.json"), "--json", "--limit", "32"])
    found = json.loads(capsys.readouterr().out)
    assert [row["source"] for row in found["sources"]] == ["prose", "sums", "both"]
    for row in found["sources"]:  # the same windows as the run's own
        assert row["bits per byte"] == pytest.approx(last[f"validation_{row['source']}/bits_per_byte"], abs=2e-4)
        assert row["infilling"] == pytest.approx(last[f"validation_{row['source']}/infilling"], abs=2e-4)
    mean = sum(row["weight"] * row["bits per byte"] for row in found["sources"])
    assert found["bits per byte, by the weights"] == pytest.approx(mean, abs=2e-4)


def test_a_run_learns(mixture: Path, tmp_path: Path) -> None:
    train(mixture, tmp_path, "--objective", "causal", "--matrix-rate", "0.05", steps=40, log_every=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 5.5 and min(losses[-5:]) < 4.0
    model, tokenizer = keifu.load(tmp_path)
    assert tokenizer.special["bos_token"] == "<|endoftext|>"  # no mode is put before a text
    assert keifu.generate(model, tokenizer, "The cat", max_tokens=3, temperature=0)


def test_gaps_are_filled_where_they_stand(mixture: Path, tmp_path: Path) -> None:
    train(mixture, tmp_path, steps=1)
    model, tokenizer = keifu.load(tmp_path)
    assert {tokenizer.token_id(mode) for mode in MODES} <= tokenizer.special_ids
    found = infill(model, tokenizer, "The ___ sees ___")
    assert re.fullmatch(r"The(.*) sees(.*)", found, re.DOTALL) and "___" not in found
    with pytest.raises(UserError, match="There is no gap"):
        infill(model, tokenizer, "The cat")
    with pytest.raises(UserError, match="There is no token '<extra_id_"):
        infill(model, tokenizer, "The" + " ___" * 101)


def test_what_was_written_is_shared_out_among_the_gaps() -> None:
    sentinels = np.array([50, 51, 52])
    assert split_spans([1, 2, 51, 3, 52], sentinels) == [[1, 2], [3], []]
    assert split_spans([52, 4, 50, 5], sentinels) == [[], [], [4, 5]]  # one out of turn is passed over


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shares", "0.5", "0.5", "0.5"], "whose sum is 1.5"),
        (["--mixture", "multilingul"], "Did you mean 'multilingual'?"),
        (["--model.context-length", "1024", "--sentinels", "50"], "has 50 sentinels"),
        (["--objective", "ul3"], "ul2"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, sentence, mixture: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        train(mixture, tmp_path, *words, steps=1)
    assert sentence in capsys.readouterr().err.splitlines()[-1]
