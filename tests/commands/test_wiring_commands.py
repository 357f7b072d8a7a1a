"""Every option of every command has a row in a table: another value of it reaches the function that uses it.

A new option needs a row here. A broken path means that something was renamed: rename it in the row.
"""

import shutil
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command_wiring
import pytest
import torch
from command_wiring import STDOUT, Row, Table, reached
from PIL import Image

import keifu.serving.app  # noqa: F401 (its types are looked at before any is replaced)
from keifu.commands.shared.command_names import COMMANDS, module_of
from keifu.commands.shared.flags import OnDevice
from keifu.commands.shared.help_text import arguments_of
from keifu.data.text.passages import Passage
from keifu.evaluation.registry import EvalOptions
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline
from keifu.inference.images.png_metadata import ImageRecord
from keifu.inference.speech.transcription import Segment, Transcript

WITHOUT = ("train", "demo")  # their options are those of recipes, which have tables of their own
SAMPLING = {"max-tokens": 7, "temperature": 0.5, "top-k": 7, "top-p": 0.5, "min-p": 0.25, "repetition-penalty": 1.5,
            "presence-penalty": 0.5, "frequency-penalty": 0.25, "top-n-sigma": 1.5, "seed": 7}  # fmt: skip
PICTURES = (Path("a.png"), Path("b.png"))
CONFIG = SimpleNamespace(context_length=64)
WRITER = (SimpleNamespace(config=CONFIG), SimpleNamespace(generation_config={}, chat_template=None))
CHATTER = (WRITER[0], SimpleNamespace(generation_config={}, chat_template="x"))


def sampling(target: str, path: str) -> dict[str, Row]:
    """Return the rows of the sampling options. path: the path of the settings."""
    rows = {name: Row(f"--{name} {value}", target, f"{path}.{name.replace('-', '_')}", value)
            for name, value in SAMPLING.items()}  # fmt: skip
    return rows | {"stop": Row("--stop a --stop b", target, f"{path}.stop", ("a", "b"))}


def on_device() -> dict[str, Row]:
    """Return the rows of the options that all commands that run a model have."""
    target = "keifu.commands.shared.flags:choosing"
    rows = {"device": Row("--device cpu", target, "choice.device", "cpu"),
            "precision": Row("--precision bfloat16", target, "choice.weights", "bfloat16")}  # fmt: skip
    return rows | {"allow-nonfinite": Row("--allow-nonfinite", target, "choice.allow_nonfinite")}


COMPARED = "keifu.training.run.compared:write_compared"
REWARDS = "keifu.recipes.assistant.finetuning:make_rewards"
GENERATE = "keifu.commands.generate:print_text"
CHOSEN, LOAD = "keifu.commands.generate:print_chosen", "keifu.commands.generate:load_writer"
UNMASKING = "keifu.inference.text.unmasking"


