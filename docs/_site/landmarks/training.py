"""Diagrams of ways to train: RLHF's three steps, DPO, Pathways' two pods, Chinchilla's law."""

from landmarks.drawing import MIDDLE, Drawing, Part, column


def instructgpt(drawing: Drawing) -> None:
    drawing.frame(
        12, 8, 348, 118, ("1  fine-tuning on demonstrations (SFT)", "1  手本によるファインチューニング（SFT）")
    )
    demos = drawing.box(92, 34, ("people's answers", "人が書いた答え"), tone="data", width=140)
    sft = drawing.box(262, 28, ("language model", "言語モデル"), ("learns to answer", "答え方を学ぶ"), width=150)
    drawing.line(demos.right, (187, demos.y))
    drawing.note(MIDDLE, 104, ("prompts: requests that users made", "プロンプト：利用者の実際の要求"))
    drawing.frame(12, 130, 348, 240, ("2  reward model", "2  報酬モデル"))
    ranked = drawing.box(
        92, 156, ("answers, ranked", "順位をつけた答え"), ("by people: A > B", "人が比較：A > B"), "data", 140
    )
    reward = drawing.box(
        262, 156, ("reward model", "報酬モデル"), ("one number an answer", "答えごとに1つの数"), "goal", 150
    )
    drawing.line(ranked.right, reward.left)
    drawing.note(MIDDLE, 226, ("loss: score of A above score of B", "損失：A の得点を B より高く"))
    drawing.frame(12, 252, 348, 462, ("3  reinforcement learning (PPO)", "3  強化学習（PPO）"))
    policy = drawing.box(92, 294, ("policy", "方策"), ("starts as the SFT model", "SFT モデルから始める"), width=150)
    answer = drawing.box(268, 294, ("answer", "答え"), ("to a new prompt", "新しいプロンプトへ"), "data", 140)
    score = drawing.box(
        268, 366, ("reward − β KL", "報酬 − β KL"), ("KL: distance from SFT", "KL：SFT からの距離"), "goal", 150
    )
    update = drawing.box(92, 366, ("PPO", "PPO"), ("clipped update", "変化を制限した更新"), "attention", 150)
    drawing.line(policy.right, answer.left)
    drawing.line(answer.bottom, (268, 366))
    drawing.line(score.left, update.right)
    drawing.line(update.top, policy.bottom)
    drawing.line(sft.right, (342, sft.y), (342, 246), (40, 246), (40, 294), dashed=True)
    drawing.line((reward.x + 60, reward.bottom[1]), (322, 246), (343, 270), (343, 387), score.right, dashed=True)
    drawing.note(MIDDLE, 436, ("PPO-ptx: plus the loss on pretraining text", "PPO-ptx：事前学習の文章の損失も加える"))


def dpo(drawing: Drawing) -> None:
    better = drawing.box(92, 12, ("better answer", "良い答え"), tone="data", width=140)
    worse = drawing.box(268, 12, ("worse answer", "悪い答え"), tone="data", width=140)
    policy = drawing.box(92, 76, ("policy", "方策"), ("learns", "学習する"), "layer", 140)
    reference = drawing.box(268, 76, ("reference", "参照モデル"), ("frozen copy", "固定した複製"), "frozen", 140)
    for start in (better, worse):
        drawing.line(
            start.bottom,
            (start.x, 60),
            (MIDDLE, 60),
            (policy.x if start is worse else reference.x, 60),
            (policy.x if start is worse else reference.x, 75),
        )
    rest = [
        Part(("log-ratio of each answer", "各答えの対数比"), "ln π(y) − ln π_ref(y)", "norm"),
        Part(
            ("−ln σ(β (better − worse))", "−ln σ(β (良い − 悪い))"),
            ("loss: no reward model, no sampling", "損失：報酬モデルもサンプリングも不要"),
            "goal",
        ),
    ]
    first = column(drawing, MIDDLE, 158, rest, 270)[0]
    for start in (policy, reference):
        drawing.line(start.bottom, (start.x, 138), (MIDDLE, 138), first.top)


