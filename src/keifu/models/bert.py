"""BERT (Devlin et al., 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"): a
bidirectional encoder. Its new pretraining tasks, masked language modelling and next-sentence prediction, let every
token attend to both sides. Then it is fine-tuned on a task.

Axes: batch, length = tokens, dim, vocab, labels.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.activations import activation
from keifu.layers.attention.masks import PaddingMask
from keifu.layers.attention.positions import LearnedPositions
from keifu.layers.dropout import Dropout
from keifu.layers.initialisation import truncated_normal_
from keifu.layers.linear import Linear, linear
from keifu.layers.pooling import Pooling, SentenceHead
from keifu.models import gpt1
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, NotNegative

Tokens = Int[Tensor, "batch length"]
Mask = Bool[Tensor, "batch length"]
Hidden = Float[Tensor, "batch length dim"]
ScoreActivation = Literal["sigmoid", "identity"]


@dataclass(frozen=True)
class Config:
    """The defaults are BERT-base as pretrained. The last six fields are the heads on top of the encoder."""

    vocab_size: Count = 30_522  # tokens in the vocabulary
    context_length: Count = 512  # longest sequence in tokens
    dim: Count = 768  # width of the hidden states
    hidden_dim: Count = 3072  # width inside the feed-forward layers
    n_layers: Count = 12  # Transformer blocks
    n_heads: Count = 12  # attention heads
    norm_eps: NotNegative = 1e-12  # number ε in the normalisation
    activation: str = "gelu"  # exact GELU, as in Hugging Face's copy; the original code has gelu_tanh
    dropout: BelowOne = 0.1  # share of dropped activations
    type_vocab_size: Count = 2  # kinds of segment: sentence A and sentence B
    pooling: Pooling = "mean"  # how sentence embeddings are made of the hidden states
    pooled: bool = True  # whether there is a pooled state of the first token
    words: bool = True  # whether there is the head of masked language modelling
    next_sentence: bool = True  # whether there is a head for the next sentence
    labels: tuple[str, ...] = ()  # labels of the classification head; empty: no head
    sentence_head: bool = False  # whether the classification head reads the sentence embedding, not the pooled state
    score_activation: ScoreActivation = "sigmoid"  # function of a cross-encoder's score, the logit of a single label


# The paper's 110 M and 340 M leave out the heads of pretraining.
SIZES = {
    "bert-base": Config(),
    "bert-large": Config(dim=1024, hidden_dim=4096, n_layers=24, n_heads=16),
    "all-minilm-l6-v2": Config(dim=384, hidden_dim=1536, n_layers=6, words=False, next_sentence=False),
}


class WordHead(nn.Module):
    """The head of masked language modelling without its last matrix, which is the embedding."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense, self.activation = Linear(config.dim, config.dim), activation(config.activation)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.norm(self.activation(self.dense(hidden)))


