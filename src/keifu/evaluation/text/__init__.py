"""Perplexity, few-shot tasks, and BLEU and chrF."""
