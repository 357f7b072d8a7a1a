"""Each model as one file: it computes what keifu's model computes, has at most 600 lines, and imports torch alone."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from model_entries import ENTRIES

import keifu
from keifu import checkpoints, eject as eject_folder
from keifu.cli import parse
from keifu.commands.reference.eject import written_models
from keifu.eject import executed as executed_code
from keifu.eject.models import eject, inputs_of, smaller
from keifu.eject.writing import STANDARD, FileWriter, Name
from keifu.errors import UserError
from keifu.models import bert, llama, mlp, perceptron, seq2seq, transformer
from keifu.models.classic import gan, lstm, word2vec
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.dalle import dalle, discrete_vae
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, ddpm, dit, llada, mean_flow, score, sd3, vq_vae
from keifu.models.multimodal import llava, siglip, smolvlm
from keifu.models.speech import whisper
from keifu.models.unclip import conditioning, decoder, prior
from keifu.models.variants import t5

TEXT = clip_text.Config(vocab_size=40, context_length=7, dim=16, hidden_dim=24, n_layers=2, n_heads=2, embedding_dim=12)
IMAGE = clip_image.Config(image_size=12, patch_size=4, dim=16, hidden_dim=24, n_layers=2, n_heads=2, embedding_dim=12)
SMALL = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
READER = llama.Config(**SMALL, vocab_size=40, context_length=20)
OTHERS: dict[str, Any] = {
    "mlp": mlp.Config(dim=3, hidden_dims=(5, 4), activation="tanh"),
    "perceptron": perceptron.Config(dim=3),
    "classic.word2vec": word2vec.Config(vocab_size=40, dim=6),
    "classic.lstm": lstm.Config(vocab_size=40, dim=16),
    "classic.gan": gan.Config(size=8, latent_dim=5, widths=(4, 6)),
    "bert": bert.Config(**SMALL, vocab_size=40, context_length=9),
    "seq2seq": seq2seq.Config(vocab_size=40, dim=12, embedding_dim=8, attention_dim=6, maxout_dim=5),
    "variants.t5": t5.Config(**SMALL, vocab_size=40, head_dim=6, gated=True),
    "transformer": transformer.Config(**SMALL, vocab_size=40),
    "diffusion.llada": llada.Config(**SMALL, vocab_size=40, mask_token=39),
    "speech.whisper": whisper.Config(
        **SMALL, vocab_size=40, n_mels=6, audio_length=8, start_id=1, end_id=2, pad_id=2
    ),
    "clip.text": TEXT,
    "clip.image": IMAGE,
    "clip.clip": clip.Config(TEXT, IMAGE),
    "multimodal.llava": llava.Config(
        READER, replace(IMAGE, projected=False), image_token=39, feature_layers=(-2, 0)
    ),
    "multimodal.smolvlm": smolvlm.Config(READER, siglip.Config(12, 3, **SMALL), image_token=39, shuffle=2),
    "dalle.dalle": dalle.Config(
        vocab_size=40, context_length=6, **SMALL, kernel=3,
        vae=discrete_vae.Config(size=16, codebook_size=11, widths=(4, 8), n_residual_blocks=1, code_dim=6),
    ),
    "dalle.discrete_vae": discrete_vae.Config(
        size=16, codebook_size=11, widths=(4, 8), n_residual_blocks=1, code_dim=6
    ),
    "diffusion.ddpm": ddpm.Config(
        size=8, dim=8, multipliers=(1, 2), norm_groups=4, middle_groups=4, n_classes=3, null_class=True
    ),
    "diffusion.vq_vae": vq_vae.Config(
        size=8, widths=(8, 16), n_residual_blocks=1, codebook_size=9, norm_groups=4
    ),
    "diffusion.score": score.Config(hidden_dim=8),
    "diffusion.mean_flow": mean_flow.Config(8, 2, 3, 2, 4, 2, 3),
    "diffusion.autoencoder_kl": autoencoder_kl.Config(size=8, widths=(8, 16), norm_groups=4),
    "diffusion.conditioned_unet": replace(
        conditioned_unet.SIZES["stable-diffusion-1-unet"], size=8, widths=(8, 16), norm_groups=4, n_heads=2,
        context_dim=6, attention=(0,),
    ),
    "diffusion.dit": dit.Config(
        transformer=replace(dit.SIZES["dit-s-2"].transformer, size=8, head_dim=8, n_heads=2, n_layers=2, n_classes=3),
        autoencoder=None,
    ),
    "diffusion.sd3": replace(
        sd3.SIZES["sd3-medium"], size=8, n_heads=2, head_dim=8, n_layers=2, text_dim=12, pooled_dim=6, positions=6
    ),
    "unclip.prior": prior.Config(context_length=5, embedding_dim=12, n_layers=2, n_heads=2, head_dim=8),
    "unclip.decoder": decoder.Config(
        widths=(32, 64), n_residual_blocks=1, attention=(1,), up_attention=(1,), head_dim=8, context_dim=6
    ),
    "unclip.conditioning": conditioning.Config(embedding_dim=12, time_dim=16, context_dim=6),
}  # fmt: skip
LANGUAGE = [entry.name for entry in ENTRIES.values() if entry.name not in OTHERS]
MOST = 600  # lines that are not empty; some models need more, and their number is the bound
LONGER = {"hybrid.qwen3_next": 920, "hybrid.qwen3_5": 820, "mixture.deepseek_v3": 740, "multimodal.smolvlm": 620}


def config_of(module: str) -> Any:
    """Return a small Config."""
    if module in OTHERS:
        return OTHERS[module]
    origin = import_module(f"keifu.models.{module}")
    return smaller(next(iter(origin.SIZES.values())))


def executed(text: str, folder: Path, name: str) -> ModuleType:
    """Execute a file as a module without keifu's checks of shapes."""
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look up the types of their fields here
    exec(compile(text, name, "exec"), vars(module))
    return module