class Bert(nn.Module):
    """The encoder, and the heads that its config selects; the others are None."""

    def __init__(self, config: Config):
        super().__init__()
        pooled_labels = bool(config.labels) and not config.sentence_head
        if (config.next_sentence or pooled_labels) and not config.pooled:
            raise UserError("A head for the next sentence or for labels reads the pooled state: set pooled to True.")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = LearnedPositions(config.context_length, config.dim)
        self.segments = nn.Embedding(config.type_vocab_size, config.dim)
        self.norm, self.dropout = nn.LayerNorm(config.dim, config.norm_eps), Dropout(config.dropout)
        self.blocks = nn.ModuleList(gpt1.block(config) for _ in range(config.n_layers))
        self.classifier_dropout = Dropout(config.dropout)
        self.pooler = Linear(config.dim, config.dim) if config.pooled else None
        self.word_head = WordHead(config) if config.words else None
        self.next_head = Linear(config.dim, 2) if config.next_sentence else None
        self.classifier = Linear(config.dim, len(config.labels)) if pooled_labels else None
        self.sentence_head = (
            SentenceHead(config.dim, len(config.labels), config.pooling) if config.sentence_head else None
        )

    def encode(self, tokens: Tokens, segments: Tokens | None = None, mask: Mask | None = None) -> Hidden:
        """Return the hidden states. segments: 0 for the first sentence, 1 for the second. mask: True on real tokens."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            limit = f"the {self.config.context_length} positions that this model has learned"
            raise UserError(f"{length} tokens do not fit {limit}; shorten the text.")
        x = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        x = x + self.segments(tokens.new_zeros(1, 1) if segments is None else segments)
        x, visible = self.dropout(self.norm(x)), PaddingMask(mask)
        for block in self.blocks:
            x = block(x, mask=visible)
        return x

    forward = encode

    def pool(self, hidden: Hidden) -> Float[Tensor, "batch dim"]:
        """Return one vector per sequence: the hidden state of its first token, [CLS], after a layer with tanh."""
        return torch.tanh(_there(self.pooler, "pooled state")(hidden[:, 0]))

    def words(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Return the logits of the word at each position. The head's last matrix is the embedding."""
        return linear(self.word_states(hidden), self.head_weight, self.head_bias)

    def word_states(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Return the head's hidden states before `head_weight` and `head_bias`, for losses that compute logits in
        chunks."""
        return _there(self.word_head, "head for masked words")(hidden)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The last matrix of the masked-language-modelling head: the embedding."""
        return self.embedding.weight

    @property
    def head_bias(self) -> Float[Tensor, " vocab"]:
        """Return the bias of the masked-language-modelling head."""
        return _there(self.word_head, "head for masked words").bias

    def next_sentence(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch 2"]:
        """Return the logits of two classes: the second sentence follows the first, or it is a random one."""
        return _there(self.next_head, "head for the next sentence")(pooled)

    def classify(
        self, tokens: Tokens, segments: Tokens | None = None, mask: Mask | None = None
    ) -> Float[Tensor, "batch labels"]:
        """Return the logits of the config's labels for each row."""
        if self.sentence_head is not None:
            return self.sentence_head(self.encode(tokens, segments, mask), mask)
        head = _there(self.classifier, "labels to choose from; fine-tune it first")
        return head(self.classifier_dropout(self.pool(self.encode(tokens, segments, mask))))


def _there(head: Any, what: str) -> Any:
    if head is None:
        raise UserError(f"This BERT has no {what}.")
    return head


def build(config: Config) -> Bert:
    """Build a model with the released code's initialisation."""
    model = Bert(config)
    truncated_normal_(model, std=0.02)
    return model


def with_heads(base: nn.Module, config: Config, **heads: Any) -> Bert:
    """Build a model with the weights of `base`, whose config is `config`, and other heads. New heads are initialised,
    also the labels' head if the labels differ."""
    model, weights = build(replace(config, **heads)), base.state_dict()
    if model.config.labels != config.labels:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
    model.load_state_dict(weights, strict=False, assign=True)
    return model


_LAYER = "bert.encoder.layer.*"
WEIGHT_NAMES = {
    "embedding": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "segments": "bert.embeddings.token_type_embeddings",
    "norm": "bert.embeddings.LayerNorm",
    "blocks.*.attention.qkv": f"{_LAYER}.attention.self.[query,key,value]",
    "blocks.*.attention.out": f"{_LAYER}.attention.output.dense",
    "blocks.*.attention_norm": f"{_LAYER}.attention.output.LayerNorm",
    "blocks.*.feedforward.up": f"{_LAYER}.intermediate.dense",
    "blocks.*.feedforward.down": f"{_LAYER}.output.dense",
    "blocks.*.feedforward_norm": f"{_LAYER}.output.LayerNorm",
    "pooler": "bert.pooler.dense",
    "word_head.dense": "cls.predictions.transform.dense",
    "word_head.norm": "cls.predictions.transform.LayerNorm",
    "word_head.bias": "cls.predictions.bias",
    "next_head": "cls.seq_relationship",
    "classifier": "classifier",
    "sentence_head.project": "sentence_head",
}
PREFIX = "bert."
WITHOUT_PREFIX = ("BertModel",)  # the architecture whose files have no prefix
NOT_WEIGHTS = ("bert.embeddings.position_ids",)
OLD_ENDINGS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # TensorFlow's names
COPIES = {  # old files have these duplicates
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# Files may have more heads than their architecture (bert-base-uncased): the file decides.
IN_FILE = {
    "pooled": "bert.pooler.dense.weight",
    "words": "cls.predictions.bias",
    "next_sentence": "cls.seq_relationship.weight",
}
MODEL_TYPES = {"bert": "BertForPreTraining"}
UNSUPPORTED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# architecture → pooled, words, next_sentence, labels; a BertModel's file shows whether it is pooled
ARCHITECTURES = {
    "BertForPreTraining": (True, True, True, False),
    "BertForMaskedLM": (False, True, False, False),
    "BertForNextSentencePrediction": (True, False, True, False),
    "BertForSequenceClassification": (True, False, False, True),
    "BertModel": (False, False, False, False),
}

POOLING_KEYS = {  # ways of pooling → the keys of sentence-transformers' 1_Pooling/config.json
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
FIELDS: hf.Fields = hf.SIZE_FIELDS | {
    "norm_eps": hf.Field("layer_norm_eps", 1e-12, float),
    "activation": hf.activation_field("hidden_act", "gelu"),
    "dropout": hf.Field("hidden_dropout_prob", 0.1, float, also=("attention_probs_dropout_prob",)),
    "type_vocab_size": hf.Field("type_vocab_size", 2),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type bert."""
    architecture = (json.get("architectures") or ["BertModel"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"the architecture {architecture!r} is not among {', '.join(ARCHITECTURES)}.")
    pooled, words, next_sentence, labelled = ARCHITECTURES[architecture]
    if words and not json.get("tie_word_embeddings", True):
        raise ValueError("its head for words is not tied to the embedding (tie_word_embeddings is false).")
    labels = _labels(json) if labelled or json.get("sentence_head") else ()
    return Config(
        **hf.read_fields(json, FIELDS),
        pooling=_pooling(json),
        pooled=json.get("add_pooling_layer", pooled),
        words=words,
        next_sentence=next_sentence,
        labels=labels,
        sentence_head=bool(json.get("sentence_head")),
        score_activation=_score_activation(json) if len(labels) == 1 else "sigmoid",
    )


def _pooling(json: dict[str, Any]) -> Pooling:
    """Return how sentence embeddings are made: by sentence-transformers' modules if the folder has some, else by the
    entry of config.json that keifu writes."""
    modules = json.get(hf.MODULES)
    if not modules:
        pooling = json.get("pooling", "mean")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {pooling!r}, not among {', '.join(get_args(Pooling))}.")
        return pooling
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds == ["Transformer"] and json.get("architectures") == ["BertForSequenceClassification"]:
        return "mean"  # a cross-encoder, which is not pooled so
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ValueError(
            f"modules.json lists {', '.join(kinds)}, and keifu computes sentence embeddings by Transformer, Pooling "
            "and Normalize alone."
        )
    settings: dict[str, Any] = modules[1].get("config", {})
    modes: Any = settings.get("pooling_mode") or [name for name, key in POOLING_KEYS.items() if settings.get(key)]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in get_args(Pooling):
        known_kinds = ", ".join(get_args(Pooling))
        raise ValueError(f"its sentence embeddings are pooled by {modes}, and keifu implements one of {known_kinds}.")
    return modes[0]


def _labels(json: dict[str, Any]) -> tuple[str, ...]:
    names = json.get("id2label") or {str(n): f"LABEL_{n}" for n in range(json.get("num_labels", 2))}
    problem, only = json.get("problem_type"), "regression" if len(names) == 1 else "single_label_classification"
    if problem not in (None, only):
        raise ValueError(f"it sets problem_type to {problem!r}; with {len(names)} labels keifu implements {only!r}.")
    return tuple(names[key] for key in sorted(names, key=int))


def _score_activation(json: dict[str, Any]) -> ScoreActivation:
    """Return the function of a cross-encoder's score, in an entry of sentence-transformers 6, 4 or an older one."""
    entries = json.get(hf.SENTENCES), json.get("sentence_transformers")
    newer = [entry.get("activation_fn") for entry in entries if isinstance(entry, dict)]
    path = next(filter(None, [*newer, json.get("sbert_ce_default_activation_function")]), "Sigmoid")
    activations: dict[str, ScoreActivation] = {"Sigmoid": "sigmoid", "Identity": "identity"}
    if (name := str(path).rpartition(".")[2]) not in activations:
        raise ValueError(f"its score passes through {path}, and keifu implements Sigmoid and Identity.")
    return activations[name]


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads."""
    heads = (config.words, config.next_sentence, bool(config.labels) and not config.sentence_head)
    name_of_heads = {has[1:]: name for name, has in ARCHITECTURES.items()}
    labels = {str(n): label for n, label in enumerate(config.labels)}
    json = {
        **hf.write(config, MODEL_TYPES, FIELDS),
        "architectures": [name_of_heads.get(heads, "BertForPreTraining")],
        "add_pooling_layer": config.pooled,
        "tie_word_embeddings": True,
    }
    # transformers ignores these two and reads only the encoder
    json |= {"sentence_head": True} if config.sentence_head else {}
    json |= {"pooling": config.pooling} if config.pooling != "mean" else {}
    if config.score_activation == "identity":  # sentence-transformers reads it
        json |= {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    names = {"id2label": labels, "label2id": {label: n for n, label in enumerate(config.labels)}}
    return json | (names if labels else {})
