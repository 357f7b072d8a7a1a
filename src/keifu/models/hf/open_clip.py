"""CLIP's config and weight names in open_clip's files; the names are those of OpenAI's files.

Settings that change the results and are not implemented are refused by name.
"""

from typing import Any

from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.hf.image_processor import MEAN, STD, Pixels

_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv.weight": "attn.in_proj_weight",
    "attention.qkv.bias": "attn.in_proj_bias",
    "attention.out": "attn.out_proj",
    "feedforward_norm": "ln_2",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}
_CONVOLUTIONS = {f"{ours}{n}": f"{theirs}{n}" for n in (1, 2, 3) for ours, theirs in (("conv", "conv"), ("norm", "bn"))}
_BOTTLENECK = {**_CONVOLUTIONS, "shortcut": "downsample.0", "shortcut_norm": "downsample.1"}
WEIGHT_NAMES = {
    "text.embedding": "token_embedding",
    "text.positions.weight": "positional_embedding",
    **{f"text.blocks.*.{ours}": f"transformer.resblocks.*.{theirs}" for ours, theirs in _BLOCK.items()},
    "text.norm": "ln_final",
    "text.projection.weight": "text_projection.T",
    "image.embedding.whole": "visual.class_embedding",
    "image.embedding.patches": "visual.conv1",
    "image.embedding.positions.weight": "visual.positional_embedding",
    "image.first_norm": "visual.ln_pre",
    **{f"image.blocks.*.{ours}": f"visual.transformer.resblocks.*.{theirs}" for ours, theirs in _BLOCK.items()},
    "image.norm": "visual.ln_post",
    "image.projection.weight": "visual.proj.T",
    **{f"image.{ours}": f"visual.{theirs}" for ours, theirs in _CONVOLUTIONS.items()},
    **{
        f"image.stages.layer{stage}.*.{ours}": f"visual.layer{stage}.*.{theirs}"
        for stage in (1, 2, 3, 4)
        for ours, theirs in _BOTTLENECK.items()
    },
    "image.pool.positions.weight": "visual.attnpool.positional_embedding",
    "image.pool.q": "visual.attnpool.q_proj",
    "image.pool.kv": "visual.attnpool.[k_proj,v_proj]",
    "image.pool.out": "visual.attnpool.c_proj",
    "logit_scale": "logit_scale",
}
OPENAI = 49_408  # vocabulary size; for another one, the config must name the directory's tokenizer for open_clip
FILES = "open_clip_config.json", "open_clip_model.safetensors"
# the last three are in OpenAI's archives
NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")

# Settings, by part of the config, with the only value that keifu implements.
_WHOLE = {"init_logit_bias": None, "nonscalar_logit_scale": False, "custom_text": False, "multimodal_cfg": None}
_BOTH = {
    "ls_init_value": None, "output_tokens": False, "block_type": None, "qk_norm": False, "scaled_cosine_attn": False,
    "scale_heads": False, "scale_attn_inner": False, "scale_attn": False, "scale_fc": False,
}  # fmt: skip
_VISION = _BOTH | {"attentional_pool": False, "no_ln_pre": False, "pool_type": "tok", "timm_model_name": None}
_TEXT = _BOTH | {
    "hf_model_name": None, "embed_cls": False, "no_causal_mask": False, "proj_bias": False, "proj_type": "linear",
}  # fmt: skip


def from_open_clip(json: dict[str, Any]) -> clip.Config:
    """Read the Config of an open_clip_config.json."""
    config, vision, text = json["model_cfg"], json["model_cfg"]["vision_cfg"], json["model_cfg"]["text_cfg"]
    for part, fixed in ((config, _WHOLE), (vision, _VISION), (text, _TEXT)):
        for name, only in fixed.items():
            if part.get(name, only) not in (only, None):
                raise ValueError(f"it sets {name} to {part[name]!r}, and keifu implements {only!r} alone.")
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise ValueError(f"its text pool_type is {text['pool_type']!r}, and keifu implements argmax and eos.")
    embedding, quick = config["embed_dim"], config.get("quick_gelu", False)
    image = _image(vision, embedding, quick)
    pixels = _pixels(json.get("preprocess_cfg") or {}, image.image_size)
    return clip.Config(_text(text, embedding, quick), image, pixels)


def _text(json: dict[str, Any], embedding: int, quick: bool) -> clip_text.Config:
    return clip_text.Config(
        vocab_size=json.get("vocab_size", 49_408),
        context_length=json.get("context_length", 77),
        n_heads=json.get("heads", 8),
        end_id=json.get("eos_id", 2) if json.get("pool_type", "argmax") == "eos" else None,
        **_transformer(json, json.get("width", 512), embedding, quick),
    )