class Masker(torch.nn.Module):
    """A model of masked diffusion."""

    config = SimpleNamespace(mask_token=1, context_length=8)

    def predict_masked(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


MASKED: dict[str, Any] = {LOAD: (Masker(), None)}
generate = Table("generate M Hi", {
    "MODEL": Row("", LOAD, "name", "other", base="generate other Hi"),
    "PROMPT": Row("", GENERATE, "prompt", "Ho", base="generate M Ho"),
    "file": Row("--file text.txt", GENERATE, "prompt", "Hi\n\none"),
    "raw": Row("--raw", "keifu.inference.text.generate:as_prompt", "raw"),
    "image": Row("--image a.png --image b.png", "keifu.commands.generate:read_pictures", "0", PICTURES,
                 returns={"keifu.inference.chat.prompts:refuse_pictures": None}),
    "json": Row("--json", GENERATE, "as_json"),
    "stream": Row("--stream", GENERATE, "streamed"),
    "guesses": Row("--guesses 7", GENERATE, "guesses", 7),
    "draft": Row("--draft D", "keifu.commands.generate:proposer", "draft", "D"),
    "thinking": Row("--thinking off", "keifu.inference.text.generate:as_prompt", "enable_thinking", False),
    "steps": Row("--steps 7", f"{UNMASKING}:write", "how.steps", 7, returns=MASKED),
    "block": Row("--block 7", f"{UNMASKING}:write", "how.block", 7, returns=MASKED),
    "gap": Row("--gap 7", f"{UNMASKING}:fill_gaps", "tokens", 7, returns=MASKED),
    "vote": Row("--vote 3", CHOSEN, "options.vote", 3),
    "best-of": Row("--best-of 3 --reward r", CHOSEN, "options.best_of", 3),
    "reward": Row("--best-of 3 --reward r", REWARDS, "name", "r"),
    "weights": Row("--weights int8", LOAD, "weights", "int8"),
    **sampling(GENERATE, "sampling"),
}, {LOAD: WRITER, REWARDS: SimpleNamespace(scorer=None),
    "keifu.inference.text.generate:as_prompt": lambda _, text, *more, **options: text})  # fmt: skip

ANSWER, LOADED = "keifu.commands.chat:print_answer", "keifu.commands.shared.inputs:load_writer"
TALK = "keifu.inference.chat.conversation:Conversation"
DOCUMENTS = "keifu.commands.chat:open_documents"
chat = Table("chat M Hi", {
    "MODEL": Row("", LOADED, "name", "other", base="chat other Hi"),
    "QUESTION": Row("", ANSWER, "message", "Ho", base="chat M Ho"),
    "file": Row("--file text.txt", ANSWER, "message", "Hi\n\none"),
    "system": Row("--system Briefly", TALK, "system", "Briefly"),
    "guesses": Row("--guesses 7", TALK, "guesses", 7),
    "draft": Row("--draft D", "keifu.commands.shared.inputs:proposer", "draft", "D"),
    "cache-folder": Row("--cache-folder kept", TALK, "folder.path", Path("kept")),
    "cache-size": Row("--cache-folder kept --cache-size 7K", TALK, "folder.limit", 7168),
    "thinking": Row("--thinking off", TALK, "options.enable_thinking", False),
    "image": Row("--image a.png --image b.png", "keifu.commands.shared.inputs:read_pictures", "0", PICTURES),
    "json": Row("--json", "keifu.commands.chat:print_completion"),
    "weights": Row("--weights int8", LOADED, "weights", "int8"),
    "documents": Row("--documents text.txt", DOCUMENTS, "folder", Path("text.txt")),
    "rerank": Row("--documents text.txt --rerank other", DOCUMENTS, "rerank", "other"),
    "least-similarity": Row("--documents text.txt --least-similarity 0.5", DOCUMENTS, "least_similarity", 0.5),
    **sampling(ANSWER, "sampling"),
}, {LOADED: CHATTER, TALK: SimpleNamespace(complete=lambda *_: None, config=CONFIG)})  # fmt: skip

ENCODER, EMBEDDED = "keifu.commands.embed:load_encoder", "keifu.inference.embeddings.encoders:embed_rows"
IDS, NEAREST = "keifu.commands.embed:ids", "keifu.inference.embeddings.encoders:nearest"
embed = Table("embed M one two", {
    "MODEL": Row("", ENCODER, "name", "other", base="embed other one"),
    "TEXT ...": Row("three", IDS, "texts", ["one", "two", "three"]),
    "file": Row("--file text.txt", IDS, "texts", ["one"], base="embed M"),
    "out": Row("--out v.npy", "keifu.commands.embed:write_atomic", "path", Path("v.npy")),
    "nearest": Row("--nearest 1", NEAREST, "count", 1),
    "among": Row("--among text.txt", IDS, "texts", ["one"], base="embed M one two --nearest 1",
                 returns={NEAREST: (torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))}),
    "truncate": Row("--cut", IDS, "cut"),
    "batch-size": Row("--batch-size 7", EMBEDDED, "batch_size", 7),
}, {ENCODER: (WRITER[0], SimpleNamespace(pad_id=0)), EMBEDDED: torch.zeros(2, 3), IDS: [[1], [2]]})  # fmt: skip

SEARCH = "keifu.inference.embeddings.search"
ENCODED = (WRITER[0], SimpleNamespace(pad_id=0))


class Found:
    """An index that has one passage."""

    def nearest(self, _: object, count: int) -> list[tuple[float, Passage]]:
        command_wiring.passed(count)
        return [(0.5, Passage("f", 1, "h", "t"))]


