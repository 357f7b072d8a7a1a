"""A picture before it is read, with what is known of it; knows no source."""

from collections.abc import Callable
from dataclasses import dataclass, field

from keifu.data.picture_files import Shot

UNSTATED = "und"  # the code for a language that is not known (BCP 47)


@dataclass(frozen=True)
class Item:
    """`name` tells it from the others of its set, `where` names it in errors, `read` gives it; its size is a wish.

    captions: by language code, `UNSTATED` where the source does not say. alike: keys; pictures that share one stay on
    the same side of a split. part: "validation" or "test" where the source has held the picture out, else "".
    """

    name: str
    where: str
    read: Callable[[int | None], Shot]
    captions: dict[str, str] = field(default_factory=dict)
    label: str | None = None
    alike: tuple[str, ...] = ()
    part: str = ""