def _transformer(json: dict[str, Any], dim: int, embedding: int, quick: bool) -> dict[str, Any]:
    norm, act = json.get("norm_kwargs") or {}, json.get("act_kwargs") or {}
    if norm.keys() - {"eps"} or act not in ({}, {"approximate": "tanh"}, {"approximate": "none"}) or (quick and act):
        raise ValueError(f"it has norm_kwargs {norm!r} and act_kwargs {act!r}, which keifu does not implement.")
    exact = "gelu_tanh" if act.get("approximate") == "tanh" else "gelu"
    return {
        "dim": dim,
        "hidden_dim": int(dim * json.get("mlp_ratio", 4.0)),
        "n_layers": json.get("layers", 12),
        "norm_eps": float(norm.get("eps", 1e-5)),
        "activation": "quick_gelu" if quick else exact,
        "embedding_dim": embedding,
    }


def _image(json: dict[str, Any], embedding: int, quick: bool) -> clip_image.Config | clip_image.ResNetConfig:
    size, head = clip_image.square(json.get("image_size", 224), "image_size"), json.get("head_width", 64)
    if isinstance(json.get("layers", 12), list | tuple):
        width = json.get("width", 64)
        return clip_image.ResNetConfig(size, width, tuple(json["layers"]), width * 32 // head, embedding)
    dim = json.get("width", 768)
    patch = clip_image.square(json.get("patch_size", 16), "patch_size")
    return clip_image.Config(size, patch, n_heads=dim // head, **_transformer(json, dim, embedding, quick))


def _pixels(json: dict[str, Any], image_size: int) -> Pixels:
    mode, resample = json.get("resize_mode") or "shortest", json.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash"):
        raise ValueError(f"its resize_mode is {mode!r}, and keifu implements shortest and squash.")
    if resample not in ("bicubic", "bilinear"):
        raise ValueError(f"its interpolation is {resample!r}, and keifu implements bicubic and bilinear.")
    mean, std = tuple(json.get("mean") or MEAN), tuple(json.get("std") or STD)
    return Pixels(image_size, image_size, resample, mode == "squash", mean, std)


def to_open_clip(config: clip.Config) -> dict[str, Any]:
    """Return the open_clip_config.json."""
    text, image, pixels = config.text, config.image, config.pixels
    quick = {text.activation, vars(image).get("activation", text.activation)} == {"quick_gelu"}
    words = {"context_length": text.context_length, "vocab_size": text.vocab_size, "heads": text.n_heads}
    words |= {} if text.vocab_size == OPENAI else {"hf_tokenizer_name": "the tokenizer next to this file"}
    end = {} if text.end_id is None else {"pool_type": "eos", "eos_id": text.end_id}
    return {
        "model_type": "open_clip",
        "model_cfg": {
            "embed_dim": text.embedding_dim,
            "quick_gelu": quick,
            "vision_cfg": {"image_size": image.image_size} | _SEEN[type(image)](image),
            "text_cfg": words | _widths(text) | end,
        },
        "preprocess_cfg": {
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "interpolation": pixels.resample,
            "resize_mode": "squash" if pixels.squash else "shortest",
        },
    }


def _widths(config: clip_text.Config | clip_image.Config) -> dict[str, Any]:
    """Return the published fields of an encoder except its heads. Defaults are left out."""
    norm = {} if config.norm_eps == 1e-5 else {"norm_kwargs": {"eps": config.norm_eps}}
    act = {"act_kwargs": {"approximate": "tanh"}} if config.activation == "gelu_tanh" else {}
    exact = config.hidden_dim / config.dim
    ratio = exact if int(config.dim * exact) == config.hidden_dim else (config.hidden_dim + 0.5) / config.dim
    return {"width": config.dim, "layers": config.n_layers, "mlp_ratio": ratio, **norm, **act}


def _seen_by_transformer(config: clip_image.Config) -> dict[str, Any]:
    return {"patch_size": config.patch_size, "head_width": config.dim // config.n_heads, **_widths(config)}


def _seen_by_resnet(config: clip_image.ResNetConfig) -> dict[str, Any]:
    head = config.width * 32 // config.n_heads
    return {"layers": list(config.layers), "width": config.width, "patch_size": None, "head_width": head}


_SEEN: dict[type, Any] = {clip_image.Config: _seen_by_transformer, clip_image.ResNetConfig: _seen_by_resnet}