search = Table("search text.txt Hi", {
    "FOLDER": Row("", f"{SEARCH}:index_path", "source", Path("."), base="search . Hi"),
    "QUESTION": Row("", "keifu.commands.search:ids", "texts", ["Ho"], base="search text.txt Ho"),
    "count": Row("--count 7", "command_wiring:passed", "value", 7),
    "model": Row("--model other", "keifu.commands.search:load_encoder", "name", "other"),
    "batch-size": Row("--batch-size 7", f"{SEARCH}:build_index", "batch_size", 7),
    "rerank": Row("--rerank other", "keifu.commands.search:load_reranker", "name", "other"),
    "json": Row("--json", STDOUT, lambda text: text.startswith('{"similarity": 0.5, "file": "f"')),
}, {"keifu.commands.search:load_encoder": ENCODED, "keifu.checkpoints.hub:weights_identity": "m",
    f"{SEARCH}:index_path": Path("i"), f"{SEARCH}:count_new": 0, f"{SEARCH}:build_index": Found(),
    "keifu.commands.search:ids": [[1]], "keifu.commands.search:load_reranker": ENCODED,
    "keifu.inference.embeddings.reranker:rank": SimpleNamespace(shortened=0, scores=torch.ones(1)),
    EMBEDDED: torch.zeros(1, 3)})  # fmt: skip

JUDGED = "keifu.commands.classify:_probabilities"
EXAMPLES = "keifu.data.classification.input_formats:read_examples"
LABELS, PAIRS = "keifu.inference.embeddings.clip:label_points", "keifu.evaluation.images.retrieval:split_pairs"
TWO = ((), ())
CONFUSION = SimpleNamespace(picture=lambda: b"", to_json=dict, verdict=str, result=lambda what: TWO, matrix=lambda: TWO)
FORM = SimpleNamespace(answers=False, columns=("text",))
JUDGE = SimpleNamespace(form=FORM, labels=("a", "b"), choices=lambda row: ("a", "b"))
TOWERS = "keifu.inference.embeddings.clip"
PICTURES = {f"{TOWERS}:{name}": None for name in ("two_towers", "embed_pictures")} | {
    "keifu.evaluation.images.retrieval:images": None,
    "keifu.checkpoints:load": (None, None), PAIRS: SimpleNamespace(test=SimpleNamespace(classes=["a", "b"])),
    "keifu.checkpoints.hub:locate": Path("m"), "keifu.commands.evaluate:training_facts": {},
    f"{TOWERS}:preprocessing": SimpleNamespace(crop=8),
}  # fmt: skip
classify = Table("classify M one", {
    "MODEL": Row("", "keifu.commands.classify:_load", "name", "other", base="classify other one"),
    "TEXT ...": Row("two", "keifu.commands.classify:texts_from", "arguments", ("one", "two")),
    "file": Row("--file text.txt", "keifu.commands.classify:texts_from", "file", Path("text.txt"), base="classify M"),
    "on": Row("--on table.csv", EXAMPLES, "source", "table.csv", base="classify M"),
    "text": Row("--text body", EXAMPLES, "columns", ("body",), base="classify M --on table.csv"),
    "columns": Row("--columns a b", EXAMPLES, "columns", ("a", "b"), base="classify M --on table.csv"),
    "label": Row("--label kind", EXAMPLES, "label", "kind", base="classify M --on table.csv"),
    "encoding": Row("--encoding cp932", EXAMPLES, "encoding", "cp932", base="classify M --on table.csv"),
    "labels": Row("--labels x,y", LABELS, "labels", ["x", "y"], base="classify M --on emoji", returns=PICTURES),
    "template": Row("--template {}s --template a{}", LABELS, "templates", ("{}s", "a{}"), base="classify M --on emoji",
                    returns=PICTURES),
    "picture": Row("--picture a.png", "keifu.commands.classify:write_atomic", "path", Path("a.png"),
                   base="classify M --on table.csv"),
    "cut": Row("--cut", JUDGED, "cut"),
    "json": Row("--json", STDOUT, lambda text: text.startswith("{}"), base="classify M --on table.csv"),
}, {"keifu.commands.classify:_load": JUDGE, JUDGED: torch.ones(1, 2),
    "keifu.evaluation.classification.labelled_texts:confusion_of": CONFUSION,
    EXAMPLES: SimpleNamespace(classes=["a"], rows=[]),
    "keifu.data.classification.input_formats:examples_of": SimpleNamespace(rows=[])})  # fmt: skip

TRANSCRIPT = Transcript("Hi", "en", 1.0, [Segment(0.0, 1.0, " Hi", [1], -0.1, 0.0)])
TRANSLATED, TRANSLATOR = "keifu.inference.text.translation:translate_texts", "keifu.commands.translate:load_translator"
translate = Table("translate M Hi", {
    "MODEL": Row("", TRANSLATOR, "name", "other", base="translate other Hi"),
    "TEXT": Row("", TRANSLATED, "texts", ["Ho"], base="translate M Ho"),
    "file": Row("--file text.txt", TRANSLATED, "texts", ["one"], base="translate M"),
    "beam": Row("--beam 7", TRANSLATED, "settings.beam", 7),
    "alpha": Row("--alpha 0.25", TRANSLATED, "settings.alpha", 0.25),
    "max-tokens": Row("--max-tokens 7", TRANSLATED, "settings.max_tokens", 7),
    "batch-size": Row("--batch-size 7", TRANSLATED, "settings.batch_size", 7),
    "json": Row("--json", STDOUT, lambda text: text.startswith('{"source": "Hi"')),
    "weights": Row("--weights int8", TRANSLATOR, "weights", "int8"),
}, {TRANSLATOR: (None, None), TRANSLATED: [[]]})  # fmt: skip

