"""The live elements of the site: `<div data-live="NAME"></div>` of a page becomes one that runs in the browser.

The engine, its kernel and the packaged models are copied into the site. A page with elements loads scripts and a style
sheet; the models come after a click.
"""

import os
import re
import shutil
from pathlib import Path

from keifu.page import kernel

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "pretrained/src/keifu_pretrained"
ELEMENT = re.compile(r'<div data-live="([^"]*)"></div>')
TEXT = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
UNET = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
LATENT = (
    *UNET,
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
PICTURES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")


def files_of(model: str, names: tuple[str, ...] = TEXT) -> tuple[str, ...]:
    """Return the paths of a model's files inside the folder of models."""
    return tuple(f"{model}/{name}" for name in names)


FILES = {  # of each element's models; an element without a model has none
    "perceptron": (),
    "xor": (),
    "points": (),
    "pairs": (),
    "descent": (),
    "flow": (),
    "score": (),
    "adversaries": (),
    "network": files_of("network", ("config.json", "model.safetensors")),
    "gpt-en": files_of("gpt-en"),
    "decoding": files_of("gpt-en"),
    "search": files_of("gpt-en"),
    "heads": files_of("gpt-en"),
    "comparison": files_of("gpt-en") + files_of("chat-en"),
    "bert-en": files_of("bert-en"),
    "ja-en": files_of("ja-en"),
    "digits": files_of("digits", UNET),
    "steps": files_of("digits", UNET),
    "chat-en": files_of("chat-en"),
    "emoji": files_of("emoji", LATENT),
    "emoji-clip": files_of("emoji-clip", PICTURES),
    "see": files_of("see", PICTURES),
}
WITHOUT_SCRIPT = {
    "en": "This element runs in your browser. It needs JavaScript and a web server: python -m http.server -d site",
    "ja": "この要素はブラウザーの中で動きます。JavaScript とウェブサーバーが要ります：python -m http.server -d site",
}
used: set[str] = set()


def fill(page: str, address: str) -> str:
    """Return a page of the site with what its live elements need. address: that of the page inside the site."""
    if not ELEMENT.search(page):
        return page
    live = Path(os.path.relpath("live", Path(address).parent)).as_posix()
    language = "ja" if address.startswith("ja/") else "en"
    head = f'<link rel="stylesheet" href="{live}/live.css"><script type="module" src="{live}/live.js"></script>'
    return ELEMENT.sub(lambda found: element(found[1], language), page).replace("</head>", f"{head}</head>", 1)


def element(name: str, language: str) -> str:
    """Return the element with its models' files and their size. Raises `KeyError` for an unknown name."""
    files = FILES[name]
    used.add(name)
    size = sum((MODELS / file).stat().st_size for file in files)
    data = f' data-files="{" ".join(files)}" data-bytes="{size}"' if files else ""
    return f'<div data-live="{name}"{data}><p>{WITHOUT_SCRIPT[language]}</p></div>'


def copy(site: Path) -> None:
    """Copy the scripts, the kernel and the models of the elements that pages have into the site."""
    live = site / "live"
    kernel.copy_page(site)
    for name in used:
        for file in FILES[name]:
            target = live / "models" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(MODELS / file, target)
