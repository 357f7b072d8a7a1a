"""The recipe of scores: what it prints of the points that it draws."""

import re
from typing import Any

import pytest
import torch

from keifu.recipes.images import score


def test_as_many_points_of_each_class_are_compared_with_others_of_the_distribution(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = score.Recipe(points=50, hidden_dim=8, sampling=score.PointSampling(sampling_steps=3, count=60))
    labels, draw = list[torch.Tensor](), score.draw

    def recorded(model: Any, options: score.PointSampling, label: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
        labels.append(label)
        return draw(model, options, label, *rest)

    monkeypatch.setattr(score, "draw", recorded)
    jobs = score.jobs(recipe)
    next(jobs)
    with pytest.raises(StopIteration):  # the network is untrained
        jobs.send(None)
    drawn, exact = map(float, re.findall(r": (\d\.\d+)", capsys.readouterr().out))
    assert 0.0 < exact < drawn
    assert [label.bincount().tolist() for label in labels] == [[30, 30]]