def like(tensor: torch.Tensor | None, generator: torch.Generator, most: int) -> torch.Tensor | None:
    """Return random numbers of the same shape and type. The tokens of pictures stay: others are 1."""
    if tensor is None:
        return None
    if tensor.dtype == torch.long:
        return torch.where(tensor == 1, torch.randint(1, most, tensor.shape, generator=generator), tensor)
    return tensor if tensor.dtype == torch.bool else torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def flat(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an output."""
    return [output] if isinstance(output, torch.Tensor) else [part for each in output for part in flat(each)]


PRUNED = '''class Toy:
    """Class with é in a remark, branches of which one is taken, and a method that is never called."""

    def __init__(self, wide: int, deep: list[int] | None = None):
        self.wide = wide  # é
        self.deep = [2 * n for n in range(wide)]
        self.more = 2

    def run(self, values: list[int | None]) -> int:
        total = 0
        for value in values:
            total += value and self.more
        return total'''


@pytest.mark.parametrize("name", [sys.executable, "python3.12", "python3.13", "python3.14"])
def test_each_version_of_python_records_the_same(name: str) -> None:
    """Python 3.12 and 3.13 tell a trace function of instructions in other ways than 3.11."""
    paths = [path for folder in os.get_exec_path() if (path := Path(folder) / name).exists()]
    working = [path for path in paths if not subprocess.run([path, "-c", ""], capture_output=True).returncode]
    if not working:
        pytest.skip(f"{name} is not installed")
    source = Path(eject_folder.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONIOENCODING": "ascii"}
    program = Path(__file__).with_name("toy_program.py")
    run = subprocess.run([working[0], program], capture_output=True, env=environment)
    assert run.stdout.decode() == PRUNED, run.stderr.decode()


def test_a_python_that_records_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "settrace", lambda function: None)
    with pytest.raises(UserError, match="records no instructions: run keifu eject with another version"):
        eject("mlp", mlp.Config(dim=3), "mlp")


def test_functions_of_the_same_text_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the same text, and the name in it means another number in each module. A table may spread another."""
    for name, factor in (("toy_left", 2), ("toy_right", 3)):
        lines = [f"FACTOR = {factor}", "def scaled(x):", "    return FACTOR * x", "BASE = {'left': scaled}"]
        (tmp_path / f"{name}.py").write_text("\n".join(lines))
    lines = [
        "from keifu import toy_left, toy_right", "TABLE = {**toy_left.BASE, 'right': toy_right.scaled}",
        "def build(x):", "    return TABLE['left'](x) + 10 * TABLE['right'](x)",
    ]  # fmt: skip
    (tmp_path / "toy_both.py").write_text("\n".join(lines))
    monkeypatch.setattr(keifu, "__path__", [*keifu.__path__, str(tmp_path)])
    monkeypatch.setattr(executed_code, "WATCHED", str(tmp_path))
    module = import_module("keifu.toy_both")
    found = executed_code.record(lambda: module.build(1))
    text = FileWriter(found).file([Name("keifu.toy_both", "build")])
    assert executed(text, tmp_path, "ejected_toy").build(1) == 32


def test_every_published_model_has_a_file() -> None:
    assert {*written_models()} <= {*LANGUAGE, *OTHERS}


def test_a_trained_model_goes_on_in_its_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The file runs where keifu is not, and computes the packaged model's logits from its weights."""
    parse(["eject", "gpt-en", "--weights", str(tmp_path / "weights")])()
    program = tmp_path / "program.py"
    (tmp_path / "model.py").write_text(capsys.readouterr().out, encoding="utf-8")
    lines = [
        "import runpy, sys, torch", "sys.modules['keifu'] = None", "import model",
        "m = model.build(model.CONFIG).eval()",
        "m.load_state_dict(model.read_weights('weights'))",
        "print(m(torch.tensor([[5, 9, 2, 31]]))[0, -1].tolist())", "sys.argv = ['model.py', 'weights']",
        "runpy.run_path('model.py', run_name='__main__')",
    ]  # fmt: skip
    program.write_text("\n".join(lines))
    run = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True)
    assert not run.stderr
    with torch.no_grad():
        expected = checkpoints.load_model("gpt-en", dtype=torch.float32)(torch.tensor([[5, 9, 2, 31]]))[0, -1]
    logits, _, shown = run.stdout.partition("\n")
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, atol=1e-4, rtol=1e-4)
    assert run.returncode == 0 and "parameters\ntensor(" in shown


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3-0.6c", "There is no model 'qwen3-0.6c'. Did you mean 'qwen3-0.6b'"),
        ("unclip", "unclip consists of models that have a file each: keifu eject unclip.prior, unclip.decoder"),
        ("stable-diffusion-1", "stable-diffusion-1 consists of models that have a file each: keifu eject clip.text"),
    ],
)
def test_what_has_no_file(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(["eject", name])()


@pytest.mark.parametrize("module", [*LANGUAGE, *OTHERS])
def test_the_file_computes_the_same(module: str, tmp_path: Path) -> None:
    config = config_of(module)
    text = eject(module, config, module)
    assert sum(map(bool, text.split("\n"))) <= LONGER.get(module, MOST)
    imported = {
        (node.names[0].name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= {"torch", "__future__", *STANDARD}
    ours = import_module(f"keifu.models.{module}").build(config).eval()
    file = executed(text, tmp_path, "ejected_" + module.replace(".", "_"))
    theirs = file.build(file.CONFIG).eval()
    assert not any(type(part).__module__.startswith("keifu") for part in theirs.modules())
    generator = torch.Generator().manual_seed(1)
    for parameter in ours.parameters():  # also those that begin with zeros
        parameter.data.normal_(0, 0.1, generator=generator)
    theirs.load_state_dict(ours.state_dict())
    inputs = [like(each, generator, 3) for each in inputs_of(module, config)]
    with torch.no_grad():
        expected, found = flat(ours(*inputs)), flat(theirs(*inputs))
        if "multimodal." in module:  # another picture gives other logits
            assert not torch.allclose(theirs(*inputs[:3], inputs[3] + 1), found[0], atol=1e-3)
    for ours_, theirs_ in zip(expected, found, strict=True):
        assert ours_.isfinite().all() and (ours_.float().std() > 0 or module == "perceptron")
        assert (theirs_ - ours_).abs().max() <= 1e-5 * ours_.abs().max().clamp(min=1)
