"""Diagrams of language models: Transformer, BERT, the GPTs, LLaMA, PaLM and its heirs, mixture of experts, LoRA."""
# ruff: noqa: E501

from collections.abc import Sequence

from landmarks.drawing import MIDDLE, Begin, Drawing, End, Fork, Join, Label, Part, column

SELF = ("self-attention", "自己注意")
CAUSAL = ("each token sees those before", "各トークンは前だけを見る")
FEED = ("feed-forward", "フィードフォワード")
NEXT = ("next token", "次のトークン")
TOKENS = ("tokens", "トークン")
NORM = Part("LayerNorm", "", "norm")
RMS = Part("RMSNorm", "", "norm")
LEARNED = Part(("embedding + position", "埋め込み + 位置"), ("a learned vector for each", "どちらも学習するベクトル"))
HEAD = Part(("next token", "次のトークン"), ("the head is the embedding", "出力層は埋め込みと共有"), "goal")


def ngram(drawing: Drawing) -> None:
    parts = [
        Part(("the last n − 1 tokens: u", "直前の n − 1 トークン：u"), "", "data"),
        Part(("counts of what followed", "続いたトークンの回数"), ("c(u w) for each token w", "各トークン w の c(u w)")),
        Part(("probabilities", "確率"), ("minus D, divided by c(u)", "D を引き、c(u) で割る")),
        Part(("mixed with a shorter context", "短い文脈と混ぜる"), ("plus λ(u) · p(w | u′)", "λ(u) · p(w | u′) を足す"), "attention"),
        Part(NEXT, ("drawn, and read as the last one", "引いて、次の文脈に加える"), "goal"),
    ]  # fmt: skip
    column(drawing, MIDDLE, 12, parts, 240)


def transformer(drawing: Drawing) -> None:
    feed = Part((FEED[0], "全結合層"))
    short = (("embed + position", "埋め込み + 位置"), ("sinusoids", "正弦波"))
    left = [
        Part(("source", "原文"), "", "data"), Part(*short), Begin("× 6"), Fork(), Part(SELF, ("sees all", "全体を見る"), "attention"),
        Join(), NORM, Fork(), feed, Join(), NORM, End(),
    ]  # fmt: skip
    right = [
        Part(("target so far", "ここまでの訳文"), "", "data"), Part(*short), Begin("× 6"), Fork(), Part(SELF, ("sees those before", "前だけを見る"), "attention"),
        Join(), NORM, Fork(), Part(("cross-attention", "交差注意"), ("sees the source", "原文を見る"), "attention"), Join(), NORM,
        Fork(), feed, Join(), NORM, End(), Part(("next token", "次のトークン"), "", "goal"),
    ]  # fmt: skip
    encoder_decoder(drawing, left, right)


def t5(drawing: Drawing) -> None:
    biased = Part(SELF, ("+ bias by distance", "+ 距離ごとの数"), "attention")
    embedding = Part(("embedding", "埋め込み"), ("no positions", "位置は足さない"))
    feed = Part((FEED[0], "全結合層"), "ReLU")
    left = [
        Part("The ⟨0⟩ sat ⟨1⟩", ("spans are hidden", "区間を隠す"), "data"), embedding, Begin("× 12"), Fork(), RMS, biased, Join(),
        Fork(), RMS, feed, Join(), End(), RMS,
    ]  # fmt: skip
    right = [
        Part("⟨0⟩ cat ⟨1⟩ on", ("the hidden spans", "隠した区間"), "data"), embedding, Begin("× 12"), Fork(), RMS, biased, Join(),
        Fork(), RMS, Part(("cross-attention", "交差注意"), ("sees the source", "原文を見る"), "attention"), Join(),
        Fork(), RMS, feed, Join(), End(), RMS, Part(NEXT, "", "goal"),
    ]  # fmt: skip
    encoder_decoder(drawing, left, right, 6)