def deepseek_r1(drawing: Drawing) -> None:
    prompt = drawing.box(MIDDLE, 12, ("prompt", "プロンプト"), tone="data", width=140)
    policy = drawing.box(MIDDLE, 64, ("policy", "方策"), ("samples a group", "グループをサンプリング"), "layer", 180)
    drawing.line(prompt.bottom, policy.top)
    checks = []
    for number, x in enumerate((66, MIDDLE, 294), 1):
        answer = drawing.box(
            x, 146, (f"answer {number}", f"答え {number}"), ("after thoughts", "思考の後"), "data", 104
        )
        check = drawing.box(x, 220, ("program", "プログラム"), ("right or wrong", "正か誤か"), "goal", 104)
        drawing.line(policy.bottom, (MIDDLE, 126), (x, 126), answer.top)
        drawing.line(answer.bottom, check.top)
        checks.append(check)
    rest = [
        Part(
            ("advantage within the group", "グループ内のアドバンテージ"),
            ("(reward − mean) / deviation", "（報酬 − 平均）／標準偏差"),
            "norm",
        ),
        Part(("clipped update", "変化を制限した更新"), ("no value model", "価値モデルは不要"), "attention"),
    ]
    first = column(drawing, MIDDLE, 304, rest, 250)[0]
    for check in checks:
        drawing.line(check.bottom, (check.x, 288), (MIDDLE, 288), first.top)


def pathways(drawing: Drawing) -> None:
    batch = drawing.box(MIDDLE, 12, ("batch of this step", "このステップのバッチ"), tone="data", width=190)
    exchange = drawing.box(
        MIDDLE,
        230,
        ("exchange: add both gradients", "交換：2つの勾配を足す"),
        ("in the order of the pods, once a step", "ポッドの順に、1ステップに1回"),
        "attention",
        260,
    )
    for number, x in ((1, 92), (2, 268)):
        drawing.frame(x - 80, 72, x + 80, 212, (f"pod {number}", f"ポッド {number}"))
        half = drawing.box(x, 94, ("half of the batch", "バッチの半分"), tone="data", width=136)
        whole = drawing.box(x, 142, ("whole model", "モデル全体"), ("its gradient", "その勾配"), width=136)
        drawing.line(batch.bottom, (MIDDLE, 58), (x, 58), half.top)
        drawing.line(half.bottom, whole.top)
        drawing.line(whole.bottom, (x, 230))
    update = drawing.box(
        MIDDLE,
        292,
        ("same update in both pods", "両ポッドで同じ更新"),
        ("weights stay the same bits", "重みは同じビットのまま"),
        "norm",
        220,
    )
    drawing.line(exchange.bottom, update.top)


def chinchilla(drawing: Drawing) -> None:
    budget = drawing.box(
        MIDDLE, 12, ("computation C", "計算量 C"), ("C ≈ 6 N D operations", "C ≈ 6 N D 回の演算"), "data", 190
    )
    size = drawing.box(92, 84, ("parameters N", "パラメータ数 N"), ("a larger model", "モデルを大きく"), "layer", 150)
    tokens = drawing.box(268, 84, ("tokens D", "トークン数 D"), ("more text", "文章を多く"), "attention", 150)
    for part in (size, tokens):
        drawing.line(budget.bottom, (MIDDLE, 70), (part.x, 70), part.top)
    loss = drawing.box(
        MIDDLE, 158, "L = E + A / N^α + B / D^β", ("loss falls with both", "損失は両方とともに下がる"), "goal", 220
    )
    best = drawing.box(
        MIDDLE, 220, ("best: D ≈ 20 N", "最適：D ≈ 20 N"), ("both grow as √C", "どちらも √C に比例"), "norm", 190
    )
    for part in (size, tokens):
        drawing.line(part.bottom, (part.x, 142), (MIDDLE, 142), loss.top)
    drawing.line(loss.bottom, best.top)
