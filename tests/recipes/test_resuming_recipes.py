"""Every recipe: begun with options of its own, stopped again and again and gone on with by the line that it prints."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from quick import others_slow
from safetensors.torch import load_file
from toy_captions import small_clip, small_pipeline

from keifu import cli
from keifu.models.clip import text as clip_text
from keifu.recipes import demo
from keifu.recipes.files import recipes
from keifu.recipes.images import clip, latent_diffusion as latents, lora_image, unclip
from keifu.recipes.running import run_jobs
from keifu.training import loop
from keifu.training.run import checkpoint
from keifu.training.signals import Interrupted, StopRequest

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")

MODEL = "--model.dim 16 --model.hidden-dim 32 --model.n-layers 1 --model.n-heads 2 --model.context-length 16"
LSTM = "--model.dim 16 --model.n-layers 1 --row-length 16"
TEXT = "--data {text} --vocab-size 270"
FINE = "--held-out 0.25 --micro-batch 2"
DRAWN = "--data {drawings} --clip {towers} --prompts {prompt} --batch-size 4 --precision float32 --seed 3"
STEPS = "--steps 5"

# recipe -> options, none of which is the usual one, and the questions whether to stop between two stops
TABLE: dict[str, tuple[str, int]] = {
    "bert": (f"--data {{stories}} --vocab-size 120 {MODEL} --masking.length 16 {STEPS} --warmup 2 --gaps [MASK]", 5),
    "characters": (f"--data {{text}} {STEPS} --seed 2", 5),
    "classifier": ("--data {labels} --model {bert} --epochs 2 --batch-size 8 --cut 9 --weight-decay 0.2", 5),
    "clip": (f"--data {{drawings}} --vocab-size 2800 {STEPS} --batch-size 6 {{clip}} --warmup 2", 5),
    "dalle": (
        f"{DRAWN} --size 24 --codebook-size 11 --vae-widths 8 12 16 --code-dim 6 --dim 16 --hidden-dim 24 --n-layers 3 "
        "--n-heads 2 --kernel 3 --vae-steps 3 --steps 3 --vae-batch 4", 4,
    ),
    "ddpm": ("--data {drawings} --size 8 --dim 8 --multipliers 1 2 --noise-steps 50 --steps 4 --batch-size 3", 4),
    "demo": ("--data {text} --steps 3", 4),
    "dit": (
        "--data {drawings} --size 8 --n-layers 2 --n-heads 2 --head-dim 8 --dropout 0.2 --times logit_normal --steps 4 "
        "--batch-size 3", 4,
    ),
    "dpo": (f"--model {{base}} --data {{preferences}} {FINE} --steps 3 --beta 0.3 --batch-size 2", 4),
    "gan": (
        f"--data {{drawings}} --model.size 8 --model.channels 3 --model.widths 4 6 --model.latent-dim 5 {STEPS} "
        "--batch-size 3 --samples 4", 4,
    ),
    "gpt": (f"{TEXT} --depth 1 --context-length 16 --batch-size 3 {STEPS} --learning-rate 0.002", 5),
    "gpt1": (f"{TEXT} {MODEL} {STEPS} --batch-size 3 --recipe-of paper --model.dropout 0.2", 5),
    "gpt1-finetune": ("--data {labels} --model {gpt1} --epochs 2 --batch-size 8 --lm-weight 0.3 --cut 12", 5),
    "gpt2": (f"{TEXT} --tokenizer bpe {MODEL} {STEPS} --warmup 2 --batch-size 3 --model.dropout 0.2", 5),
    "gpt3": (f"{TEXT} {MODEL} {STEPS} --batch-size 3 --recipe-of paper --model.band 4", 5),
    "grpo": ("--model {base} --steps 3 --prompts 2 --group 2 --max-tokens 4 --sums.count 8 --held-out 0.25", 4),
    "instruct": (
        "--model {base} --sft.data {chats} --reward.data {preferences} --ppo.data {prompts} --sft.steps 2 "
        "--reward.steps 2 --ppo.rollouts 2 --ppo.prompts 4 --ppo.minibatches 2 --ppo.max-tokens 4 --sft.lora.rank 2 "
        "--ppo.held-out 0.25 --reward.held-out 0.25", 3,
    ),
    "latent-diffusion": (
        f"{DRAWN} --size 24 --autoencoder-widths 4 8 --latent-channels 3 --widths 8 16 --attention 1 --heads 2 "
        "--autoencoder-steps 3 --steps 3 --autoencoder-batch 4", 4,
    ),
    "distill": (
        f"--model {{base}} --teacher {{base}} --data {{chats}} {FINE} --steps 3 --batch-size 2 "
        "--student-vocabulary 9 --on-policy 0.5 --max-tokens 3", 4,
    ),
    "llama": (f"{TEXT} --tokenizer bpe {MODEL} {STEPS} --warmup 2 --batch-size 3 --optimizer muon", 5),
    "llada": (f"{TEXT} {MODEL} {STEPS} --warmup 2 --batch-size 3", 5),
    "lora-image": ("--model {pipeline} --data {drawings} --limit 7 --rank 3 --steps 4 --batch-size 3", 4),
    "lstm": (f"{TEXT} --tokenizer bpe {LSTM} {STEPS} --warmup 2 --batch-size 3 --model.dropout 0.2", 5),
    "mlp": ("--data {rows} --steps 5 --hidden 5 --dropout 0.2 --activation tanh", 6),
    "mlp-compare": ("--data {rows} --steps 5 --activations relu tanh --losses cross_entropy --hidden 4", 6),
    "olmo2": (f"{TEXT} {MODEL} {STEPS} --warmup 2 --batch-size 3 --z-loss 0.01", 5),
    "palm": (f"{TEXT} {MODEL} --model.head-dim 8 {STEPS} --batch-size 4 --recipe-of paper --z-loss 0.01", 5),
    "palm2": (
        f"--mixture {{mixture}} --vocab-size 400 --sentinels 8 {MODEL} --model.head-dim 8 {STEPS} --batch-size 4 "
        "--warmup 2 --objective causal --prompts ab", 5,
    ),
    "ppo": (
        "--model {base} --reward last-number --rollouts 2 --prompts 4 --minibatches 2 --max-tokens 4 --sums.count 8 "
        "--held-out 0.25", 3,
    ),
    "reward": (f"--model {{base}} --data {{preferences}} {FINE} --steps 3 --batch-size 2 --warmup 0.4", 4),
    "mean-flow": (
        f"--data {{drawings}} --size 8 --n-layers 2 --n-heads 2 --head-dim 8 --moving 0.5 {STEPS} --warmup 2 "
        "--batch-size 3", 4,
    ),
    "score": (
        f"--data spiral --points 50 --hidden-dim 8 {STEPS} --warmup 2 --batch-size 3 --sampling.count 4 "
        "--sampling.sampling-steps 3", 4,
    ),
    "see": (
        f"--model {{base}} --data {{seen}} {FINE} --steps 3 --batch-size 2 --image.image-size 12 --image.patch-size 4 "
        "--image.dim 16 --image.hidden-dim 24 --image.n-layers 1 --image.n-heads 2 --lora.rank 2", 4,
    ),
    "seq2seq": (
        "--data {pairs} --vocab-size 280 --model.dim 8 --model.embedding-dim 8 --model.attention-dim 8 "
        "--model.maxout-dim 8 --model.context-length 24 --steps 4 --tokens-per-batch 60", 4,
    ),
    "sft": (f"--model {{base}} --data {{chats}} {FINE} --steps 3 --batch-size 2 --lora.rank 2 --lora.dropout 0.2", 4),
    "t5": (
        f"--data {{pairs}} --vocab-size 380 {MODEL} --model.head-dim 8 --model.context-length 40 --steps 4 "
        "--tokens-per-batch 120 --pretraining.steps 3 --pretraining.window 12 --model.dropout 0.2", 4,
    ),
    "transformer": (
        f"--data {{pairs}} --vocab-size 280 {MODEL} --model.context-length 24 --steps 4 --tokens-per-batch 60 "
        "--model.dropout 0.2", 4,
    ),
    "unclip": (
        "--data {drawings} --clip {wide} --prompts {prompt} --batch-size 4 --precision float32 --seed 3 --size 16 "
        "--small 8 --crop 8 --prior-layers 1 --prior-heads 2 --head-dim 8 --widths 8 16 --attention 1 --context-dim 16 "
        "--upsampler-widths 8 16 --noise-steps 50 --steps 3", 3,
    ),
    "vq": (
        "--data {drawings} --model.size 8 --model.widths 4 6 --model.norm-groups 2 --model.codebook-size 9 "
        f"--model.latent-channels 4 --least-usage 2 {STEPS} --warmup 2 --batch-size 3", 4,
    ),
    "word2vec": (
        f"--data {{text}} --min-count 1 --dim 8 --neighbours.window 3 --neighbours.negatives 2 {STEPS} --warmup 2 "
        "--batch-size 3 --words cat", 5,
    ),
    "whisper": (
        f"--data {{spoken}} --held-out 0.25 --vocab-size 264 {MODEL} --model.audio-length 20 --model.n-mels 8 "
        "--model.dropout 0.2 --steps 4 --batch-size 3 --warmup 1", 4,
    ),
}  # fmt: skip
STARTS_OVER = {"perceptron", "ngram"}  # they draw no random number, and take little time
QUICK = {"clip", "mlp", "sft"}  # the others are marked slow; LEARNED resumes some of them
CLIP = (
    "--image.image-size 24 --image.patch-size 6 --image.dim 24 --image.hidden-dim 48 --image.n-layers 1 "
    "--image.n-heads 2 --image.embedding-dim 16 --text.dim 24 --text.hidden-dim 48 --text.n-layers 1 --text.n-heads 2 "
    "--text.embedding-dim 16 --text.context-length 16 --evaluate-every 2 --sample-every 2"
)


@pytest.fixture(scope="module")
def wide(own_cache: pytest.MonkeyPatch, drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a CLIP whose text tower is as wide as its embeddings, and return its run."""
    made, out = small_clip(drawings), tmp_path_factory.mktemp("wide")
    text, image = clip_text.Config(600, 16, 16, 32, 1, 2, embedding_dim=16), replace(made.image, embedding_dim=16)
    run_jobs(clip.jobs(replace(made, text=text, image=image, training=replace(made.training, steps=3))), out)
    return out