def rag(drawing: Drawing) -> None:
    question = drawing.box(92, 12, ("question x", "質問 x"), ("one message", "1つのメッセージ"), "data", 140)
    documents = drawing.box(268, 12, ("documents", "文書"), ("cut into passages z", "段落 z に切る"), "data", 140)
    asked = drawing.box(92, 78, ("encoder", "エンコーダ"), ("one vector q(x)", "ベクトル q(x)"), width=140)
    stored = drawing.box(268, 78, ("encoder", "エンコーダ"), ("vectors d(z), stored", "d(z) を保存"), "frozen", 140)
    near = drawing.box(
        MIDDLE, 150, ("nearest passages", "最も近い段落"), "p(z | x) ∝ exp d(z) · q(x)", "attention", 240
    )
    remark = ("paper: one each; keifu: one for all", "論文：1つずつ、keifu：まとめて1つ")
    prompt = drawing.box(MIDDLE, 212, ("prompts of passages and x", "段落と x のプロンプト"), remark, "data", 240)
    generator = drawing.box(MIDDLE, 274, ("generator", "生成モデル"), "p(y | x, z)", "layer", 240)
    answer = drawing.box(
        MIDDLE, 336, ("answer y", "答え y"), ("keifu: with file and lines", "keifu：ファイルと行つき"), "goal", 240
    )
    for start, end in (
        (question, asked),
        (documents, stored),
        (near, prompt),
        (prompt, generator),
        (generator, answer),
    ):
        drawing.line(start.bottom, end.top)
    drawing.line(asked.bottom, (asked.x, near.top[1]))
    drawing.line(stored.bottom, (stored.x, near.top[1]))
    drawing.line(question.left, (10, question.y), (10, prompt.y), prompt.left)


def encoder_decoder(drawing: Drawing, encoder: Sequence[object], decoder: Sequence[object], number: int = 5) -> None:
    """Draw two columns, and the keys and values that go from the encoder to the decoder's part of this number."""
    memory = column(drawing, 97, 12, encoder, 124, -1)[-1].bottom
    cross = column(drawing, 263, 12, decoder, 124, 1)[number]
    bend = max(memory[1] + 26, cross.y)
    drawing.line(memory, (memory[0], bend), (MIDDLE, bend), (MIDDLE, cross.y), cross.left)
    drawing.note(97, bend + 16, ("keys and values", "キーと値"))


def bert(drawing: Drawing) -> None:
    parts = [
        Part("[CLS] my [MASK] [SEP] he barks", "", "data"),
        Part(("token + position + segment", "トークン + 位置 + 文の区別"), ("three embeddings, added", "3つの埋め込みの和")),
        Begin("× 12"), Fork(), Part(SELF, ("every token sees both sides", "各トークンは両側を見る"), "attention"), Join(), NORM,
        Fork(), Part(FEED, "GELU"), Join(), NORM, End(),
    ]  # fmt: skip
    last = column(drawing, MIDDLE - 10, 12, parts, 256)[-1]
    y = last.bottom[1] + 42
    word = drawing.box(92, y, ("word at [MASK]", "[MASK] の単語"), ("“dog”", "“dog”"), "goal", 150)
    pair = drawing.box(268, y, ("at [CLS]", "[CLS] の位置"), ("does B follow A?", "B は A の続きか"), "goal", 150)
    for head in (word, pair):
        drawing.line(last.bottom, (last.x, y - 16), (head.x, y - 16), head.top)


def gpt1(drawing: Drawing) -> None:
    parts = [
        Part(TOKENS, "", "data"), LEARNED, Begin("× 12"), Fork(), Part(SELF, CAUSAL, "attention"), Join(), NORM,
        Fork(), Part(FEED, "GELU"), Join(), NORM, End(), HEAD,
    ]  # fmt: skip
    drawn = column(drawing, 150, 12, parts, 220)
    drawing.note(288, drawn[4].y + 4, ("norm after", "和の後に"), "start")
    drawing.note(288, drawn[4].y + 18, ("the sum", "正規化"), "start")


def pre_norm(norm: Part, attention: Label, feed: Part) -> list[object]:
    """Return the parts of a block with the norm before each sublayer."""
    return [Fork(), norm, Part(SELF, attention, "attention"), Join(), Fork(), norm, feed, Join()]


