"""The words of a report in English and Japanese.

`KEIFU_LANG` chooses the language; unset: the locale of the environment. What the program prints stays English, and so
do names that a user types or reads in a file: of options, of settings and of figures in metrics.jsonl.
"""

import os
from typing import Any

UNITS = {
    "tokens": "トークン", "pictures": "画像", "pairs": "組", "rows": "行", "texts": "文章", "examples": "例",
    "answers": "回答", "prompts": "プロンプト", "samples": "サンプル",
}  # fmt: skip
JAPANESE = {
    "stopped at step {:,}": "ステップ {:,} で停止",
    "step {:,}": "ステップ {:,}",
    # headings
    "Curves": "曲線",
    "By source": "データの出どころ別",
    "Samples": "サンプル",
    "Pictures": "画像",
    "Settings": "学習の設定",
    "Model and options": "モデルとオプション",
    "Figures and settings": "数値と設定",
    "Data": "データ",
    "Fingerprint": "指紋",
    "Computed with": "計算した環境",
    "Files, by their SHA-256": "ファイルと SHA-256",
    # figures
    "validation loss": "検証の損失",
    "training loss": "学習の損失",
    "bits per byte": "ビット/バイト",
    "of training": "学習時間",
    "of the matmul peak": "行列積の最高速度に対して",
    "parameters": "パラメータ",
    "steps": "ステップ",
    **{f"{unit} per second": f"{name}/秒" for unit, name in UNITS.items()},
    # charts
    "Loss": "損失",
    "loss": "損失",
    "Accuracy": "正解率",
    "accuracy": "正解率",
    "Bits per byte of the validation text": "検証用テキストのビット/バイト",
    "Learning rate": "学習率",
    "rate": "学習率",
    "Norm of the gradient, before clipping": "勾配のノルム（クリッピング前）",
    "norm": "ノルム",
    "Speed": "速度",
    "step": "ステップ",
    "training": "学習",
    "validation": "検証",
    "undone": "取り消した部分",
    "run": "学習",
    "setting": "設定",
    "Settings that differ": "異なる設定",
    "Validation loss of the runs": "各学習の検証の損失",
    "Training loss of the runs": "各学習の学習の損失",
    # the machine
    "matmul peak": "行列積の最高速度",
    "memory, estimated": "メモリ（推定）",
    "rows at a time": "一度に計算する行数",
    "device": "計算装置",
    "source": "出どころ",
    "yes": "はい",
    "no": "いいえ",
    "unset": "未設定",
    "data": "データ",
    "words": "単語",
}
SENTENCES = {  # English, Japanese
    "share": (
        "Learned: {last:.1%} of the held-out {name} are right, {first:.1%} before the training.",
        "学んだこと：検証用の{name}の正解は、学習前の {first:.1%} から {last:.1%} になりました。",
    ),
    "probability": (
        "Learned: the model gives a held-out token a probability of {last:.2g} (geometric mean), {first:.2g} before "
        "the training.",
        "学んだこと：検証用トークンに与える確率（幾何平均）は、学習前の {first:.2g} から {last:.2g} になりました。",
    ),
    "loss": (
        "Learned: the loss on held-out data fell from {first:.4g} to {last:.4g}.",
        "学んだこと：検証データの損失は {first:.4g} から {last:.4g} に下がりました。",
    ),
    "nothing": (
        "Nothing was learned that helps with held-out data: their loss was {first:.4g} before the training and is "
        "{last:.4g}.",
        "検証データに役立つことは学ばれていません。損失は学習前が {first:.4g}、今は {last:.4g} です。",
    ),
    "opponents": (
        "Two networks learn against each other, so their losses do not say how good the pictures are: see the samples.",
        "2つのネットワークが互いに競って学ぶので、損失からは画像の良さは分かりません。見本で確かめてください。",
    ),
    "rose": (
        "The validation loss rose from {lowest:.4g} (step {lowest_step:,}) to {last:.4g} (step {step:,}) while the "
        "training loss fell.",
        "検証の損失は {lowest:.4g}（ステップ {lowest_step:,}）から {last:.4g}（ステップ {step:,}）に上がり、"
        "学習の損失は下がりました。",
    ),
    "never fell": (
        "It never fell, so the held-out data are probably of another kind than those that were learned.",
        "一度も下がっていないので、検証データはおそらく学習データと種類が違います。",
    ),
    "by heart": (
        "The model probably learns the training data by heart: give more data, or fewer steps.",
        "おそらく学習データを丸暗記しています。データを増やすか、ステップを減らしてください。",
    ),
    "changed length": (
        "after {at:,} steps the length of the run was set to {steps:,}",
        "{at:,} ステップの時点で、全体の長さを {steps:,} ステップに変更",
    ),
    "other data": (
        "The runs learned from different data or tokenizers, so compare their bits per byte, not their losses.",
        "データかトークナイザが異なるので、損失ではなくビット/バイトを比べてください。",
    ),
}


def language() -> str:
    """Return the language of reports: "ja" or "en"."""
    names = ("KEIFU_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    chosen = next((value for name in names if (value := os.environ.get(name))), "")
    return "ja" if chosen.lower().startswith("ja") else "en"


def sentence(key: str, in_language: str | None = None, **values: Any) -> str:
    """Return one of the `SENTENCES` with its values. in_language: "en" or "ja"; None: the language of reports."""
    return SENTENCES[key][(in_language or language()) == "ja"].format(**values)


def say(text: str) -> str:
    """Return a text in the language of reports, or as it is if it has no translation."""
    return JAPANESE.get(text, text) if language() == "ja" else text
