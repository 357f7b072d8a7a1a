"""The size of the tree: lines of code, files in a folder, files too small to be looked up, words that were given up."""

import ast
import re
from collections import Counter, defaultdict
from functools import cache

import pytest
from test_architecture import File, imports, source

BASE_LINES = 37_000  # code lines of the package without the landmarks below, reviewed at each release
LANDMARKS = {  # code lines that each added, at most 450 (600 for a model that sees): layers, model, recipe, commands
    "Gemma 2, Granite, Ministral, nanochat, Phi's long context": 450,
    "files of mixtures: stacked experts, wide routers, text parts": 72,
    "distillation and preferences": 291,
    "students that are cut from their teacher, a recipe of distillation": 188,
    "native step and GGUF of mixtures": 118,
    "reasoning": 367,
    "speculative decoding by a draft": 117,
    "diffusion transformer": 450,
    "Stable Diffusion 3's transformer": 188,
    "shift of a flow by patches": 36,
    "Gated DeltaNet": 450,
    "locked text tower": 120,
    "whisper, its command and service": 799,
    "training of whisper": 217,
    "whisper on the native step": 131,
    "refusals of keifu train see, stops before a token": 16,
    "towers of models that see, kept as they are": 15,
    "llava": 600,
    "smolvlm, its tiles and prompts": 210,
    "questions about pictures": 131,
    "GPU memory and budgets": 300,
    "search in the service": 70,
    "GPU kernels and graphs": 339,
    "blocks of GGUF on GPUs, graphs' memory, own rows of a batch": 262,
    "models that are drawn in parts": 84,
    "LLaDA": 304,
    "plans of diffusion transformers": 38,
    "states of split models: hashes by their writers, pinned copies, cached plans": 70,
    "memory of GGUF files in the service, losses of no rows, how to install trained models": 30,
    "gradients of pods, summed in the backward pass": 47,
    "steps of a GPU that overlap": 99,
}  # fmt: skip
MOST_LINES = BASE_LINES + sum(LANDMARKS.values())
MOST_FILES = 15  # in a folder, beside __init__.py
SMALL, IMPORTERS = 40, 3  # a file with fewer code lines than this has at least so many importers
ONE_EACH = ("keifu.commands.", "keifu.recipes.")  # folders where a file is a verb or a run, whatever its size
SMALL_ON_PURPOSE = {
    "keifu.commands.shared.command_names": "the command line's start must import nothing else",
    "keifu.data.catalogue.pip_without_builds": "run as a program",
    "keifu.data.interleaving": "a method with a name, which knows no batches",
    "keifu.evaluation.intervals": "statistics, which know no model",
    "keifu.data.audio.log_mel": "features, which know no file",
    "keifu.evaluation.text.prompt_runner": "what few-shot tasks and lm-evaluation-harness share",
    "keifu.generation.speech.subtitles": "formats, which know no model",
    "keifu.generation.text.logits_processors": "the field's word for them",
    "keifu.layers.attention.packed": "what one kernel of a GPU takes, which no CPU needs",
    "keifu.layers.transformer.triton_kernels": "imported on a GPU alone",
    "keifu.layers.pooling": "an idea of its own, between models and evaluation",
    "keifu.models.mixture.olmoe": "a paper each",
    "keifu.models.sizes": "run as a program, too",
    "keifu.training.objectives.layer_losses": "an objective each",
    "keifu.training.objectives.contrastive": "an objective each",
    "keifu.training.optim.lr_schedules": "the field's word for them",
}
GIVEN_UP = {  # names of earlier versions, and what the field calls the same
    "Optimisers": "Optimizers", "Stepper": "TrainStep", "Partwise": "PartwiseOptimizer", "Adapted": "AdaptedLinear",
    "Shield": "ControlTokenGuard", "Turns": "TurnMasks", "Ranked": "RankedResponses", "Growth": "BatchSizeSchedule",
    "Preflight": "DatasetReport", "Masking": "MaskingScheme", "Asked": "EvalRequest", "Judge": "TextClassifier",
    "Drawer": "ImagePipeline", "TextDrawer": "TextToImagePipeline", "Painter": "LatentDiffusionPipeline",
    "Drawing": "ImageRequest", "Original": "InputImage", "Saying": "ImageTokenModel", "Imagining": "UnclipModel",
    "Episodes": "PPOBatches", "Finetuned": "ModelWithHead", "Rewinding": "SpikeSettings", "Outcome": "LossOutput",
    "told": "describe", "opened": "open_model", "described": "describe", "spoken": "conversation_of", "begun": "start",
    "encoded": "encode", "joined": "join", "stacked": "stack", "guided": "guide", "noisy": "add_noise",
    "finetuned": "add_head", "evaluating": "evaluation_mode", "whitened": "whiten", "truncated": "truncate",
    "synchronise": "synchronize", "dequantised": "dequantize", "trace": "gae_lambda", "foretell": "predict",
}  # fmt: skip


