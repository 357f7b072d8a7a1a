"""The commands, with a short description of each."""

COMMANDS = {  # each is a module in keifu/commands or keifu/commands/reference
    "train": "train a model by a recipe; without a recipe, list them",
    "generate": "continue a text with a model",
    "chat": "talk with a model in the terminal",
    "embed": "texts and pictures as vectors, and which are nearest to each other",
    "search": "the passages of a folder's documents that are nearest to a question",
    "classify": "a label for each text, or for each picture by a CLIP",
    "draw": "pictures by a model that removes noise, and a picture once more, bit for bit",
    "translate": "translate a text, line for line, with an encoder-decoder",
    "transcribe": "write down what is said in sound files, by a Whisper",
    "report": "the curves of several runs in one page; the report of one run, written again",
    "compare": "two models' answers side by side: which is better, and how often",
    "evaluate": "how good a model is: BLEU and chrF, perplexity",
    "bench": "how fast a model reads and writes here, in tokens per second",
    "serve": "models behind OpenAI's API, and a page in the browser",
    "convert": "write a model as a Hugging Face directory or as GGUF",
    "inspect": "the load report: every tensor of a model, and the settings in use",
    "data": "list, fetch and check training data",
    "models": "every published size, its parameters and the paper's figure",
    "lineage": "the landmarks in order of years: what was new, the result here and its baseline",
    "eject": "print a model as one file that needs torch alone, to copy and change",
    "plan": "what training a published model would take on given devices, on paper",
    "demo": "train a small model, then talk with a published one",
    "completion": "what makes a shell complete keifu's words with Tab",
}
REFERENCE = ("inspect", "models", "lineage", "plan", "completion", "demo", "eject", "report")


def module_of(command: str) -> str:
    """Return the name of a command's module."""
    return f"keifu.commands.{'reference.' * (command in REFERENCE)}{command}"
