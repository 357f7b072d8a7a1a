"""Diagrams of models of pictures: diffusion, U-Net, CLIP, latent diffusion, DALL-E, unCLIP, autoencoder, ViT."""
# ruff: noqa: E501

from landmarks.drawing import MIDDLE, Begin, Drawing, End, Fork, Join, Part, column

UNET = "U-Net"
CAPTION = ("caption", "キャプション")
PICTURE = ("picture", "画像")
NOISE = ("noise", "ノイズ")


def ddpm(drawing: Drawing) -> None:
    boxes = [
        drawing.box(x, 40, name, remark, "data", 92)
        for x, name, remark in (
            (60, "x₀", PICTURE),
            (MIDDLE, "xₜ", ("half noise", "ノイズ混じり")),
            (300, "x₁₀₀₀", NOISE),
        )
    ]
    for left, right in zip(boxes, boxes[1:], strict=False):
        drawing.line((left.right[0], 52), (right.left[0], 52))
        drawing.line((right.left[0], 72), (left.right[0], 72), dashed=True)
    drawing.note(MIDDLE, 26, ("→ add noise: no learning, 1,000 small steps", "→ ノイズを加える：学習なし、1,000 回"))
    drawing.note(MIDDLE, 104, ("← take noise away: learned", "← ノイズを取り除く：学習"))
    x, t = (
        drawing.box(110, 128, ("noisy picture xₜ", "ノイズ画像 xₜ"), tone="data", width=140),
        drawing.box(265, 128, ("step t", "ステップ t"), tone="data", width=110),
    )
    net = drawing.box(MIDDLE, 186, UNET, ("which noise was added?", "加えたノイズを予測"), width=180)
    said = drawing.box(110, 256, ("noise it predicts", "予測したノイズ"), tone="layer", width=140)
    real = drawing.box(265, 256, ("noise added", "加えたノイズ"), tone="goal", width=120)
    for start in (x, t):
        drawing.line(start.bottom, (start.x, 172), (MIDDLE, 172), net.top)
    drawing.line(net.bottom, (MIDDLE, 242), (110, 242), said.top)
    drawing.line(said.right, real.left, arrow=False, dashed=True)
    drawing.note(MIDDLE, 304, ("training: make the two equal (squared error)", "学習：2つを等しくする（2乗誤差）"))


def unet(drawing: Drawing) -> None:
    sizes = ((128, "32 × 32"), (104, "16 × 16"), (80, "8 × 8"))
    downs = [drawing.box(80 + 8 * i, 40 + 52 * i, size, width=width) for i, (width, size) in enumerate(sizes)]
    ups = [drawing.box(280 - 8 * i, 40 + 52 * i, size, width=width) for i, (width, size) in enumerate(sizes)]
    middle = drawing.box(MIDDLE, 204, "4 × 4", ("self-attention too", "自己注意も"), "attention", 140)
    drawing.note(80, 26, ("down: coarser", "下り：粗くする"))
    drawing.note(280, 26, ("up: finer", "上り：細かくする"))
    for down, up in zip(downs, ups, strict=True):
        drawing.line(down.right, up.left, dashed=True)
    for upper, lower in zip(downs, downs[1:], strict=False):
        drawing.line((lower.x, upper.bottom[1]), lower.top)
    for upper, lower in zip(ups, ups[1:], strict=False):
        drawing.line(lower.top, (lower.x, upper.bottom[1]))
    drawing.line(downs[-1].bottom, (downs[-1].x, middle.y), middle.left)
    drawing.line(middle.right, (ups[-1].x, middle.y), ups[-1].bottom)
    drawing.note(
        MIDDLE,
        268,
        (
            "dashed: skips carry detail across, joined to the channels",
            "破線：細部を渡すスキップ接続（チャンネルに連結）",
        ),
    )
    drawing.note(MIDDLE, 284, ("every block also receives the step t", "どのブロックもステップ t を受け取る"))


