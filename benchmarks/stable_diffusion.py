"""Stable Diffusion 1 compared with diffusers: a step of its U-Net, the decoding of its latents, and a whole picture.

python benchmarks/stable_diffusion.py [--what step decode picture] [--dtype float32 bfloat16] [--rounds 3]
    [--steps 50] [--few 20] [--side 64] [--model stable-diffusion-1] [--tiny]
    [--json FILE]

Both have the same random weights, shared if possible, so that they only differ in speed. A step is one guided
prediction for latents of `--side`: a batch of two for both; keifu computes keys and values of the text once for each
picture, outside of it. A whole picture is text, steps and decoding: diffusers with its default pipeline (PNDM, 50
steps), keifu with the same steps, and with the few that DPM-Solver++ needs. A further row gives diffusers channels-last
weights, which its users must request. Peak memory (--memory) is that of a separate process for each row, including
weights. `--tiny` is a small network for testing the program.
"""

import argparse
import copy
import ctypes
import gc
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from _results import typed, usual, write_timing
from _rounds import interleaved, machine
from torch import Tensor, nn

from keifu.checkpoints.hf.weight_names import links
from keifu.checkpoints.hf.write import published_tensors
from keifu.data.tokenizers.bpe import learn
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.inference.images.latent_diffusion import LatentDiffusionPipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.layers.unet.prepacked_conv import prepack
from keifu.models.clip import text as clip_text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, latent_diffusion
from keifu.training.hardware.flops import count_flops, matmul_peak

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU, BASE, LAST, OWN = torch.device("cpu"), "diffusers", "diffusers, channels-last", "keifu"
SECTION = "Stable Diffusion 1 and diffusers"
TEXT, GUIDANCE, PARTS = "a red heart", 7.5, {"text_encoder": "text", "unet": "unet", "vae": "autoencoder"}
TINY = latent_diffusion.Config(
    clip_text.Config(dim=32, hidden_dim=48, n_layers=2, n_heads=2, embedding_dim=32, projected=False),
    conditioned_unet.Config(size=8, widths=(32, 64), n_residual_blocks=1, attention=(0,), up_attention=(0,),
                            n_heads=2, context_dim=32),
    autoencoder_kl.Config(size=64, widths=(32, 32, 32, 64), n_residual_blocks=1),
)  # fmt: skip


def built(config: latent_diffusion.Config, dtype: torch.dtype) -> latent_diffusion.LatentDiffusion:
    """Build keifu's model with random instead of zero weights where a new network has zeros, as if it were trained."""
    torch.manual_seed(0)
    model = latent_diffusion.build(config)
    for parameter in model.parameters():
        if not bool(parameter.any()) and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_(False)
    return model.to(dtype).eval()


def peers(own: latent_diffusion.LatentDiffusion) -> dict[str, Any]:
    """Build diffusers' and transformers' models with the same weights, shared except for joined matrices."""
    told = latent_diffusion.to_published(own.config)
    weights = dict(published_tensors(own, links(own, latent_diffusion.WEIGHT_NAMES)))
    with torch.device("meta"):
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**_plain(told["text_encoder"])))
        made = {
            "text_encoder": text,
            "unet": diffusers.UNet2DConditionModel.from_config(_plain(told["unet"])),
            "vae": diffusers.AutoencoderKL.from_config(_plain(told["vae"])),
        }
    for part, model in made.items():
        found = {name.removeprefix(f"{part}."): tensor for name, tensor in weights.items() if name.startswith(part)}
        short = not any(name.startswith("text_model.") for name in model.state_dict())
        found = {name.removeprefix("text_model.") if short else name: tensor for name, tensor in found.items()}
        missing, _ = model.load_state_dict(found, strict=False, assign=True)
        assert not missing, missing
        for name, buffer in [*model.named_buffers()]:  # position_ids, which files do not contain
            if buffer.is_meta:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, torch.arange(buffer.shape[-1])[None])
        model.eval()
    return made


def _plain(json: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in json.items() if name not in ("model_type", "architectures")}


def tokens(config: latent_diffusion.Config) -> Tokenizer:
    """Return a small tokenizer. The cost of reading a prompt does not depend on its words."""
    return learn([TEXT] * 3, 520).replace(max_length=config.context_length)


def step(own: latent_diffusion.LatentDiffusion, row: str, options: argparse.Namespace) -> Callable[[], Tensor]:
    """Return a function that makes one guided step."""
    unet = own.config.unet
    x, context = torch.randn(2, unet.channels, options.side, options.side), torch.randn(2, 77, unet.context_dim)
    kind, timestep = next(own.parameters()).dtype, torch.tensor([500, 500])
    x, context = x.to(kind), context.to(kind)
    if row == OWN:
        quick = prepack(own)  # as for a drawing
        projected = quick.project(context)
        return lambda: quick(x, timestep, projected)
    theirs = peers(own)["unet"]
    if row == LAST:
        theirs, x = copy.deepcopy(theirs).to(memory_format=torch.channels_last), _last(x)
    return lambda: theirs(x, timestep, context).sample


def decode(own: latent_diffusion.LatentDiffusion, row: str, options: argparse.Namespace) -> Callable[[], Tensor]:
    """Return a function that decodes the latents of one picture."""
    x, scale = torch.randn(1, own.config.channels, options.side, options.side), own.config.scale
    x = x.to(next(own.parameters()).dtype)
    if row == OWN:
        return lambda: own.to_pictures(x)
    theirs = peers(own)["vae"]
    if row == LAST:
        theirs, x = copy.deepcopy(theirs).to(memory_format=torch.channels_last), _last(x)
    return lambda: theirs.decode(x / scale).sample