def gpt2(drawing: Drawing) -> None:
    block = pre_norm(NORM, CAUSAL, Part(FEED, "GELU"))
    parts = [Part(TOKENS, "", "data"), LEARNED, Begin("× 12 … 48"), *block, End(), NORM, HEAD]
    drawn = column(drawing, 150, 12, parts, 220)
    drawing.note(288, drawn[2].y + 4, ("norm before", "サブレイヤの"), "start")
    drawing.note(288, drawn[2].y + 18, ("sublayers", "前に正規化"), "start")


def gpt3(drawing: Drawing) -> None:
    block = pre_norm(NORM, ("dense or banded, by turns", "全体と帯状を交互に"), Part(FEED, "GELU"))
    parts = [
        Part(("examples, then the question", "例、続いて質問"), "", "data"),
        LEARNED,
        Begin("× 96"),
        *block,
        End(),
        NORM,
    ]
    last = column(drawing, 170, 12, parts, 220)[-1]
    y = last.bottom[1] + 34
    dense = ["#" * (row + 1) + "." * (5 - row) for row in range(6)]
    banded = ["".join("#" if 0 <= row - column < 3 else "." for column in range(6)) for row in range(6)]
    for x, cells, label in ((50, dense, ("dense", "全体")), (220, banded, ("banded", "帯状"))):
        drawing.grid(x, y, cells, 15)
        drawing.note(x + 45, y + 106, label)
    drawing.note(
        MIDDLE,
        y + 126,
        ("a row is a token; coloured are the tokens that it sees", "行はトークン。色はそのトークンが見る範囲"),
    )


def llama(drawing: Drawing) -> None:
    feed = Part(("SwiGLU", "SwiGLU"), ("SiLU(gate) × up, then down", "SiLU(gate) × up を down へ"))
    block = pre_norm(RMS, ("rotary positions on q and k", "q と k を位置に応じて回転"), feed)
    parts = [
        Part(TOKENS, "", "data"), Part(("embedding", "埋め込み"), ("no position is added", "位置は足さない")), Begin("× 32 … 80"), *block, End(), RMS,
        Part(("next token", "次のトークン"), ("a head of its own; no biases", "専用の出力層。バイアスなし"), "goal"),
    ]  # fmt: skip
    column(drawing, 165, 12, parts, 220)


def palm(drawing: Drawing) -> None:
    top = column(drawing, MIDDLE, 12, [Part(TOKENS, "", "data"), Part(("embedding", "埋め込み"))], 150)[-1]
    drawing.frame(14, 104, 346, 320, "× 118")
    norm = drawing.box(MIDDLE, 132, "LayerNorm", ("once, without a bias", "1回だけ、バイアスなし"), "norm", 150)
    attention = drawing.box(98, 208, SELF, ("one head of k and v", "キーと値は1ヘッド"), "attention", 148)
    feed = drawing.box(262, 208, FEED, "SwiGLU", width=148)
    total = drawing.plus(MIDDLE, 286)
    drawing.line(top.bottom, norm.top)
    for side in (attention, feed):
        drawing.line(norm.bottom, (MIDDLE, 190), (side.x, 190), side.top)
        drawing.line(side.bottom, (side.x, 286), total.left if side.x < MIDDLE else total.right)
    drawing.line((MIDDLE, 118), (340, 118), (340, 270), (MIDDLE, 270), total.top)
    last = column(
        drawing, MIDDLE, 336, [Part("LayerNorm", "", "norm"), Part(("next token", "次のトークン"), "", "goal")], 150
    )
    drawing.line(total.bottom, last[0].top)