HEARD, SOUND = "keifu.inference.speech.transcription:transcribe", "keifu.data.audio.recordings:read_sound"
transcribe = Table("transcribe M a.wav", {
    "MODEL": Row("", "keifu.checkpoints:load", "0", "other", base="transcribe other a.wav"),
    "FILE...": Row("", SOUND, "source", Path("b.wav"), base="transcribe M b.wav"),
    "format": Row("--format srt", STDOUT, lambda text: text.startswith("1\n00:00:00,000 -->")),
    "language": Row("--language ja", HEARD, "settings.language", "ja"),
    "task": Row("--task translate", HEARD, "settings.task", "translate"),
    "beams": Row("--beams 7", HEARD, "settings.beams", 7),
    "previous": Row("--previous", HEARD, "settings.previous", True),
    "prompt": Row("--prompt Names", HEARD, "settings.prompt", "Names"),
    "fallback": Row("--no-fallback", HEARD, "settings.fallback", False),
    "weights": Row("--weights int8", "keifu.checkpoints:load", "weights", "int8"),
}, {"keifu.checkpoints:load": (None, None), SOUND: torch.zeros(9), HEARD: TRANSCRIPT,
    "keifu.inference.speech.transcription:speech_model": None})  # fmt: skip

JUDGEMENTS = "keifu.evaluation.pairwise:Judgements"
MODELS = "keifu.recipes.assistant.finetuning:open_model"
WRITTEN = "keifu.inference.text.generate:generate_batch"
compare = Table("compare A B --prompts prompts.jsonl", {
    "A": Row("", JUDGEMENTS, "about.A", "other", base="compare other B --prompts one.jsonl"),
    "B": Row("", MODELS, "name", "other", base="compare A other --prompts prompts.jsonl"),
    "prompts": Row("", WRITTEN, lambda a: len(a.prompts), 1, base="compare A B --prompts one.jsonl"),
    "out": Row("--out there", JUDGEMENTS, "0", Path("there")),
    "by": Row("--by reward", "keifu.commands.compare:by_reward", "name", "reward"),
    "limit": Row("--limit 1", WRITTEN, lambda a: len(a.prompts), 1),
    "json": Row("--json", STDOUT, lambda text: text.startswith("{")),
    **sampling(WRITTEN, "samplings.0"),
    "seed": Row("--seed 7", "keifu.commands.compare:by_hand", "seed", 7),
}, {MODELS: (None, SimpleNamespace(render_chat=lambda _: [1])),
    WRITTEN: lambda *a: [SimpleNamespace(text="same")] * len(a[2])})  # fmt: skip

REQUEST = "keifu.commands.evaluate:EvalRequest"
TASK = SimpleNamespace(
    OPTIONS={name for name in vars(EvalOptions)["__dataclass_fields__"]} | {"clip", "judge", "lora", "output"},
    ABOUT="x", evaluate=lambda *_: SimpleNamespace(figures={"f": 1}, tables={}, notes=(), picture=b"x", items=None),
)  # fmt: skip
EVALUATED = {
    "limit": 7, "samples": 7, "shots": 7, "by-shots": (0, 7), "seed": 7, "metric": "m", "guidance": 0.5, "sampler": "s",
    "steps": 7, "reverse": True, "by-length": True, "language": "ja", "beam": 7, "alpha": 0.25, "batch-size": 7,
    "text-field": "b", "source-field": "b", "target-field": "b", "encoding": "cp932",
}  # fmt: skip


def evaluated() -> dict[str, Row]:
    """Return the rows of the options that all evaluations have."""
    rows = {}
    for name, value in EVALUATED.items():
        typed = " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is True else str(value)
        rows[name] = Row(f"--{name} {typed}", REQUEST, f"{name.replace('-', '_')}", value)
    return rows


