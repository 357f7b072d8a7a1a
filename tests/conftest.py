"""What every test stands on: executed shapes, fixed threads and seeds, no hub; knows no test."""

import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import jaxtyping  # noqa: E402 (the environment must be set before)

if os.environ.get("KEIFU_NO_SHAPES") != "1":  # the hook breaks torch.compile(fullgraph=True): such tests run without it
    jaxtyping.install_import_hook("keifu", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

from keifu.threads import follow_load  # noqa: E402

follow_load()  # tests beside other programs, or beside each other, would wait for cores most of the time
warnings.filterwarnings("ignore", module="beartype")


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
