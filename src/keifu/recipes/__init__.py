"""Recipes: one file for each run that `keifu train` knows, with its paper, command, cost, figure and options."""

RECIPES = {  # what `keifu train` calls each, and its file in this folder
    **{
        name: f"language.{name}"
        for name in ("gpt", "gpt1", "gpt2", "gpt3", "llama", "palm", "palm2", "characters", "bert")
    },
    **{name: f"translation.{name}" for name in ("seq2seq", "transformer")},
    **{name: f"assistant.{name}" for name in ("sft", "reward", "dpo", "ppo", "grpo", "instruct")},
    **{name: f"classification.{name.replace('-', '_')}" for name in ("classifier", "gpt1-finetune")},
    **{
        name: f"images.{name.replace('-', '_')}"
        for name in ("ddpm", "latent-diffusion", "dalle", "unclip", "clip", "lora-image")
    },
    **{name: f"neurons.{name.replace('-', '_')}" for name in ("perceptron", "mlp", "mlp-compare")},
    "demo": "demo",
}