def picture(own: latent_diffusion.LatentDiffusion, row: str, options: argparse.Namespace) -> Callable[[], object]:
    """Return a function that draws one picture from a text."""
    config, tokenizer = own.config, tokens(own.config)
    side = options.side * config.factor
    if row != BASE:
        painter = LatentDiffusionPipeline(own, tokenizer)
        sampler, count = ("plms", options.steps) if "plms" in row else ("dpm++-2m", options.few)
        wanted = painter.resolved(ImageRequest(sampler, count, 0, text=TEXT, guidance=GUIDANCE, size=(side, side)))
        return lambda: painter.draw(wanted, [0])
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, pad_token="<|endoftext|>")
    words.model_max_length = config.context_length
    pipeline = diffusers.StableDiffusionPipeline(
        tokenizer=words,
        scheduler=diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **peers(own),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(TEXT, num_inference_steps=options.steps, height=side, width=side).images


def _last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def rows(what: str, options: argparse.Namespace) -> list[str]:
    """Return the names of the timed contenders."""
    few = [f"{OWN}, plms, {options.steps} steps", f"{OWN}, dpm++-2m, {options.few} steps"]
    return [BASE, *few] if what == "picture" else [BASE, LAST, OWN]


KINDS = {"step": step, "decode": decode, "picture": picture}


def flops_of(own: latent_diffusion.LatentDiffusion, what: str, options: argparse.Namespace) -> int:
    """Return the operations of one step or decoding. It is 0 for a picture, whose contenders do different work."""
    if what == "decode":
        return count_flops(decode(own, OWN, options))
    unet = own.config.unet
    x, kind = torch.randn(2, unet.channels, options.side, options.side), next(own.parameters()).dtype
    projected = own.project(torch.randn(2, 77, unet.context_dim))
    return count_flops(lambda: own(x.to(kind), torch.tensor([500, 500]), projected)) if what == "step" else 0


@torch.inference_mode()
def measure(options: argparse.Namespace, what: str, name: str) -> dict[str, Any]:
    """Return the task of one kind of work."""
    dtype = DTYPES[name]
    own = built(config_of(options), dtype)
    task: dict[str, Any] = {"amount": 60}  # so that the table has units a minute
    task["seconds"] = interleaved({row: KINDS[what](own, row, options) for row in rows(what, options)}, options.rounds)
    if flops := flops_of(own, what, options):
        task |= {"work": flops, "peak": round(matmul_peak(CPU, dtype))}
        print(f"{what}, {name}: {flops / 1e9:.0f} GFLOP; the matmul peak is {task['peak'] / 1e9:.0f} GFLOP/s.")
    if options.memory:
        task["more"] = {row: [f"{memory_of(options, what, name, row):.2f}"] for row in task["seconds"]}
    return task


def memory_of(options: argparse.Namespace, what: str, dtype: str, row: str) -> float:
    """Return the peak memory, in GB, of a separate process that does this work once."""
    words = [sys.executable, __file__, "--alone", row, "--what", what, "--dtype", dtype, "--side", str(options.side)]
    words += ["--model", options.model, "--steps", str(options.steps), "--few", str(options.few)]
    told = subprocess.run([*words, *["--tiny"] * options.tiny], check=True, capture_output=True, text=True)
    return float(told.stdout.split()[-1])


@torch.inference_mode()
def alone(options: argparse.Namespace) -> float:
    """Return the peak memory of this process during one contender's work, in GB. Memory that only building the weights
    needed is returned to the system first."""
    own = built(config_of(options), DTYPES[options.dtype[0]])
    work = KINDS[options.what[0]](own, options.alone, options)
    del own
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, int(Path("/proc/self/statm").read_text().split()[1]))

    watching = threading.Thread(target=watch)
    watching.start()
    work()
    done.set()
    watching.join()
    return most * resource.getpagesize() / 1e9


def config_of(options: argparse.Namespace) -> latent_diffusion.Config:
    """Return the model's configuration."""
    return TINY if options.tiny else latent_diffusion.SIZES[options.model]


def main() -> None:
    """Measure, print and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["step", "decode", "picture"], nargs="+", default=[*KINDS])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--few", type=int, default=20)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--model", choices=latent_diffusion.SIZES, default="stable-diffusion-1")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    options.side = min(options.side, 8) if options.tiny else options.side
    if options.alone:
        print(alone(options))
        return
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in latent_diffusion.build(config_of(options)).parameters())
    size = f"latents of {options.side} x {options.side}, {options.rounds} interleaved rounds"
    print(f"{machine()}; {count:,} parameters, {size}")
    made = [(what, name) for what in options.what for name in options.dtype]
    tasks = {f"{what}, {name}": measure(options, what, name) for what, name in made}
    names = dict.fromkeys(row for task in tasks.values() for row in task["seconds"] if row != BASE)
    values = {"tasks": tasks, "against": dict.fromkeys(names, [BASE])}
    columns = ["a minute; ratio to diffusers; share of the matmul peak", *tasks]
    write_timing(options.json, SECTION, typed("stable_diffusion.py", vars(options), usual(parser)), columns, values)


if __name__ == "__main__":
    main()