def dalle(drawing: Drawing) -> None:
    text = drawing.box(92, 12, ("256 text tokens", "テキスト 256 トークン"), tone="data", width=156)
    codes = drawing.box(266, 12, ("picture codes so far", "ここまでの画像コード"), tone="data", width=156)
    block = [
        Part(("decoder", "デコーダ"), ("row, column and window attention", "行・列・窓の注意"), "attention"),
        Part(("next picture code", "次の画像コード"), ("one of 8,192", "8,192 個のうち1つ"), "goal"),
    ]
    decoder, code = column(drawing, MIDDLE, 78, block, 250)
    for start in (text, codes):
        drawing.line(start.bottom, (start.x, 60), (MIDDLE, 60), decoder.top)
    drawing.line(code.right, (346, code.y), (346, 27), codes.right, dashed=True)
    last = column(
        drawing,
        MIDDLE,
        218,
        [
            Part(("1,024 codes, 32 × 32", "1,024 個のコード、32 × 32"), "", "data"),
            Part(
                ("decoder of the discrete autoencoder", "離散オートエンコーダのデコーダ"),
                ("trained before, then frozen", "先に学習して固定"),
                "frozen",
            ),
            Part(("picture, 256 × 256", "画像 256 × 256"), "", "data"),
        ],
        270,
    )
    drawing.line(code.bottom, last[0].top)


def clip(drawing: Drawing) -> None:
    left = [
        Part(("N pictures", "画像 N 枚"), "", "data"),
        Part(("image encoder", "画像エンコーダ"), ("ViT or ResNet", "ViT か ResNet")),
        Part(("N embeddings", "埋め込み N 個"), ("of length 1", "長さ 1")),
    ]
    right = [
        Part(("N captions", "キャプション N 個"), "", "data"),
        Part(("text encoder", "テキストエンコーダ"), ("GPT-2's layers", "GPT-2 の層")),
        Part(("N embeddings", "埋め込み N 個"), ("of length 1", "長さ 1")),
    ]
    towers = column(drawing, 92, 12, left)[-1], column(drawing, 268, 12, right)[-1]
    grid = drawing.grid(120, 226, ["o...", ".o..", "..o.", "...o"], 30)
    for tower in towers:
        drawing.line(tower.bottom, (tower.x, 206), (MIDDLE, 206), grid.top)
    drawing.note(MIDDLE, 366, ("similarity of every picture with every caption", "すべての画像とキャプションの類似度"))
    drawing.note(MIDDLE, 382, ("training: raise the diagonal, lower the rest", "学習：対角を上げ、ほかを下げる"))


def latent_diffusion(drawing: Drawing) -> None:
    left = [
        Part(PICTURE, "512 × 512 × 3", "data"),
        Part(("encoder", "エンコーダ"), ("trained before", "先に学習"), "frozen"),
        Part(("latent", "潜在表現"), "64 × 64 × 4", "data"),
        Part(("add noise", "ノイズを加える")),
    ]
    right = [
        Part(CAPTION, ("“a red heart”", "“a red heart”"), "data"),
        Part(("CLIP's text tower", "CLIP のテキスト側"), ("frozen", "固定"), "frozen"),
        Part(("77 hidden states", "77 個の隠れ状態"), "", "data"),
    ]
    noisy = column(drawing, 92, 12, left)[-1]
    states = column(drawing, 268, 12, right)[-1]
    net = drawing.box(MIDDLE, 266, UNET, ("self-attention and cross-attention", "自己注意と交差注意"), "attention", 250)
    drawing.line(noisy.bottom, (92, 266))
    drawing.line(states.bottom, (268, 266))
    drawing.note(276, 236, ("keys, values", "キーと値"), "start")
    rest = column(
        drawing,
        MIDDLE,
        328,
        [
            Part(("cleaner latent", "ノイズの減った潜在表現"), "", "data"),
            Part(("decoder, once at the end", "デコーダ（最後に1回）"), "", "frozen"),
            Part(PICTURE, "", "data"),
        ],
        196,
    )
    drawing.line(net.bottom, rest[0].top)
    drawing.line(rest[0].left, (20, rest[0].y), (20, 287), net.left, dashed=True)
    drawing.note(30, 366, ("20 to 50 times", "20～50 回"), "start")


def unclip(drawing: Drawing) -> None:
    parts = [
        Part(CAPTION, ("“a red heart”", "“a red heart”"), "data"), Part(("CLIP's text tower", "CLIP のテキスト側"), ("frozen", "固定"), "frozen"),
        Part(("1  prior", "1  prior"), ("diffusion over one vector", "1本のベクトルの拡散"), "attention"), Part(("image embedding", "画像の埋め込み"), ("what CLIP would see", "CLIP が見るはずのもの"), "data"),
        Part(("2  decoder", "2  デコーダ"), ("U-Net, 64 × 64", "U-Net、64 × 64"), "layer"), Part(("3  upsamplers", "3  アップサンプラ"), ("U-Nets, 256 and 1,024", "U-Net、256 と 1,024"), "layer"), Part(PICTURE, "", "data"),
    ]  # fmt: skip
    drawn = column(drawing, 130, 12, parts, 210)
    other = drawing.box(300, drawn[3].y - 21, ("a picture", "別の画像"), ("by CLIP", "CLIP 経由"), "data", 100)
    drawing.line(other.left, drawn[3].right, dashed=True)
    drawing.note(300, drawn[3].y + 40, ("gives variations", "バリエーション"))


