"""A reward for `keifu train grpo`: 1 for an answer that names what was asked for, less for each word too many."""


def score(prompt: str, answer: str, example: dict) -> float:
    """How good an answer is; `example` is the line of the file of prompts."""
    right = example["answer"].rstrip(".").lower() in answer.lower()
    return float(right) - 0.01 * len(answer.split())
