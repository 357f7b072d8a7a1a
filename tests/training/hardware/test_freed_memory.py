"""What a training step frees is used by the next one, and goes back to the system when the training ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keifu import memory

COUNT = """
import json, resource, sys
from pathlib import Path
import torch
from training_toys import Sequences, objective, run, settings, toy
from keifu import memory
from keifu.training.loop import train

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def counting(model, batch):
    steps.append(faults())
    return objective(model, batch)

steps, cpu = [], torch.device("cpu")
found = {"before": faults(), "steps": steps}
train(toy(), counting, Sequences(), settings(), run(Path(sys.argv[1])))
found["after"] = faults()
with memory.keep_freed(cpu):
    faults()
    found["kept"] = faults()
    memory.release(cpu)
    found["released"] = faults()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not memory._glibc(), reason="other allocators are left alone")
def test_freed_memory_is_used_again_in_a_training_alone_or_until_it_is_released(tmp_path: Path) -> None:
    """64 MiB are 16,384 pages, each a fault at its first use. In a process of its own: in one where an allocation has
    failed, glibc serves large tensors from elsewhere."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", COUNT, str(tmp_path)]
    found = json.loads(subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout)
    assert min(found["before"], found["after"], found["released"]) > 16_000
    assert sorted(found["steps"])[len(found["steps"]) // 2] < 1_000 > found["kept"]