def palm2(drawing: Drawing) -> None:
    text = drawing.box(MIDDLE, 12, ("a piece of text", "文章の一部"), tone="data", width=170)
    modes = (
        (65, "R [NLU]", ("short spans", "短い区間を隠す"), "aa##aa#aa"),
        (180, "X [NLG]", ("long spans", "長い区間を隠す"), "a######a#"),
        (295, "S [S2S]", ("the end", "末尾を隠す"), "aaaa#####"),
    )
    decoder = drawing.box(MIDDLE, 190, ("decoder with PaLM's blocks", "PaLM のブロックのデコーダ"), width=230)
    for x, name, hidden, cells in modes:
        mode = drawing.box(x, 78, name, hidden, width=112)
        drawing.grid(x - 49.5, 132, [cells], 11)
        drawing.line(text.bottom, (MIDDLE, 60), (x, 60), mode.top)
        drawing.line((x, 145), (x, 166), (MIDDLE, 166), decoder.top)
    goal = drawing.box(MIDDLE, 240, ("the hidden tokens", "隠したトークン"), tone="goal", width=170)
    drawing.line(decoder.bottom, goal.top)
    drawing.note(
        MIDDLE, 288, ("keifu's reading: PaLM 2's mixture is not public", "keifu の解釈。PaLM 2 の混合は非公開")
    )


def mixture(drawing: Drawing) -> None:
    token = drawing.box(MIDDLE, 12, ("a token's hidden state", "トークンの隠れ状態"), tone="data", width=170)
    router = drawing.box(
        MIDDLE,
        62,
        ("router", "ルータ"),
        ("a score for each expert; the best 2", "各専門家を採点し、上位2つを選ぶ"),
        "attention",
        230,
    )
    drawing.line(token.bottom, router.top)
    total = drawing.plus(MIDDLE, 226)
    for number, (x, share) in enumerate(((52, ""), (137, "0.7"), (223, ""), (308, "0.3")), 1):
        expert = drawing.box(
            x, 148, (f"expert {number}", f"専門家 {number}"), tone="layer" if share else "empty", width=78
        )
        drawing.line(router.bottom, (MIDDLE, 126), (x, 126), expert.top, dashed=not share)
        if share:
            drawing.line(expert.bottom, (x, 226), total.left if x < MIDDLE else total.right)
            drawing.note(x, 243, f"× {share}")
    out = drawing.box(MIDDLE, 256, ("weighted sum", "重み付き和"), tone="data", width=150)
    drawing.line(total.bottom, out.top)
    drawing.note(MIDDLE, 304, ("white: weights that this token does not use", "白：このトークンでは使わない重み"))


def lora(drawing: Drawing) -> None:
    source = drawing.box(MIDDLE, 12, ("input x", "入力 x"), tone="data", width=120)
    frozen = drawing.box(98, 84, "W", ("frozen, d × d", "固定、d × d"), "frozen", 140)
    down = drawing.box(262, 66, "A", ("learned, r × d", "学習、r × d"), "attention", 120)
    up = drawing.box(262, 128, "B", ("learned, d × r; from 0", "学習、d × r。0 から"), "attention", 150)
    total = drawing.plus(MIDDLE, 208)
    for first in (frozen, down):
        drawing.line(source.bottom, (MIDDLE, 52), (first.x, 52), first.top)
    drawing.line(down.bottom, up.top)
    drawing.line(frozen.bottom, (98, 208), total.left)
    drawing.line(up.bottom, (262, 208), total.right)
    drawing.note(262, 226, "× α / r")
    out = drawing.box(MIDDLE, 240, "W x + (α / r) B A x", tone="data", width=180)
    drawing.line(total.bottom, out.top)


def gated_delta(drawing: Drawing) -> None:
    token = drawing.box(MIDDLE, 12, ("a token's hidden state", "トークンの隠れ状態"), tone="data", width=170)
    signals = drawing.box(
        MIDDLE, 62, ("short convolution", "短い畳み込み"), ("query, key, value", "クエリ、キー、値"), "layer", 190
    )
    drawing.line(token.bottom, signals.top)
    fade = drawing.box(92, 138, ("fade", "減衰"), ("S ← α S", "S ← α S"), "norm", 130)
    correct = drawing.box(
        268, 138, ("correct", "修正"), ("S ← S + k β (v - Sᵀk)ᵀ", "S ← S + k β (v - Sᵀk)ᵀ"), "attention", 160
    )
    drawing.line(signals.bottom, (MIDDLE, 120), (268, 120), correct.top)
    drawing.line(fade.right, correct.left)
    state = drawing.box(92, 212, ("state S", "状態 S"), ("of fixed size", "大きさは一定"), "frozen", 130)
    drawing.line(correct.bottom, (268, 233), state.right)
    drawing.line((60, state.y - 21), (60, fade.y + 21))
    read = drawing.box(MIDDLE, 284, ("read: Sᵀq, gated norm", "読み出し Sᵀq、ゲート付き正規化"), tone="data", width=250)
    drawing.line(state.bottom, (92, 270), (MIDDLE, 270), read.top)
    drawing.note(MIDDLE, 334, ("α and β are made of the token, for each head", "α と β はトークンからヘッドごとに作る"))