@pytest.fixture(scope="module")
def pipeline(own_cache: pytest.MonkeyPatch, drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a latent diffusion of 16 x 16 pixels."""
    return small_pipeline(drawings, tmp_path_factory.mktemp("pipeline"))


@dataclass
class Stops:
    """Stops a run at the question whether to stop that has this number, from 1; None: never."""

    left: int | None = None

    def asked(self, request: StopRequest) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left <= 0


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    """Set `left` to stop a run, and None to let it be."""
    found = Stops()

    class Request(StopRequest):
        wanted = property(found.asked, lambda self, value: None)  # pyright: ignore

    monkeypatch.setattr(loop, "StopRequest", Request)
    monkeypatch.setattr(demo, "_ask", lambda name, *questions: ["Paris.", "It is Tokyo."])
    for module in (latents, lora_image, unclip):
        monkeypatch.setattr(module, "STEPS", 2)
    return found


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the models and of the last states in a run's folder and those of its parts."""
    last = {place.parent: max(checkpoint.steps(place.parent)) for place in out.rglob("state")}
    found = [path for path in out.rglob("*.safetensors") if path.parent.name != "state"]
    found += [place / f"state/step-{step:08d}.safetensors" for place, step in last.items()]
    assert last, "no state was saved"
    return {f"{path.relative_to(out)}:{name}": t for path in found for name, t in load_file(path).items()}


def go(*words: str) -> None:
    cli.parse(["train", *words])()


def in_pieces(begin: Callable[[], None], out: Path, stops: Stops, every: int) -> int:
    """Return begins, and goes on by the line that each stop prints, until the end; the number of stops."""
    count, work = 0, begin
    while True:
        stops.left = every
        try:
            work()
        except Interrupted as stop:
            line = str(stop).splitlines()[-1]
            assert line == f"keifu train --resume {shlex.quote(str(out))}"
            count, work = count + 1, lambda line=line: cli.parse(shlex.split(line)[1:])()
            assert count < 20
        else:
            return count


def test_the_table_has_every_recipe() -> None:
    assert TABLE.keys() | STARTS_OVER == recipes().keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TABLE]
)
def test_stopped_and_resumed_from_its_folder_alone_it_ends_with_the_same_bits(
    name: str, files: dict[str, Path], models: dict[str, Path], drawings: Path, request: pytest.FixtureRequest,
    stops: Stops, tmp_path: Path,
) -> None:  # fmt: skip
    options, every = TABLE[name]
    if "{spoken}" in options:
        pytest.importorskip("soundfile")
    named = {key: request.getfixturevalue(key) for key in ("towers", "wide", "pipeline") if f"{{{key}}}" in options}
    given = {**files, **models, **named, "drawings": drawings, "clip": CLIP, "prompt": "'a red disc'"}
    words = shlex.split(options.format(**given))
    go(name, *words, "--out", str(tmp_path / "whole"))
    parts = tmp_path / "parts"
    assert in_pieces(lambda: go(name, *words, "--out", str(parts)), parts, stops, every) >= 1
    ours, theirs = tensors(parts), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