def vae(drawing: Drawing) -> None:
    parts = [
        Part(PICTURE, "256 × 256 × 3", "data"), Part(("encoder", "エンコーダ"), ("convolutions", "畳み込み")),
        Part(("mean μ and deviation σ", "平均 μ と標準偏差 σ"), ("of each latent number", "潜在表現の数ごとに"), "norm"), Part("z = μ + σ ε", ("ε: random", "ε：乱数"), "attention"),
        Part(("decoder", "デコーダ"), ("convolutions", "畳み込み")), Part(("picture again", "復元した画像"), "", "data"),
    ]  # fmt: skip
    drawn = column(drawing, 125, 12, parts, 190)
    for index, (label, remark) in (
        (2, (("KL to N(0, 1)", "KL：N(0, 1) へ"), ("a weak pull", "弱く引く"))),
        (5, (("error", "誤差"), "")),
    ):
        goal = drawing.box(293, drawn[index].y - (21 if remark else 15), label, remark, "goal", 118)
        drawing.line(goal.left, drawn[index].right, arrow=False, dashed=True)


def gan(drawing: Drawing) -> None:
    noise = drawing.box(95, 12, NOISE, ("100 numbers", "100 個の数"), "data", 120)
    generator = drawing.box(95, 78, ("generator", "生成器"), ("learns to deceive", "だますことを学ぶ"), width=150)
    made = drawing.box(95, 144, ("generated picture", "生成した画像"), tone="data", width=150)
    real = drawing.box(270, 144, ("real picture", "本物の画像"), tone="data", width=130)
    drawing.line(noise.bottom, generator.top)
    drawing.line(generator.bottom, made.top)
    judge = drawing.box(
        MIDDLE, 206, ("discriminator", "識別器"), ("learns to tell them apart", "見分けることを学ぶ"), "attention", 200
    )
    for start in (made, real):
        drawing.line(start.bottom, (start.x, 190), (MIDDLE, 190), judge.top)
    verdict = drawing.box(MIDDLE, 272, ("real or generated?", "本物か、生成か"), tone="goal", width=180)
    drawing.line(judge.bottom, verdict.top)
    drawing.line(verdict.left, (12, verdict.y), (12, generator.y), generator.left, dashed=True)
    drawing.note(MIDDLE, 320, ("dashed: the gradient that the generator learns from", "破線：生成器が学ぶ勾配"))


def vq(drawing: Drawing) -> None:
    parts = [
        Part(PICTURE, "32 × 32 × 3", "data"), Part(("encoder", "エンコーダ"), ("convolutions", "畳み込み")),
        Part(("vectors z", "ベクトル z"), "8 × 8", "norm"),
        Part(("nearest codes e", "最も近いコード e"), ("8 × 8 whole numbers", "8 × 8 個の整数"), "attention"),
        Part(("decoder", "デコーダ"), ("convolutions", "畳み込み")), Part(("picture again", "復元した画像"), "", "data"),
    ]  # fmt: skip
    drawn = column(drawing, 125, 12, parts, 190)
    book = drawing.box(
        293, drawn[3].y - 21, ("codebook", "コードブック"), ("512 vectors", "512 個のベクトル"), "layer", 118
    )
    drawing.line(book.left, drawn[3].right)
    goal = drawing.box(293, drawn[5].y - 15, ("error", "誤差"), "", "goal", 118)
    drawing.line(goal.left, drawn[5].right, arrow=False, dashed=True)