evaluate = Table("evaluate M --on x", {
    "MODEL": Row("", "keifu.checkpoints:load", "0", "other", base="evaluate other --on x"),
    "on": Row("", REQUEST, "on", "y", base="evaluate M --on y"),
    "clip": Row("--clip C", REQUEST, "towers", ("model", "C")),
    "judge": Row("--judge J", REQUEST, "judge", "model"),
    "lora": Row("--lora L", "keifu.checkpoints.lora.diffusion:apply_lora", "1", "L"),
    "output": Row("--output a.png", "keifu.files:write_atomic", "path", Path("a.png")),
    "json": Row("--json", STDOUT, lambda text: text.startswith("{")),
    "weights": Row("--weights int8", "keifu.checkpoints:load", "weights", "int8"),
    **evaluated(),
}, {"keifu.commands.evaluate:check_known": None, "keifu.commands.evaluate:select_task": TASK,
    "keifu.checkpoints:load": lambda name, **_: ("model", name), "keifu.checkpoints.hub:locate": Path(),
    "keifu.commands.shared.drawing:select_lora": SimpleNamespace(place="L", scale=1.0)})  # fmt: skip

ENGINE = "keifu.inference.text.engine:Engine"
bench = Table("bench M", {
    "MODEL": Row("", "keifu.checkpoints:load_model", "0", "other", base="bench other"),
    "weights": Row("--weights int8", "keifu.checkpoints:load_model", "weights", "int8"),
    "streams": Row("--streams 7", ENGINE, "max_running", 7),
    "guesses": Row("--guesses 7", ENGINE, "guesses", 7),
    "draft": Row("--draft D", "keifu.commands.shared.inputs:proposer", "draft", "D"),
    "prompt": Row("--prompt 7", "keifu.commands.bench:_check_room", "longest", 7 + 128 + 1),
    "tokens": Row("--tokens 7", "keifu.commands.bench:_check_room", "longest", 512 + 7 + 1),
    "threads": Row("--threads 1", "keifu.native.library:use_threads", "0", 1),
    "json": Row("--json", STDOUT, lambda text: text.startswith("{")),
}, {"keifu.checkpoints:load_model": SimpleNamespace(config=SimpleNamespace(context_length=999)),
    "keifu.commands.shared.inputs:load_writer": (SimpleNamespace(config=SimpleNamespace(context_length=999)), None),
    ENGINE: SimpleNamespace(runner=None), "keifu.inference.text.model:text_model": lambda model: model,
    "keifu.inference.text.model:device_of": "cpu",
    "keifu.commands.bench:_check_room": None, "keifu.commands.bench:_speeds": {"decode": 1},
    "keifu.commands.bench:_memory": {}, "keifu.commands.bench:_report": "told"})  # fmt: skip

CONVERTED, PAGE = "keifu.checkpoints:convert", "keifu.checkpoints.web:write_web"
convert = Table("convert M out", {
    "MODEL": Row("", CONVERTED, "0", "other", base="convert other out"),
    "OUT": Row("", CONVERTED, "1", Path("other"), base="convert M other"),
    "to": Row("--to gguf", CONVERTED, "2", "gguf"),
    "dtype": Row("--dtype f16", CONVERTED, "3", "f16"),
    "single-file": Row("--single-file", PAGE, "4", True, base="convert M page.html --to web"),
    "replace": Row("--replace", CONVERTED, "1", Path("text.txt"), base="convert M text.txt"),
}, {CONVERTED: None})  # fmt: skip

inspect = Table("inspect M", {
    "MODEL": Row("", "keifu.checkpoints:inspect", "0", "other", base="inspect other"),
    "json": Row("--json", STDOUT, lambda text: text.startswith("{")),
}, {"keifu.checkpoints:inspect": SimpleNamespace(as_dict=dict)})  # fmt: skip

READ, SHARDS = "keifu.data.images.dataset:read_images", "keifu.data.text.prepared:prepare_files"
TOKENIZER, SHEET = "keifu.data.tokenizers.load:load_tokenizer", "keifu.data.images.grid:grid"
PREPARE = "data prepare text.txt -o made"
SPLIT = "keifu.data.text.held_out:split_documents"
CLEARED = "keifu.data.catalogue.catalogue:remove"


class Drawings:
    """A set of pictures that says which part of it was taken."""

    def __init__(self, part: str):
        self.part, self.captions, self.classes, self.labels, self.source = part, ["a"], (), (), "x"
        self.notes = self.faults = ()

    def __len__(self) -> int:
        return 9

    def sentence(self) -> str:
        return ""

    def spread(self, count: int) -> "Drawings":
        return Drawings(f"{self.part} {count}")

    def texts(self, language: str | None) -> list[str]:
        return [str(language)]

    def take(self, _: object) -> str:
        return self.part