def deepseek_v3(drawing: Drawing) -> None:
    token = drawing.box(MIDDLE, 12, ("a token's hidden state", "トークンの隠れ状態"), tone="data", width=170)
    queries = drawing.box(82, 74, ("queries", "クエリ"), ("of 128 heads", "128 ヘッド分"), "layer", 120)
    latent = drawing.box(
        256, 74, ("latent c", "潜在ベクトル c"), ("512 + 64 numbers, kept", "512 + 64 個の数、保持"), "frozen", 170
    )
    for first in (queries, latent):
        drawing.line(token.bottom, (MIDDLE, 58), (first.x, 58), first.top)
    made = drawing.box(256, 138, ("keys and values", "キーと値"), ("of 128 heads", "128 ヘッド分"), "layer", 150)
    drawing.line(latent.bottom, made.top)
    attention = drawing.box(MIDDLE, 202, ("attention", "注意"), tone="attention", width=120)
    drawing.line(queries.bottom, (82, 217), attention.left)
    drawing.line(made.bottom, (256, 217), attention.right)
    router = drawing.box(
        82, 262, ("router", "ルータ"), ("8 of 256 by s + b", "256 から8つを s + b で"), "attention", 140
    )
    shared = drawing.box(262, 262, ("shared expert", "共有の専門家"), ("every token", "全トークン"), "layer", 130)
    drawing.line(attention.bottom, (MIDDLE, 250), (82, 250), router.top)
    drawing.line(attention.bottom, (MIDDLE, 250), (262, 250), shared.top)
    experts = drawing.box(82, 326, ("8 small experts", "小さな専門家8つ"), tone="layer", width=140)
    drawing.line(router.bottom, experts.top)
    total = drawing.plus(MIDDLE, 341)
    drawing.line(experts.right, total.left)
    drawing.line(shared.bottom, (262, 341), total.right)
    drawing.note(MIDDLE, 378, ("b: rises while an expert has too few tokens", "b：トークンが少なすぎる専門家で上がる"))


def gpt_oss(drawing: Drawing) -> None:
    parts = [
        Part(TOKENS, "", "data"), Part(("embedding", "埋め込み")), Begin("× 24 … 36"), Fork(), RMS,
        Part(SELF, ("last 128 or all, by turns; a sink", "直近 128 か全体を交互に。シンク"), "attention"), Join(), Fork(), RMS,
        Part(("router", "ルータ"), ("4 of 32 or 128 experts", "32 か 128 の専門家から4つ"), "attention"),
        Part(("clamped SwiGLU", "値を制限した SwiGLU"), ("experts in 4 bits: MXFP4", "専門家は4ビット：MXFP4"), "frozen"), Join(), End(), RMS,
        Part(("next token", "次のトークン"), "", "goal"),
    ]  # fmt: skip
    column(drawing, 165, 12, parts, 220)


def long_context(drawing: Drawing) -> None:
    token = drawing.box(
        MIDDLE, 12, ("position m, up to s · L", "位置 m、s · L まで"), ("trained up to L", "学習は L まで"), "data", 210
    )
    ways = (
        (64, ("interpolation", "位置補間"), ("all pairs: / s", "全ペアを 1/s")),
        (180, "NTK", ("larger base b", "底 b を大きく")),
        (296, "YaRN", ("slow pairs: / s", "遅いペアを 1/s")),
    )
    angles = drawing.box(
        MIDDLE,
        168,
        ("angles of the pairs", "ペアの角度"),
        ("within those of training", "学習した範囲の中"),
        "layer",
        210,
    )
    for x, name, remark in ways:
        way = drawing.box(x, 90, name, remark, "norm", 110)
        drawing.line(token.bottom, (MIDDLE, 72), (x, 72), way.top)
        drawing.line(way.bottom, (x, 150), (MIDDLE, 150), angles.top)
    turned = drawing.box(MIDDLE, 230, ("queries and keys turn", "クエリとキーが回転"), tone="layer", width=210)
    drawing.line(angles.bottom, turned.top)
    attention = drawing.box(
        MIDDLE,
        280,
        ("attention", "注意"),
        ("YaRN: scores × (0.1 ln s + 1)²", "YaRN：得点 × (0.1 ln s + 1)²"),
        "attention",
        210,
    )
    drawing.line(turned.bottom, attention.top)
    drawing.note(MIDDLE, 338, ("then a short training on long sequences", "その後、長い系列で短く学習"))


