"""Small tokenizers in every published format."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

from keifu import checkpoints
from keifu.data.tokenizers import bpe
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.seq2seq import TwoSidedTokenizer
from keifu.data.tokenizers.train import train_tokenizer

TEXTS = ["one two three four five 12 = 3 <|im_start|> <|im_end|> Hi user assistant system\n"] * 9
UNIGRAM = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {
        "type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {
        "SpecialToken": {"id": "</s>", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": [
        ["<unk>", 0.0], ["</s>", 0.0], ["▁one", -1.0], ["▁two", -1.5], *([letter, -5.0] for letter in "▁abcdeonstw")]},
}  # fmt: skip


def vocabularies(folder: Path) -> None:
    """Write vocabularies with their merges, and lists of words."""
    tokenizer = json.loads(train_tokenizer("bpe", TEXTS, 280).backend.to_str())["model"]
    (folder / "gpt2").mkdir()
    (folder / "gpt2/vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (folder / "gpt2/merges.txt").write_text("#version\n" + "".join(f"{a} {b}\n" for a, b in tokenizer["merges"]))
    (folder / "gpt1").mkdir()
    words = ["<unk>", *"onetw", *(f"{letter}</w>" for letter in "onetw"), "on", "one</w>"]
    (folder / "gpt1/vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "gpt1/merges.txt").write_text("#version\no n\non e</w>\n")
    (folder / "bert").mkdir()
    (folder / "bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdeon"]))
    (folder / "bert/tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 9}))
    (folder / "bert/special_tokens_map.json").write_text(json.dumps({"unk_token": "[UNK]", "sep_token": "[SEP]"}))
    (folder / "clip").mkdir()
    merges = gzip.compress(b"#version\n" + b"a b\nc d\ne f")
    (folder / "clip/bpe_simple_vocab_16e6.txt.gz").write_bytes(merges)


def formats(folder: Path) -> None:
    """Write a tokenizer.json of each kind."""
    (folder / "unigram").mkdir()
    (folder / "unigram/tokenizer.json").write_text(json.dumps(UNIGRAM))
    for kind in ("characters", "wordpiece"):
        train_tokenizer(kind, TEXTS, 300, special_tokens=["</s>"]).save(folder / kind)
    bpe.learn(["a red heart", "a blue cat"] * 5, 520).save(folder / "clip")
    chat = train_tokenizer("bpe", TEXTS, 280, special_tokens=["<|im_start|>", "<|im_end|>"])
    chat.with_chat_template(CHATML).save(folder / "bpe")


def read_formats(folder: Path) -> None:
    for kind in ("unigram", "characters", "wordpiece", "clip", "bpe"):
        encode(kind, "one two")(folder)


def sentencepiece_bytes(size: int = 60, **more: object) -> bytes:
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(TEXTS), model_writer=written, vocab_size=size, minloglevel=2, hard_vocab_limit=False,
        **more,
    )  # fmt: skip
    return written.getvalue()


def sentencepiece_model(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes())


def marian(folder: Path) -> None:
    """Write two SentencePiece models and a vocabulary of the pieces of both."""
    import sentencepiece

    model = sentencepiece_bytes(pad_id=3)
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)  # pyright: ignore
    words = dict.fromkeys(["</s>", "<unk>", "<pad>", *(pieces.IdToPiece(n) for n in range(pieces.GetPieceSize()))])
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "model_max_length": 99}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))


def two_sided(folder: Path) -> None:
    source, target = (train_tokenizer("bpe", TEXTS, 280, special_tokens=["<s>", "</s>", "<pad>"]) for _ in range(2))
    TwoSidedTokenizer(source, target).save(folder)


def encode(name: str = "", text: str = "one two ①ｱｶﾞＡ㍿ﬁé½한") -> Callable[[Path], None]:
    """Return a reader that loads a tokenizer and uses it both ways, and on a conversation."""

    def read(folder: Path) -> None:
        tokenizer = load_tokenizer(folder / name)
        tokenizer.decode(tokenizer.encode(text, special=True))
        if tokenizer.chat_template is not None:
            tokenizer.render_chat([{"role": "user", "content": "Hi"}])

    return read


def generate(folder: Path) -> None:
    """Generate from a model as its generation_config.json says."""
    from keifu import generate

    model, tokenizer = checkpoints.load(folder)
    generate(model, tokenizer, "one two", max_tokens=2)


__all__ = ["TEXTS", "encode", "formats", "generate", "marian", "read_formats", "sentencepiece_model", "two_sided",
           "vocabularies"]  # fmt: skip