LEARNED = {
    "bert": f"--data {{stories}} --vocab-size 120 {MODEL} --masking.length 16 {STEPS} --warmup 2 --gaps [MASK]",
    "gpt": f"--data {{text}} --tokenizer unigram --vocab-size 400 --depth 1 --context-length 16 --batch-size 3 {STEPS}",
    "transformer": (
        f"--data {{pairs}} --tokenizer unigram --vocab-size 320 {MODEL} --model.context-length 24 --steps 4 "
        "--tokens-per-batch 60"
    ),
    "classifier": (
        "--data {labels} --model scratch --size.vocab-size 90 --size.dim 16 --size.hidden-dim 32 --size.n-layers 1 "
        "--size.n-heads 2 --epochs 2 --batch-size 8"
    ),
}


@pytest.mark.parametrize("name", others_slow(LEARNED, "bert", "gpt", "transformer"))
def test_a_learned_tokenizer_goes_on_with_its_run_when_the_cache_is_gone(
    name: str, files: dict[str, Path], stops: Stops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(LEARNED[name].format(**files))
    go(name, *words, "--out", str(tmp_path / "whole"))
    stops.left = 3
    with pytest.raises(Interrupted):
        go(name, *words, "--out", str(tmp_path / "parts"))
    stops.left = None
    (tmp_path / "parts" / "tokenizer.json").unlink()  # a killed run has not come to write it
    assert len([*tmp_path.glob("parts/state/tokenizer/*")]) == (name != "classifier")  # which learns the same again
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "empty"))
    go("--resume", str(tmp_path / "parts"))
    ours, theirs = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