PARTS = SimpleNamespace(train=Drawings("train"), validation=Drawings("validation"), test=Drawings("test"), sentence=str)
data = Table("data show pictures -o sheet.png", {
    "ACTION": Row("", TOKENIZER, base="data check text.txt"),
    "NAME": Row("", READ, "source", "other", base="data show other -o sheet.png"),
    "tokenizer": Row("--tokenizer t", TOKENIZER, "path", "t", base="data check text.txt"),
    "text-field": Row("--text-field body", SHARDS, "form.field", "body", base=PREPARE),
    "encoding": Row("--encoding cp932", SHARDS, "form.encoding", "cp932", base=PREPARE),
    "yes": Row("--yes", CLEARED, base="data clear", returns={
        "keifu.data.catalogue.catalogue:of_name": [SimpleNamespace(size=1, names=("x",))], "builtins:input": "n"}),
    "json": Row("--json", STDOUT, lambda text: text.startswith("{"), base="data check text.txt", returns={
        TOKENIZER: None, "keifu.data.text.dataset_report:check_dataset": SimpleNamespace(to_json=dict, documents=1)}),
    "output": Row("-o other.png", "keifu.files:write_atomic", "path", Path("other.png"), base="data show pictures"),
    "rank": Row("--rank 1", SHARDS, "rank", 1, base=f"{PREPARE} --of 2"),
    "of": Row("--of 7", SHARDS, "of", 7, base=PREPARE),
    "count": Row("--count 7", SHEET, "0", "all 7"),
    "held-out": Row("--held-out 0.3", SPLIT, "share", 0.3, base="data show text.txt"),
    "part": Row("--part test", SHEET, "0", "test 64"),
    "language": Row("--language ja", SHEET, "1", ["ja"]),
    "size": Row("--size 7", READ, "size", 7),
    "channels": Row("--channels 1", READ, "channels", 1),
    "fit": Row("--fit pad", READ, "fit", "pad"),
    "leave-out": Row("--leave-out", READ, "leave_out"),
}, {READ: Drawings("all"), "keifu.data.images.splits:split": PARTS, TOKENIZER: None, SHEET: b""})  # fmt: skip

APP, LIMITS = "keifu.serving.app:application", "keifu.serving.worker:Limits"
ADAPTER = "keifu.checkpoints.lora.peft:is_adapter"
SERVED = "keifu.serving.models:ServedModels"
serve = Table("serve M", {
    "MODEL ...": Row("other", SERVED, "0", {"M": "M", "other": "other"}),
    "name": Row("--name alias=x", SERVED, "0", {"alias": "x", "M": "M"}),
    "lora": Row("--lora keeper=x", SERVED, "0", {"keeper": "x", "M": "M"}, returns={ADAPTER: True}),
    "allow-load": Row("--allow-load models", SERVED, "5", Path("models")),
    "allowed-host": Row("--allowed-host h", APP, lambda given: "h" in given.limits.hosts),
    "strict": Row("--strict", APP, "limits.strict"),
    "pictures": Row("--pictures shown", LIMITS, "pictures", Path("shown")),
    "search": Row("--search .", APP, "limits.documents", Path("."), returns={SERVED: SimpleNamespace(descriptions={
        "M": SimpleNamespace(name="M", uses=("embedding",))})}),
    "runs": Row("--runs training", APP, "limits.runs", Path("training")),
    "keep-alive": Row("--keep-alive 7", LIMITS, "keep_alive", 7.0),
    "host": Row("--host ::1", "keifu.serving.server:Address", "host", "::1"),
    "port": Row("--port 7", "keifu.serving.server:Address", "port", 7),
    "socket": Row("--socket s", "keifu.serving.server:Address", "path", Path("s")),
    "memory": Row("--memory 7K", SERVED, "3", 7168),
    "cache": Row("--cache 7K", LIMITS, "cache", 7168),
    "cache-folder": Row("--cache-folder kept", LIMITS, "folder.path", Path("kept")),
    "cache-size": Row("--cache-folder kept --cache-size 7K", LIMITS, "folder.limit", 7168),
    "slots": Row("--slots 7", LIMITS, "slots", 7),
    "guesses": Row("--guesses 7", LIMITS, "guesses", 7),
    "draft": Row("--draft D", "keifu.commands.shared.inputs:proposer", "draft", "D"),
    "queue": Row("--queue 7", LIMITS, "queue", 7),
    "timeout": Row("--timeout 7", LIMITS, "timeout", 7.0),
    "max-body": Row("--max-body 7K", APP, "limits.body", 7168),
    "api-key": Row("--api-key k", APP, "limits.keys", ("k",)),
    "api-key-file": Row("--api-key-file text.txt", APP, "limits.keys", ("one",)),
    "cors": Row("--cors http://a", APP, "limits.origins", ("http://a",)),
    "access-log": Row("--no-access-log", "keifu.serving.server:serve", "access_log", False, returns={APP: None}),
    "weights": Row("--weights int8", SERVED, "4", "int8"),
}, {SERVED: SimpleNamespace(descriptions={})})  # fmt: skip

