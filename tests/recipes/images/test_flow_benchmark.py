"""The benchmark of flows trains, draws and writes its table, on a few small pictures."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.mark.usefixtures("one_thread")
def test_the_benchmark_writes_a_number_for_each_seed_and_number_of_steps(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    flow = import_module("flow")
    monkeypatch.setattr(flow, "UNET", flow.UNET | {"dim": 8, "multipliers": (1, 2)})
    monkeypatch.setattr(flow, "DIT", {"n_layers": 1, "n_heads": 1, "head_dim": 8})
    made, sheet = tmp_path / "made.json", tmp_path / "sheet.png"
    words = f"flow --data {drawings} --size 8 --minutes 1e-4 --seeds 0 1 --pictures 6 --steps 1 3 --write {made}"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--picture", str(sheet)])
    flow.main()
    (table,) = json.loads(made.read_text())
    assert [row[0] for row in table["rows"]] == [*flow.WAYS]
    assert all(len(each["1"]) == len(each["3"]) == 2 for each in table["values"].values())
    assert sheet.read_bytes()[:4] == b"\x89PNG"
    assert torch.get_num_threads() == 1
