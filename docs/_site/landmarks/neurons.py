"""Diagrams of the first landmarks: perceptron, multi-layer network, recurrent translation with attention."""

from landmarks.drawing import MIDDLE, Drawing


def perceptron(drawing: Drawing) -> None:
    inputs = [drawing.box(x, 12, label, tone="data", width=62) for x, label in ((60, "x₁"), (140, "x₂"), (220, "1"))]
    total = drawing.circle(140, 120, "Σ", "layer", 16)
    for start, label, shift in zip(inputs, ("w₁", "w₂", "b"), (-14, 14, 16), strict=True):
        drawing.line(start.bottom, (total.x + (start.x - 140) * 0.16, 103))
        drawing.note((start.x + 140) / 2 + shift, 76, label)
    step = drawing.box(
        140, 162, ("step", "ステップ関数"), ("1 if the sum is 0 or more", "和が 0 以上なら 1"), width=170
    )
    out = drawing.box(140, 224, ("output y", "出力 y"), tone="data", width=110)
    target = drawing.box(285, 224, ("target t", "正解 t"), tone="goal", width=110)
    drawing.line(total.bottom, step.top)
    drawing.line(step.bottom, out.top)
    drawing.line(target.left, out.right, arrow=False, dashed=True)
    drawing.line(target.top, (285, 174), dashed=True, arrow=False)
    drawing.note(285, 150, ("after a mistake:", "誤ったときだけ"))
    drawing.note(285, 166, "w ← w + η (t − y) x")
    drawing.line((285, 136), (285, 76), (222, 76), dashed=True)


def mlp(drawing: Drawing) -> None:
    layers = (
        (50, (60, 120), "data", ("inputs", "入力")),
        (180, (30, 90, 150), "layer", ("hidden units", "隠れユニット")),
    )
    layers = (*layers, (310, (90,), "layer", ("output", "出力")))
    drawn = [[drawing.circle(x, y + 10, "", tone, 15) for y in ys] for x, ys, tone, _ in layers]
    for left, right in zip(drawn, drawn[1:], strict=False):
        for start in left:
            for end in right:
                drawing.line(start.right, end.left)
    for x, _, _, label in layers:
        drawing.note(x, 194, label)
    drawing.line((40, 226), (320, 226))
    drawing.note(MIDDLE, 220, ("forward: sums and activations", "順伝播：重み付き和と活性化関数"))
    drawing.line((320, 258), (40, 258), dashed=True)
    drawing.note(MIDDLE, 252, ("backward: the error's gradient, by the chain rule", "逆伝播：誤差の勾配を連鎖律で計算"))


def seq2seq(drawing: Drawing) -> None:
    words, states = [], []
    for x, word in ((70, "猫"), (180, "が"), (290, "好き")):
        words.append(drawing.box(x, 24, word, tone="data", width=80))
        states.append(drawing.box(x, 74, f"h{len(states) + 1}".translate(str.maketrans("123", "₁₂₃")), width=80))
        drawing.line(words[-1].bottom, states[-1].top)
    drawing.note(MIDDLE, 15, ("source, read in both directions", "原文。両方向から読む"))
    for left, right in zip(states, states[1:], strict=False):
        drawing.line((left.right[0], 84), (right.left[0], 84))
        drawing.line((right.left[0], 94), (left.right[0], 94))
    mean = drawing.box(
        MIDDLE,
        170,
        ("weighted mean", "重み付き平均"),
        ("the context of this word", "この単語のための文脈"),
        "attention",
        190,
    )
    for state, weight, shift in zip(states, ("0.05", "0.15", "0.8"), (-26, 22, 26), strict=True):
        drawing.line(state.bottom, (MIDDLE + (state.x - MIDDLE) * 0.6, 169))
        drawing.note((state.x + MIDDLE + (state.x - MIDDLE) * 0.6) / 2 + shift, 142, weight)
    before = drawing.box(75, 238, ("state before", "1つ前の状態"), ("scores every h", "各 h を採点"), width=120)
    state = drawing.box(248, 238, ("decoder's state", "デコーダの状態"), ("GRU", "GRU"), width=140)
    word = drawing.box(248, 300, ("next word: like", "次の単語：like"), tone="data", width=140)
    drawing.line((248, mean.bottom[1]), state.top)
    drawing.line(before.right, state.left)
    drawing.line(before.top, (75, 191), mean.left, dashed=True)
    drawing.line(state.bottom, word.top)
    drawing.line(word.left, (75, 315), before.bottom, dashed=True)
    drawing.note(155, 348, ("and again for each word", "これを単語ごとに繰り返す"))


def lstm(drawing: Drawing) -> None:
    lane, gates = 48, []
    for x, label, remark in (
        (56, ("forget", "忘却"), "f = σ(…)"),
        (143, ("input", "入力"), "i = σ(…)"),
        (230, ("new", "新しい内容"), "g = tanh(…)"),
        (313, ("output", "出力"), "o = σ(…)"),
    ):
        gates.append(drawing.box(x, 150, label, remark, width=80))
    forget, take, new, show = gates
    kept, added = drawing.circle(56, lane, "×"), drawing.plus(186, lane)
    both, shown = drawing.circle(186, 104, "×"), drawing.circle(313, 104, "×")
    drawing.note(6, lane - 14, ("cell", "セル"), "start")
    drawing.line((6, lane), kept.left)
    drawing.line(kept.right, added.left)
    drawing.line(added.right, (354, lane))
    drawing.note(354, lane - 8, ("cell", "セル"), "end")
    drawing.line(forget.top, kept.bottom)
    drawing.line(take.top, (take.x, 104), both.left)
    drawing.line(new.top, (new.x, 104), both.right)
    drawing.line(both.top, added.bottom)
    drawing.line((313, lane), shown.top)
    drawing.note(308, 80, "tanh", "end")
    drawing.line(show.top, shown.bottom)
    drawing.line(shown.right, (354, 104))
    drawing.note(354, 96, ("state", "状態"), "end")
    inputs = drawing.box(186, 240, ("token, state before", "トークン、1つ前の状態"), "", "data", 190)
    for gate in gates:
        drawing.line(inputs.top, (inputs.x, 218), (gate.x, 218), gate.bottom)
    drawing.note(MIDDLE, 292, ("one step; the same weights at every step", "1ステップ。どのステップでも同じ重み"))