def score(drawing: Drawing) -> None:
    left = drawing.box(90, 26, ("points", "点"), "σ = 0.01", "data", 120)
    right = drawing.box(270, 26, NOISE, "σ = 10", "data", 120)
    drawing.line((left.right[0], 38), (right.left[0], 38))
    drawing.line((right.left[0], 58), (left.right[0], 58), dashed=True)
    drawing.note(MIDDLE, 16, ("→ noise is added", "→ ノイズを加える"))
    drawing.note(MIDDLE, 88, ("← reverse SDE, or ODE: along the score", "← 逆の SDE か ODE：スコアに沿って"))
    x, sigma, label = (
        drawing.box(x, 108, name, tone="data", width=108)
        for x, name in (
            (62, ("noisy point x", "ノイズの点 x")), (180, ("level σ", "強さ σ")), (298, ("class, or none", "クラスか、なし")),
        )
    )  # fmt: skip
    network = drawing.box(MIDDLE, 166, ("network", "ネットワーク"), ("predicts the noise", "ノイズを予測"), width=180)
    for start in (x, sigma, label):
        drawing.line(start.bottom, (start.x, 152), (MIDDLE, 152), network.top)
    arrow = drawing.box(
        MIDDLE,
        232,
        ("score = -noise / σ", "スコア = -ノイズ / σ"),
        ("towards more points", "点が多いほうへ"),
        "goal",
        200,
    )
    drawing.line(network.bottom, arrow.top)
    drawing.note(
        MIDDLE,
        296,
        ("guidance: w · score with class + (1 - w) · without", "ガイダンス：w · クラスあり + (1 - w) · なし"),
    )


def vit(drawing: Drawing) -> None:
    drawing.grid(30, 16, ["#+o", "+o#", "o#+"], 24)
    drawing.note(66, 106, ("9 patches", "9 枚のパッチ"))
    drawing.line((112, 52), (140, 52))
    tokens = drawing.box(
        245,
        31,
        ("each patch × a matrix", "各パッチ × 行列"),
        ("a token of 768 numbers", "768 個の数のトークン"),
        width=200,
    )
    parts = [
        Part(("[class] + 9 patches + positions", "[class] + 9 パッチ + 位置"), "", "data"), Begin("× 12"), Fork(), Part("LayerNorm", "", "norm"),
        Part(("self-attention", "自己注意"), ("every patch sees every patch", "全パッチが互いを見る"), "attention"), Join(), Fork(), Part("LayerNorm", "", "norm"), Part(("feed-forward", "フィードフォワード"), "GELU"), Join(), End(),
        Part(("at [class]: the class", "[class] の位置：クラス"), "", "goal"),
    ]  # fmt: skip
    first = column(drawing, 170, 124, parts, 240)[0]
    drawing.line((245, tokens.bottom[1]), (245, first.top[1]))


def llava(drawing: Drawing) -> None:
    drawing.grid(30, 16, ["#+o", "+o#", "o#+"], 24)
    drawing.note(66, 106, ("picture", "画像"))
    drawing.line((112, 52), (140, 52))
    tower = drawing.box(
        245,
        31,
        ("image tower (CLIP)", "画像の塔（CLIP）"),
        ("a state for each patch", "パッチごとの状態"),
        "frozen",
        200,
    )
    parts = [
        Part(("projector: 2 matrices", "射影：2 つの行列"), ("a patch becomes a token", "パッチがトークンになる"), "goal"),
        Part(("patches, then the question", "パッチ、続いて質問"), ("one sequence", "1 つの系列"), "data"),
        Part(("LLaMA", "LLaMA"), ("reads both alike", "両方を同じように読む"), "attention"),
        Part(("the answer, token by token", "答えを 1 トークンずつ"), "", "goal"),
    ]  # fmt: skip
    first = column(drawing, 170, 124, parts, 240)[0]
    drawing.line((245, tower.bottom[1]), (245, first.top[1]))


def dit(drawing: Drawing) -> None:
    norm = ("× (1 + scale) + shift",) * 2
    parts = [
        Part(("noisy patches + positions", "ノイズ画像のパッチ + 位置"), "", "data"), Begin("× 28"), Fork(), Part("LayerNorm", norm, "norm"),
        Part(("self-attention", "自己注意"), "", "attention"), Part(("× gate", "× ゲート"), "", "norm"), Join(), Fork(), Part("LayerNorm", norm, "norm"),
        Part(("feed-forward", "フィードフォワード"), "GELU"), Part(("× gate", "× ゲート"), "", "norm"), Join(), End(), Part(("flow of each patch", "各パッチのフロー"), ("noise − picture", "ノイズ − 画像"), "goal"),
    ]  # fmt: skip
    drawn = column(drawing, 130, 12, parts, 190)
    condition = drawing.box(305, drawn[0].y - 15, ("time, class", "時刻、クラス"), "", "data", 96)
    for index in (1, 3, 5, 7):
        drawing.line(condition.bottom, (condition.x, drawn[index].y), drawn[index].right, dashed=True)