@cache
def code_lines(file: File) -> int:
    """Return lines with code on them: neither blank, nor comment, nor docstring."""
    documentation, strings = set[int](), set[int]()
    for node in file.nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documentation.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = enumerate(map(str.strip, file.text.split("\n")), 1)
    lines = {number for number, line in numbered if line and not line.startswith("#")}
    return len((lines | strings) - documentation)


def too_much_code(files: list[File], most: int = MOST_LINES) -> list[str]:
    total = sum(map(code_lines, files))
    return [f"{total:,} code lines, of at most {most:,}"] if total > most else []


def crowded_folders(files: list[File]) -> list[str]:
    """Return folders with too many files; of verbs, which are looked up by their names, there may be a few more."""
    counts = Counter(file.module.rpartition(".")[0] for file in files if not file.package)
    return [f"{folder}: {n} files" for folder, n in counts.items() if n > MOST_FILES]


def lonely_small_files(files: list[File]) -> list[str]:
    """Return small files that few others import: what they hold belongs into one of those."""
    importers: dict[str, set[str]] = defaultdict(set)
    for file in files:
        for name in imports(iter(file.nodes)):
            importers[name].add(file.module)
    wrong = []
    for file in files:
        free = file.package or file.module.startswith(ONE_EACH) or file.module.endswith("__main__")
        if free or file.module in SMALL_ON_PURPOSE or code_lines(file) >= SMALL:
            continue
        if len(importers[file.module]) < IMPORTERS:
            wrong.append(f"{file.module}: {code_lines(file)} lines, {len(importers[file.module])} importers")
    return wrong


def given_up_words(files: list[File]) -> list[str]:
    """Return functions and classes under a name that was given up, and texts that still speak of such a class."""
    wrong = []
    for file in files:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        names = {node.name for node in file.nodes if isinstance(node, kinds)}
        names |= {word for word in re.findall(r"`(\w+)`", file.text) if word[0].isupper()}
        wrong += [f"{file.module}: {name} is {GIVEN_UP[name]} here" for name in sorted(names & GIVEN_UP.keys())]
    return wrong


LINES = "".join(f"x{number} = 1\n" for number in range(9))
BAD = {  # for each rule the smallest tree that breaks it
    too_much_code: [File("keifu.a", "x = '''" + "\n" * MOST_LINES + "'''")],
    crowded_folders: [File(f"keifu.data.a{number}", "") for number in range(MOST_FILES + 1)],
    lonely_small_files: [File("keifu.data.a", LINES), File("keifu.data.b", "import keifu.data.a\n" + LINES * SMALL)],
    given_up_words: [File("keifu.a", "class Stepper:\n    pass\n")],
}


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_tree_keeps_the_rule(rule) -> None:
    assert rule(source()) == []


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_rule_can_fail(rule) -> None:
    assert len(rule(BAD[rule])) == 1


def test_only_code_is_counted() -> None:
    head = '"""Docstring\nof two lines."""\n\n# a comment\nx = (\n    1,  # one\n)\n'
    text = head + '\n\ndef f():\n    """What."""\n    return x\n'
    assert code_lines(File("keifu.a", text)) == 5


def test_three_importers_are_enough() -> None:
    several = [File(f"keifu.b{number}", "import keifu.data.a\n" + LINES * SMALL) for number in range(3)]
    assert lonely_small_files([File("keifu.data.a", LINES), *several]) == []


def test_a_text_that_speaks_of_a_class_by_its_old_name_is_seen() -> None:
    assert given_up_words([File("keifu.a", '"""What a `Stepper` does."""')]) != []
    assert given_up_words([File("keifu.a", '"""Stepper motors."""')]) == []