def llada(drawing: Drawing) -> None:
    rows = (
        (12, ("masks alone", "マスクだけ"), "######"),
        (62, ("the surest stay", "確かなものを残す"), "#o##o#"),
        (112, ("the next step", "次のステップ"), "oo#oo#"),
        (162, ("a text", "テキスト"), "oooooo"),
    )
    for y, label, cells in rows:
        drawing.grid(30, y, [cells], 18)
        drawing.note(92, y + 34, label)
    block = drawing.box(
        262, 12, ("LLaMA's blocks", "LLaMA のブロック"), ("no causal mask", "因果マスクなし"), "attention", 170
    )
    guess = drawing.box(
        262, 84, ("a token for each mask", "各マスクのトークン"), ("all at once", "一度に予測"), "layer", 170
    )
    keep = drawing.box(
        262,
        156,
        ("keep the surest", "最も確かなものを残す"),
        ("the others: masks again", "ほかは再びマスク"),
        "goal",
        170,
    )
    drawing.line(block.bottom, guess.top)
    drawing.line(guess.bottom, keep.top)
    drawing.note(
        MIDDLE, 224, ("training: any share t is masked, loss / t", "学習：任意の割合 t を隠し、損失を t で割る")
    )


def whisper(drawing: Drawing) -> None:
    left = [
        Part(("log-mel frames", "対数メルのフレーム"), "3,000 × 80", "data"), Part(("2 convolutions", "畳み込み 2 層"), ("halves the frames", "フレームを半分に")), Begin("× 4"), Fork(), NORM,
        Part(SELF, ("sees all", "全体を見る"), "attention"), Join(), Fork(), NORM, Part(FEED, "GELU"), Join(), End(),
    ]  # fmt: skip
    right = [
        Part(("tokens so far", "ここまでのトークン"), ("language, task, …", "言語、タスク…"), "data"), Begin("× 4"), Fork(), NORM, Part(SELF, ("sees before", "前を見る"), "attention"), Join(), Fork(), NORM,
        Part(("cross-attention", "交差注意"), ("sees the sound", "音声を見る"), "attention"), Join(), Fork(), NORM, Part(FEED, "GELU"), Join(), End(), Part(("next token", "次のトークン"), "", "goal"),
    ]  # fmt: skip
    encoder_decoder(drawing, left, right)


def word2vec(drawing: Drawing) -> None:
    center = drawing.box(70, 92, ("word", "単語"), "king", "data", 96)
    vector = drawing.box(190, 92, ("its vector", "そのベクトル"), ("of the first table", "1つ目の表"), width=124)
    drawing.line(center.right, vector.left)
    for y, word, remark, tone in (
        (12, "crown", ("neighbour: 1", "隣の単語：1"), "goal"),
        (92, "table", ("noise: 0", "ノイズ：0"), "data"),
        (172, "seven", ("noise: 0", "ノイズ：0"), "data"),
    ):
        other = drawing.box(311, y, word, remark, tone, 90)
        drawing.line(vector.right, (258, vector.y), (258, other.y), other.left)
    drawing.note(
        MIDDLE, 240, ("a product with each word's vector in the second table", "2つ目の表の各単語のベクトルとの積")
    )
    drawing.note(
        MIDDLE, 258, ("tells the neighbour from words drawn at random", "隣の単語を、ランダムに引いた単語から見分ける")
    )
