"""Sentences per second of beam search, compared with transformers' generate and CTranslate2 on the same weights.

python benchmarks/beam.py [--dim 512] [--layers 6] [--vocab 16000] [--beams 4] [--sentences 128] [--dtype float32]
    [--weights bf16 int8] [--json FILE]
python benchmarks/beam.py --model runs/transformer --data tatoeba-ja-en     (a trained model, on its test sentences)

The default model has random weights and never ends a text: every sentence gets `--tokens` tokens. A trained model ends
its texts; then each side uses its default length penalty and stopping rule. transformers gets batches of `--batch-size`
sentences, once in the given order and once sorted by length. CTranslate2 (only with random weights, if it is installed)
computes in float32 like the others, and sorts the sentences. With `--weights` keifu's decoder is packed for the native
step, and CTranslate2 has the same number of bits if it supports them here.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from operator import eq
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from _results import typed, usual, write_timing
from _rounds import interleaved, machine

from keifu import checkpoints
from keifu.data.padding import pad
from keifu.data.translation.pairs import read_pairs, split
from keifu.inference.text.translation import TranslationParams, search

Sources = list[list[int]]
SECTION, BASE = "Beam search", "transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"dim": 512, "layers": 6, "vocab": 16_000, "beams": 4, "sentences": 128, "tokens": 32}
    for name, value in {**sizes, "batch-size": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--weights", nargs="*", default=[], choices=("f32", "bf16", "int8", "int4"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="tatoeba-ja-en")
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        folder = options.model or save_random(options, Path(directory))
        theirs = hf.MarianMTModel.from_pretrained(folder).eval()
        widths = ["float32"] * (options.dtype == "float32") + ["int8"] * ("int8" in options.weights)
        faster = {} if options.model else ctranslate(theirs, Path(directory) / "ct2", widths)
        theirs = theirs.to(getattr(torch, options.dtype))
        ours: Any = checkpoints.load_model(folder).to(getattr(torch, options.dtype))
        packed: Any = {width: checkpoints.load_model(folder, weights=width) for width in options.weights}
    sources = trained_sources(options, folder) if options.model else random_sources(options)
    settings = TranslationParams(options.beams, 1.0, None if options.model else options.tokens, options.batch_size)
    contenders = {
        BASE: lambda: generate(theirs, sources, options),
        "transformers, sorted": lambda: generate(theirs, sorted(sources, key=len), options),
        "keifu": lambda: search(ours, sources, settings),
    }
    contenders |= {f"keifu, {width}": partial(search, model, sources, settings) for width, model in packed.items()}
    contenders |= {f"CTranslate2, {width}": partial(run, sources, options) for width, run in faster.items()}
    own = [each.tokens for each in contenders["keifu"]()]
    others = [name for name in contenders if name.partition(",")[0] != "keifu" and "sorted" not in name]
    found = {name: contenders[name]() for name in others}
    found |= {f"keifu, {width}": [each.tokens for each in contenders[f"keifu, {width}"]()] for width in packed}
    told = ", ".join(f"{sum(map(eq, texts, own))} of {len(own)} of {name}'s" for name, texts in found.items())
    kind = options.model or f"dim {options.dim}, {options.layers} layers, vocabulary {options.vocab}, random weights"
    print(f"{machine()}; {kind}, {options.dtype}, {options.beams} beams, {options.rounds} rounds")
    print(f"Best texts that are equal: {told}.\n")
    task = {"amount": len(sources), "seconds": interleaved(contenders, options.rounds)}
    values = {"tasks": {"sentences": task}, "against": dict.fromkeys(contenders, [BASE])}
    columns = ["", "sentences/s", f"ratio to {BASE}"]
    write_timing(options.json, SECTION, typed("beam.py", vars(options), usual(parser)), columns, values)


def ctranslate(
    model: Any, folder: Path, widths: Sequence[str]
) -> dict[str, Callable[[Sources, argparse.Namespace], Sources]]:
    """Return for each width a function that searches by CTranslate2 with these weights; {} if it is not installed."""
    if find_spec("ctranslate2") is None:
        return {}
    import ctranslate2
    from ctranslate2.converters.transformers import MarianMTLoader

    loader, names = MarianMTLoader(), ["</s>", "<unk>", *map(str, range(2, model.config.vocab_size - 1))]
    spec = loader.get_model_spec(model)
    loader.set_vocabulary(spec, names)
    spec.config.eos_token, spec.config.unk_token, spec.config.decoder_start_token = names[0], names[1], names[0]
    spec.validate()
    spec.optimize()
    folder.mkdir()
    spec.save(folder)
    numbers = {name: number for number, name in enumerate(names)}

    def run(translator: Any, sources: Sources, options: argparse.Namespace) -> Sources:
        found = translator.translate_batch(
            [[names[each] for each in ids] for ids in sources], beam_size=options.beams, length_penalty=1.0,
            max_decoding_length=options.tokens, max_batch_size=options.batch_size,
        )  # fmt: skip
        return [[numbers[name] for name in each.hypotheses[0]] for each in found]

    made = {each: ctranslate2.Translator(str(folder), compute_type=each, intra_threads=torch.get_num_threads())
            for each in widths}  # fmt: skip
    return {each: partial(run, translator) for each, translator in made.items()}


def save_random(options: argparse.Namespace, directory: Path) -> Path:
    """Save a random Marian model that never ends a sequence, and return its directory."""
    last = options.vocab - 1
    config = hf.MarianConfig(
        vocab_size=options.vocab,
        decoder_vocab_size=options.vocab,
        d_model=options.dim,
        encoder_layers=options.layers,
        decoder_layers=options.layers,
        encoder_attention_heads=max(1, options.dim // 64),
        decoder_attention_heads=max(1, options.dim // 64),
        encoder_ffn_dim=4 * options.dim,
        decoder_ffn_dim=4 * options.dim,
        max_position_embeddings=512,
        pad_token_id=last,
        decoder_start_token_id=last,
        eos_token_id=0,
        forced_eos_token_id=None,
    )
    model = hf.MarianMTModel(config)
    model.final_logits_bias[0, 0] = -1e4
    model.save_pretrained(directory)
    return directory


def random_sources(options: argparse.Namespace) -> Sources:
    lengths = torch.randint(4, 30, (options.sentences,)).tolist()
    return [[*torch.randint(1, options.vocab - 1, (length,)).tolist(), 0] for length in lengths]


def trained_sources(options: argparse.Namespace, folder: Path) -> Sources:
    """Return the first held-out test sentences as token ids of the model's tokenizer."""
    model, tokenizer = checkpoints.load(folder)
    config: Any = model.config
    rows = split(read_pairs(options.data)).test[: options.sentences]
    return [[*ids, config.end_id] for ids in tokenizer.encode_batch([source for source, _ in rows])]


def generate(model: Any, sources: Sequence[list[int]], options: argparse.Namespace) -> list[list[int]]:
    """Return the best sequences of transformers, by its stopping rule, with keifu's length limit."""
    config, found = model.config, []
    for start in range(0, len(sources), options.batch_size):
        batch = sources[start : start + options.batch_size]
        ids, mask = pad(batch, config.pad_token_id)
        limit = ids.shape[1] + 50 if options.model else options.tokens
        wanted = hf.GenerationConfig(
            num_beams=options.beams, do_sample=False, max_new_tokens=limit, length_penalty=1.0, early_stopping=False,
            eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
            decoder_start_token_id=config.decoder_start_token_id, bad_words_ids=[[config.pad_token_id]],
        )  # fmt: skip
        mask = torch.ones_like(ids) if mask is None else mask.long()
        texts = model.generate(ids, attention_mask=mask, generation_config=wanted)[:, 1:].tolist()
        found += [text[: text.index(config.eos_token_id)] if config.eos_token_id in text else text for text in texts]
    return found


if __name__ == "__main__":
    main()
