"""Metadata hook: the long description and the project's URLs, from README.md and the repository's address.

The address is in one place, `tool.keifu.repository` of pyproject.toml. Without one, links to files become plain text.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

FILE = r"\((?!https?://|#|mailto:)([^)\s]+)\)"  # of the repository
PICTURE = re.compile(r"!\[([^\]]*)\]" + FILE)
LINK = re.compile(r"(?<!!)\[((?:!\[[^\]]*\]\([^)]*\)|[^\]])*)\]" + FILE)  # its label may be a picture


class LongDescription(MetadataHookInterface):
    """Hook that sets `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the two fields of the project's table."""
        root = Path(self.root)
        address = repository(root)
        text = absolute_links((root / "README.md").read_text("utf-8"), address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(address)


def repository(root: Path) -> str:
    """Return the repository's address without a slash at its end; empty until the owner sets it."""
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["keifu"]["repository"].rstrip("/")


def urls(address: str) -> dict[str, str]:
    """Return the project's URLs by their label; none without an address."""
    if not address:
        return {}
    pages = {"Changelog": "/blob/main/CHANGELOG.md", "Documentation": "/blob/main/docs/index.md", "Issues": "/issues"}
    return {"Repository": address} | {label: address + page for label, page in pages.items()}


def absolute_links(text: str, address: str) -> str:
    """Return the text with links to files made absolute; without an address links are text, pictures are left out."""
    if not address:
        return LINK.sub(r"\1", PICTURE.sub("", text))
    return LINK.sub(rf"[\1]({address}/blob/main/\2)", PICTURE.sub(rf"![\1]({address}/raw/main/\2)", text))
