"""How a family's files differ from what their config says or from what is written today; knows no model and no file."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """What some files of a family do.

    in_file: switches of the Config that are on where the file has a tensor, whatever its config says.
    copies: tensors that repeat another one of the file.
    old_endings: today's ending of a name, and that of old files.
    without_prefix: architectures whose files are written without the family's prefix.
    """

    in_file: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    old_endings: Mapping[str, str] = field(default_factory=dict)
    without_prefix: tuple[str, ...] = ()

    def spelled(self, name: str, stored: Collection[str]) -> str:
        """The name under which a file has this tensor, where it has it."""
        if name in stored:
            return name
        older = (name.removesuffix(new) + old for new, old in self.old_endings.items() if name.endswith(new))
        return next((one for one in older if one in stored), name)
