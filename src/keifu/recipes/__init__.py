"""Recipes: one file for each run of `keifu train`, with its paper, command, cost, expected result and options."""

FOLDERS = {
    "language": (
        "gpt",
        "gpt1",
        "gpt2",
        "gpt3",
        "llama",
        "llada",
        "olmo2",
        "palm",
        "palm2",
        "characters",
        "bert",
        "lstm",
        "ngram",
        "word2vec",
    ),
    "translation": ("seq2seq", "transformer", "t5"),
    "speech": ("whisper",),
    "assistant": ("sft", "distill", "see", "reward", "dpo", "ppo", "grpo", "instruct"),
    "classification": ("classifier", "gpt1-finetune"),
    "images": (
        "gan",
        "vq",
        "ddpm",
        "score",
        "dit",
        "mean-flow",
        "latent-diffusion",
        "dalle",
        "unclip",
        "clip",
        "lora-image",
    ),
    "neurons": ("perceptron", "mlp", "mlp-compare"),
}
RECIPES = {  # name in `keifu train`, and file in this folder
    name: f"{folder}.{name.replace('-', '_')}" for folder, names in FOLDERS.items() for name in names
} | {"demo": "demo"}