DRAWER = "keifu.commands.shared.drawing"
DRAWING, RECORD = "command_wiring:passed", f"{DRAWER}:ImageRecord"
OPENED, BEST = f"{DRAWER}:load", f"{DRAWER}:best_of"
DRAWN = {"negative": "n", "truncate": True, "guidance-rescale": 0.5, "tile": 7, "towards": "t",
         "prior-steps": 7, "prior-guidance": 0.5, "candidates": 7, "upsampling-steps": 7, "eta": 0.5,
         "spacing": "trailing", "karras": True, "sampler": "euler", "steps": 7, "seed": 7, "guidance": 0.5}  # fmt: skip


class Painter(PixelPipeline):
    """A model that draws."""

    usual_sampler, usual_guidance, pixels = "ddim", 1.0, True

    def __init__(self) -> None:
        """Have no network."""

    def label(self, name: str) -> int:
        return 10 * int(name)

    def resolved(self, request: object) -> object:
        return command_wiring.passed(request)

    def fingerprint(self) -> str:
        return ""


RECORDED = ImageRecord("M", "", ImageRequest("ddim", seed=1), number=None)


def drawn() -> dict[str, Row]:
    """Return the rows of the options that are settings of a drawing."""
    words = {name: f"--{name}" if value is True else f"--{name} {value}" for name, value in DRAWN.items()}
    return {name: Row(words[name], DRAWING, f"value.{name.replace('-', '_')}", value) for name, value in DRAWN.items()}


draw = Table("draw M text", {
    "MODEL": Row("", f"{DRAWER}:planned", "name", "other", base="draw other text"),
    "TEXT": Row("", DRAWING, "value.text", "other", base="draw M other"),
    "out": Row("-o other.png", f"{DRAWER}:write_atomic", "path", Path("other.png"),
               returns={RECORD: RECORDED}),
    "label": Row("--label 3", DRAWING, "value.label", 30),
    "size": Row("--size 8x16", DRAWING, "value.size", (16, 8)),
    "init": Row("--init a.png", DRAWING, lambda a: Path(a.value.init.place).name, "a.png"),
    "mask": Row("--mask a.png", DRAWING, lambda a: Path(a.value.mask.place).name, "a.png",
                base="draw M text --init a.png"),
    "strength": Row("--strength 0.5", DRAWING, "value.strength", 0.5, base="draw M text --init a.png"),
    "lora": Row("--lora L --lora K", OPENED, "loras", ("LoRA L", "LoRA K")),
    "count": Row("--count 7", RECORD, "count", 7),
    "batch-size": Row("--batch-size 2", RECORD, "batch_size", 2, base="draw M text --count 5"),
    "best-of": Row("--best-of 7", RECORD, "count", 7, base="draw M text --clip C"),
    "clip": Row("--clip C", BEST, "clip", "C", base="draw M text --best-of 7", returns={RECORD: RECORDED}),
    "strip": Row("--strip s.png", f"{DRAWER}:draw_images", "states", [], returns={RECORD: RECORDED}),
    "again": Row("--again text.txt", f"{DRAWER}:read_record", "path", Path("text.txt"),
                 base="draw"),
    **drawn(),
}, {f"{DRAWER}:planned": "plan", OPENED: lambda *_: Painter(), f"{DRAWER}:usual_dtype": None,
    f"{DRAWER}:select_lora": "LoRA {}".format, f"{DRAWER}:check": None,
    f"{DRAWER}:draw_images": torch.zeros(7, 3, 2, 2), f"{DRAWER}:png": b""})  # fmt: skip

