"""Names of drawn emoji by somebody who looks at them: sheets of pictures, and the count of a judge's choices.

python benchmarks/named_by_eye.py FOLDER [--model emoji] [--guidance 3] [--seed 0] [--threads 1]
python benchmarks/named_by_eye.py FOLDER --choices FILE --judge WORDS [--write JSON]

The first command draws 48 names that the model learned and 24 names of families that training did not have, each emoji
once. It writes four sheets of 24 numbered pictures: two of learned names and one of new names in random order, and last
the real pictures of the new names. FOLDER/names-1.txt has the names of sheet-1.png in random order, and so on, and
FOLDER/key.json the answers. The judge sees only sheets and names, the last sheet after the choices of the others, and
writes FILE: for each picture a line with the numbers of its sheet, picture and name, such as `1 12 7`. A name may be
chosen more than once, and the judge may choose by elimination.

The second command counts the pictures whose own name was chosen. Chance is 1 of 24. Intervals are Wilson's. --write
puts the table into a data file of docs/results/data, and all choices next to it, into named-by-eye.json.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from _results import print_rows, share_of, write_items, write_table
from _rounds import machine
from torch import Tensor

from keifu import checkpoints
from keifu.checkpoints.hub import locate
from keifu.data.images.dataset import read_images
from keifu.data.images.grid import sheet
from keifu.data.images.splits import recorded, split_of_run
from keifu.inference.images.pipeline import text_to_image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest

SECTION, CHOICES = "Emoji named by eye", "named-by-eye.json"
COLUMNS = ("pictures", "count", "own name chosen", "share, 95% interval")
ON_A_SHEET, SCALE = 24, 2  # pictures, and how often a pixel is repeated in both directions
LEARNED, NEW, REAL = "drawings of learned names", "drawings of new names", "real pictures of the new names"
Part = tuple[str, list[str], Tensor]  # what the pictures of a sheet are, their names, the pictures


def drawn(pipeline: Any, names: Sequence[str], guidance: float, seed: int) -> Tensor:
    """Draw a picture of each name, with consecutive seeds."""
    request = pipeline.resolved(ImageRequest(seed=seed, text="a", truncate=True, guidance=guidance))
    starts = range(0, len(names), ON_A_SHEET)
    parts = [names[first : first + ON_A_SHEET] for first in starts]
    seeds = [[seed + first + number for number in range(len(part))] for first, part in zip(starts, parts, strict=True)]
    return torch.cat([pipeline.draw(request, many, texts=part) for many, part in zip(seeds, parts, strict=True)])


def sheets(options: argparse.Namespace) -> list[Part]:
    """Return what each sheet shows."""
    model, tokenizer = checkpoints.load(options.model)
    pipeline, config = text_to_image_pipeline(model, tokenizer), cast(Any, model.config)
    parts = split_of_run(read_images("emoji", config.size[0], 3), recorded(locate(options.model)))
    learned, new = parts.train.distinct().spread(2 * ON_A_SHEET), parts.test.distinct().spread(ON_A_SHEET)
    made = []
    for kind, chosen in ((LEARNED, learned), (NEW, new)):
        names = list(chosen.texts("en"))
        pictures = drawn(pipeline, names, options.guidance, options.seed)
        for first in range(0, len(names), ON_A_SHEET):
            made.append((kind, names[first : first + ON_A_SHEET], pictures[first : first + ON_A_SHEET]))
    return [*made, (REAL, list(new.texts("en")), new.take(slice(None)))]


def write_sheets(options: argparse.Namespace) -> None:
    """Draw, and write the sheets, their names in random order and the key."""
    (*drawings, real), chance = sheets(options), random.Random(options.seed)
    chance.shuffle(drawings)
    options.folder.mkdir(parents=True, exist_ok=True)
    key = []
    for number, (kind, names, pictures) in enumerate([*drawings, real], 1):
        shown, listed = [*range(len(names))], [*names]
        chance.shuffle(shown)
        chance.shuffle(listed)
        captions = [str(picture) for picture in range(1, len(shown) + 1)]
        sheet(pictures[shown], captions, 6, SCALE, 12).save(options.folder / f"sheet-{number}.png")
        lines = "".join(f"{place} {name}\n" for place, name in enumerate(listed, 1))
        (options.folder / f"names-{number}.txt").write_text(lines, encoding="utf-8")
        key.append({"sheet": number, "kind": kind, "listed": listed, "names": [names[index] for index in shown]})
    options.folder.joinpath("key.json").write_text(
        json.dumps({"model": options.model, "guidance": options.guidance, "seed": options.seed, "sheets": key}), "utf-8"
    )
    print(f"{options.folder} has {len(key)} sheets.")


def read_choices(path: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an item for each picture: its kind, its name and the chosen name; raises an error for a missing or a
    repeated choice."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if wrong := [line for line in lines if len(line) != 3 or not all(map(str.isdigit, line))]:
        raise SystemExit(f"{path} has a line that is no choice: {' '.join(wrong[0])!r}. Write 1 12 7.")
    choices = {(int(sheet), int(picture)): int(name) for sheet, picture, name in lines}
    items = []
    for part in key["sheets"]:
        for picture, name in enumerate(part["names"], 1):
            chosen = choices.pop((part["sheet"], picture), 0)
            if not 1 <= chosen <= len(part["listed"]):
                raise SystemExit(f"{path} has no name of picture {picture} of sheet {part['sheet']}.")
            items.append({"kind": part["kind"], "name": name, "chosen": part["listed"][chosen - 1]})
    if choices or len(lines) != len(items):
        raise SystemExit(f"{path} has {len(lines)} choices, and the sheets have {len(items)} pictures.")
    return items


def rows(items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a row for each kind of pictures."""
    made = []
    for kind in (LEARNED, NEW, REAL):
        right = [item["name"] == item["chosen"] for item in items if item["kind"] == kind]
        made.append([kind, str(len(right)), str(sum(right)), share_of(sum(right), len(right))])
    return made


def count(options: argparse.Namespace) -> None:
    """Count the choices, and print and write the table."""
    key = json.loads((options.folder / "key.json").read_text(encoding="utf-8"))
    items = read_choices(options.choices, key)
    table = rows(items)
    print_rows([COLUMNS, *table])
    if options.write:
        about = {name: key[name] for name in ("model", "guidance", "seed")} | {"judge": options.judge}
        write_items(options.write.with_name(CHOICES), about, items)
        command = (
            f"python benchmarks/named_by_eye.py FOLDER --model {key['model']} --guidance {key['guidance']:g} "
            f"--seed {key['seed']}"
        )
        write_table(options.write, SECTION, command, COLUMNS, table, {"file": CHOICES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sheets and their key")
    parser.add_argument("--model", default="emoji", help="model that draws emoji from their names")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of the drawings and the order")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choices", type=Path, help="the judge's choices, which are counted")
    parser.add_argument("--judge", help="who chose, in words")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    if options.choices is not None:
        if not options.judge:
            parser.error("--choices needs --judge: say in words who chose.")
        return count(options)
    torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    return write_sheets(options)


if __name__ == "__main__":
    main()
