"""What the checkpoint tests share: published models made here with random weights, a small tokenizer, SmolLM2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keifu import checkpoints
from keifu.data.tokenizers import bpe
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError


@pytest.fixture(scope="session")
def published() -> Callable[[Any], Any]:
    """Return a maker of transformers' model of a config: in float32, every weight random, biases, norms and the factors
    of Gemma 4's layers too."""
    import transformers

    def make(config: Any) -> Any:
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
        with torch.no_grad():
            factors = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
            for parameter in (*model.parameters(), *factors):
                parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Train a byte-level BPE of at most 300 tokens."""
    texts = ["The capital of France is Paris, and that of Japan is 東京.\n" * 3, "def f(x):\n    return x + 1\n" * 3]
    return train_tokenizer("bpe", texts, 300)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct's GGUF from the catalogue; the test is left out where there is no network for it."""
    from keifu.data.catalogue.catalogue import fetch

    try:
        return fetch("smollm2")
    except (UserError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture
def check_saved(tmp_path: Path) -> Callable[..., None]:
    """Check that a model that sees is saved as it was read from the folder "theirs", and that transformers reads it."""

    def check(model: Any, tokens: torch.Tensor, pixels: torch.Tensor, expected: torch.Tensor) -> None:
        import transformers

        checkpoints.save(model, None, tmp_path / "ours")
        ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert torch.equal(again(input_ids=tokens, pixel_values=pixels).logits, expected)
        assert checkpoints.load_model(tmp_path / "ours").config == model.config

    return check


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a reader of all tensors in a directory's safetensors files."""

    def read(directory: Path) -> dict[str, torch.Tensor]:
        return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}

    return read


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Return a tiny random StableDiffusionPipeline of diffusers, and its directory."""
    diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = bpe.learn(["a red heart", "a blue cat"] * 5, 520).replace(max_length=77)
    tokenizer.save(folder / "tokens")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=14, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(12, 20), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=14,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(6, 9), norm_num_groups=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    tokens = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokens")
    made = diffusers.StableDiffusionPipeline(
        autoencoder, transformers.CLIPTextModel(text).eval(), tokens, unet, scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.save_pretrained(folder / "theirs")
    return made, folder / "theirs"


@pytest.fixture(scope="session")
def unclip_pipeline(tmp_path_factory):
    """Return a tiny random UnCLIPPipeline of diffusers, and its directory."""
    diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    folder = tmp_path_factory.mktemp("unclip")
    tokenizer = bpe.learn(["a red heart", "a blue cat"] * 5, 520).replace(max_length=12)
    tokenizer.save(folder / "tokens")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=14, projection_dim=14, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, eos_token_id=tokenizer.eos_id, bos_token_id=None, max_position_embeddings=12,
    )  # fmt: skip
    prior = diffusers.PriorTransformer(3, 7, 2, embedding_dim=14, num_embeddings=12)
    prior.clip_std.data += 0.5
    decoder = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, block_out_channels=(12, 20), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=5, cross_attention_dim=11, class_embed_type="identity",
        resnet_time_scale_shift="scale_shift", mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    projection = UnCLIPTextProjModel(
        clip_extra_context_tokens=3, clip_embeddings_dim=14, time_embed_dim=48, cross_attention_dim=11
    )
    upsamplers = [
        diffusers.UNet2DModel(
            sample_size=16, in_channels=6, out_channels=3, block_out_channels=(8, 12), layers_per_block=1,
            norm_num_groups=4, add_attention=False, down_block_types=["ResnetDownsampleBlock2D"] * 2,
            up_block_types=["ResnetUpsampleBlock2D"] * 2,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = {"prediction_type": "sample", "clip_sample_range": 5.0}, {"variance_type": "learned_range"}, {}
    made = diffusers.UnCLIPPipeline(
        prior, decoder, transformers.CLIPTextModelWithProjection(text).eval(),
        transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokens"), projection, *upsamplers,
        *(diffusers.UnCLIPScheduler(**each) for each in told),
    )  # fmt: skip
    made.save_pretrained(folder / "theirs")
    return made, folder / "theirs"
