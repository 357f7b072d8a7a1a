"""GGUF files of llama.cpp: reading, writing, and the metadata of each architecture."""