PLANNED = "keifu.training.hardware.plan:plan"
plan = Table("plan gpt2", {
    "MODEL": Row("", "keifu.commands.reference.plan:architecture", lambda a: a.size.name, "gpt2-xl",
                 base="plan gpt2-xl"),
    "devices": Row("--devices 7xA100-80G", PLANNED, "1", 7),
    "tokens": Row("--tokens 7B", "keifu.commands.reference.plan:_training", "tokens", 7e9, returns={PLANNED: None}),
    "batch": Row("--batch 7M", PLANNED, "3", 7e6),
    "context-length": Row("--context-length 7", "keifu.commands.reference.plan:architecture", "context_length", 7),
    "optimizer-state": Row("--optimizer-state int8", PLANNED, "trained.optimizer_state", "int8"),
    "lora.rank": Row("--lora.rank 7", PLANNED, "trained.rank", 7),
    "lora.base": Row("--lora.rank 7 --lora.base int4", PLANNED, "trained.base", "int4"),
    "inference": Row("--inference", "keifu.training.hardware.plan:inference"),
})  # fmt: skip

lineage = Table("lineage", {
    "NAME": Row("gpt2", STDOUT, lambda text: "GPT-2" in text and "perceptron" not in text),
    "output": Row("-o page.html", "keifu.commands.reference.lineage:write_atomic", "path", Path("page.html")),
    "language": Row("--language ja", STDOUT, lambda text: "新しい点" in text and "what was new" not in text),
})  # fmt: skip
eject = Table("eject", {
    "NAME": Row("gpt2", STDOUT, lambda text: text.startswith('"""GPT-2') and "def main" in text),
    "weights": Row("--weights w", "keifu.commands.reference.eject:model_file", "1", Path("w"), base="eject M"),
})  # fmt: skip
report = Table("report a b", {
    "RUN...": Row("", COMPARED, "1", (Path("c"), Path("d")), base="report c d"),
    "output": Row("-o x.html", COMPARED, "0", Path("x.html")),
})  # fmt: skip
models = Table("models", {"NAME": Row("gpt2", STDOUT, lambda text: "gpt2-xl" in text and "llama" not in text)})
completion = Table("completion bash", {
    "bash|zsh|fish": Row("", "keifu.commands.reference.completion:script", "shell", "fish", base="completion fish")
})  # fmt: skip


def tables() -> dict[str, Table]:
    """Return all tables, by their commands."""
    return {name: table for name, table in globals().items() if isinstance(table, Table)}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("one\n")
    Image.new("RGB", (8, 8), "white").save("a.png")
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    Path("one.jsonl").write_text('{"prompt": "a"}\n')


def names(command: str) -> set[str]:
    """Return the options of a command without dashes, and the spelling of its positional arguments."""
    kind = import_module(module_of(command)).Options
    found = set[str]()
    for argument in arguments_of(kind):
        long = [name.removeprefix("--").replace("[no-]", "") for name in argument.names if name.startswith("--")]
        found.add(long[0] if long else argument.spelled.strip("[]"))
    return found - {"help"}


@pytest.mark.parametrize("command", sorted(tables()))
def test_every_option_of_a_command_has_a_row(command: str) -> None:
    kind = import_module(module_of(command)).Options
    rows = {*tables()[command].rows, *(on_device() if issubclass(kind, OnDevice) else ())}
    assert names(command) == rows, f"give each option of keifu {command} a row in {Path(__file__).name}"


def test_every_command_has_a_table() -> None:
    assert tables().keys() == COMMANDS.keys() - {*WITHOUT}


@pytest.mark.parametrize("option", on_device())
@pytest.mark.parametrize("command", sorted(tables()))
def test_an_option_of_all_models_reaches_what_uses_it(command: str, option: str, capsys) -> None:
    if issubclass(import_module(module_of(command)).Options, OnDevice):
        row, base = on_device()[option], tables()[command].base.split()
        assert reached([*base, *row.words.split()], row, {}, capsys) == row.expected
        assert reached(base, row, {}, capsys) != row.expected


CASES = [(command, option) for command, table in tables().items() for option in table.rows]


@pytest.mark.parametrize(("command", "option"), CASES, ids=["-".join(case) for case in CASES])
def test_an_option_reaches_what_uses_it(command: str, option: str, capsys: pytest.CaptureFixture) -> None:
    table, row = tables()[command], tables()[command].rows[option]
    base = (row.base or table.base).split()
    found = reached([*base, *row.words.split()], row, table.returns, capsys)
    assert found == row.expected, f"keifu {' '.join(base)} {row.words}"
    before = None
    shutil.rmtree("runs", ignore_errors=True)
    with suppress(Exception):
        before = reached((row.base or table.base if row.words else table.base).split(), row, table.returns, capsys)
    assert before != row.expected, "the value is also reached without the option"
