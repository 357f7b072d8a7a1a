"""`--precision`: the type in which commands compute, its default on a GPU, and what is refused."""

import sys
import wave
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

import speech_toys  # noqa: E402
from simulated_device import device, simulated  # noqa: E402

from keifu import checkpoints, cli  # noqa: E402
from keifu.checkpoints import plan  # noqa: E402
from keifu.data.tokenizers.tokenizer import Tokenizer  # noqa: E402
from keifu.data.tokenizers.train import train_tokenizer  # noqa: E402
from keifu.devices import Choice, choosing  # noqa: E402
from keifu.inference.text.generate import generate_batch  # noqa: E402
from keifu.inference.text.sampling_params import SamplingParams  # noqa: E402
from keifu.layers.diffusion.noise_schedule import Noise  # noqa: E402
from keifu.models import bert, llama, transformer  # noqa: E402
from keifu.models.diffusion import ddpm  # noqa: E402
from keifu.models.speech import whisper  # noqa: E402

ANSWER = "{{ messages[0]['content'] }}"
SIZES: dict[str, Any] = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny models, a text file, and a recording of half a second."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models")
    letters = Tokenizer(
        train_tokenizer("characters", ["abc d\n"], 64, special_tokens=["<pad>", "</s>"]).backend,
        {"pad_token": "<pad>", "eos_token": "</s>"},
    )
    heard = speech_toys.tokenizer()
    ids: dict[str, Any] = {"start_id": letters.pad_id, "end_id": letters.eos_id, "pad_id": letters.pad_id}
    start, end = heard.token_id("<|startoftranscript|>"), heard.token_id("<|endoftext|>")
    sizes: dict[str, Any] = {"vocab_size": letters.vocab_size, "context_length": 24, **SIZES}
    reader = bert.Config(**sizes, words=False, next_sentence=False, labels=("cats", "dogs"))
    hearing = whisper.Config(
        heard.token_id("<|notimestamps|>") + 1 + speech_toys.TIMES, 40, 50, 8, **SIZES, start_id=start, end_id=end,
        pad_id=end,
    )  # fmt: skip
    painter = ddpm.Config(
        size=8, channels=3, dim=8, multipliers=(1,), n_residual_blocks=1, attention=(), norm_groups=4, middle_groups=4,
        dropout=0.0, noise=Noise(steps=20, beta_end=0.3),
    )  # fmt: skip
    checkpoints.save(llama.build(llama.Config(**sizes)), letters.with_chat_template(ANSWER), place / "writer")
    checkpoints.save(transformer.build(transformer.Config(**sizes, **ids)), letters, place / "translator")
    checkpoints.save(bert.build(reader), letters, place / "reader")
    checkpoints.save(whisper.build(hearing), heard, place / "listener")
    checkpoints.save(ddpm.build(painter), None, place / "painter")
    (place / "text.txt").write_text("abc abc d abc\n" * 9)
    with wave.open(str(place / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(16_000))
    return place


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Return a list that collects the types of all parameters of the models that are loaded."""
    found: list[torch.dtype] = []
    real = plan.LoadPlan.fill

    def fill(self: plan.LoadPlan, *place: Any) -> nn.Module:
        model = real(self, *place)
        found.extend({parameter.dtype for parameter in model.parameters()})
        return model

    monkeypatch.setattr(plan.LoadPlan, "fill", fill)
    return found


COMMANDS = {
    "generate": "generate writer abc --max-tokens 3",
    "chat": "chat writer abc --max-tokens 3",
    "bench": "bench writer --prompt 8 --tokens 4",
    "evaluate": "evaluate writer --on text.txt",
    "translate": "translate translator abc --max-tokens 3",
    "embed": "embed reader abc",
    "search": "search text.txt abc --model reader",
    "classify": "classify reader abc",
    "transcribe": "transcribe listener sound.wav --language en",
    "draw": "draw painter --steps 2 -o a.png",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_computes_in_the_type_that_was_asked_for(
    command: str, folder: Path, types: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = {each.name for each in folder.iterdir()}
    words = [str(folder / word) if word in names else word for word in COMMANDS[command].split()]
    cli.main([*words, "--precision", "bfloat16"])
    assert {*types} == {torch.bfloat16}


def test_a_gpu_computes_files_in_float32_in_bfloat16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"sim": True}
    monkeypatch.setattr(plan, "has_bfloat16", lambda device: has[device.type])

    def loaded(name: Path, weights: str | None) -> torch.dtype:
        with choosing(Choice(weights=weights)):
            model, _ = checkpoints.load(name)
        assert {parameter.device for parameter in model.parameters()} == {device()}
        return next(model.parameters()).dtype

    half = folder.parent / "half"
    half.mkdir()
    for file in (folder / "writer").iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    save_file({name: x.half() for name, x in load_file(half / "model.safetensors").items()}, half / "model.safetensors")
    with simulated():
        assert loaded(folder / "writer", "auto") == torch.bfloat16
        assert loaded(folder / "writer", None) == loaded(folder / "writer", "float32") == torch.float32
        assert loaded(half, "auto") == loaded(folder / "writer", "float16") == torch.float16
        has["sim"] = False
        assert loaded(folder / "writer", "auto") == torch.float32


def test_a_command_gives_a_gpu_the_choice(folder: Path, types: list[torch.dtype], monkeypatch, capsys) -> None:
    monkeypatch.setattr(plan, "has_bfloat16", lambda device: True)
    with simulated():
        cli.main(["generate", str(folder / "writer"), "abc", "--max-tokens", "3"])
    assert types == [torch.bfloat16]
    capsys.readouterr()


def test_draw_draws_on_a_gpu_what_it_draws_on_the_cpu(folder: Path, types: list[torch.dtype], tmp_path: Path) -> None:
    command = ["draw", str(folder / "painter"), "--steps", "4", "--seed", "3", "--count", "2", "--precision", "float32"]
    for place, block in (("here", nullcontext()), ("there", simulated())):
        with block:
            cli.main([*command, "-o", str(tmp_path / f"{place}.png")])
    assert types == [torch.float32] * 2
    pictures = {path.stem: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("*.png")}
    assert len(pictures) == 6  # two, and a sheet of both
    for name, picture in pictures.items():
        other = pictures[name.replace("there", "here")]
        assert abs(picture - other).max() <= 1 and picture.std() > 1


def test_a_text_in_bfloat16_is_near_that_in_float32(folder: Path) -> None:
    found = []
    for weights in ("float32", "bfloat16"):
        with choosing(Choice(weights=weights)):
            model, tokenizer = checkpoints.load(folder / "writer", weights="own")
        params = SamplingParams(max_tokens=1, temperature=0, log_probabilities=True)
        [text] = generate_batch(model, tokenizer, ["abc"], params)
        found.append(text.log_probabilities)
    assert found[0] == pytest.approx(found[1], abs=0.02) and found[0] != found[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--precision", "float16"], "float16 is for GPUs"),
        (["--precision", "bfloat16", "--weights", "int8"], "--weights is the format of native computation"),
        (["--precision", "half"], "--precision called 'half'"),
    ],
)
def test_a_type_that_cannot_be_is_refused_before_anything_is_loaded(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "no-such-model", "abc", "--device", "cpu", *words])
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("given", [["--dtype", "bf16"], ["--dtype=bf16"]])
def test_the_option_of_the_release_before_warns_and_works(given: list[str], folder: Path, capfd) -> None:
    cli.main(["embed", str(folder / "reader"), "ab", *given])
    old = capfd.readouterr()
    cli.main(["embed", str(folder / "reader"), "ab", "--precision", "bfloat16"])
    assert old.out == capfd.readouterr().out
    assert "--dtype bf16 is deprecated: use --precision bfloat16." in old.err
    with pytest.raises(SystemExit):
        cli.main(["embed", str(folder / "reader"), "ab", "--dtype"])
    assert "There is no option '--dtype'" in capfd.readouterr().err
