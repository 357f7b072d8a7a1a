"""One HTML file out of the folder of a page, for `file://`, where a browser loads neither modules nor other files.

Each module becomes a function in a classic script, and each other file a data address that `live/client.js` asks for.
"""

import base64
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

IMPORT = re.compile(r'^import \{(?P<names>[^}]*)\} from "(?P<path>[^"]+)";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const|let) (\w+))", re.MULTILINE)
LOADER = """
"use strict";
const keifuModules = {}, keifuLoaded = {};
function keifuModule(folder, path) {
  const name = new URL(path, "file:///" + folder).pathname.slice(1);
  return keifuLoaded[name] ??= keifuModules[name]();
}
const keifuImport = async (folder, path) => keifuModule(folder, path);
"""
SCRIPT, STYLE = '<script type="module" src="live/live.js"></script>', '<link rel="stylesheet" href="live/live.css">'


def single_file(folder: Path) -> str:
    """Return the page of a folder as one HTML text, with its scripts, its style, the engine and the model's files."""
    addresses = {"../engine/worker.js": _address(_script(folder, ["engine"], "engine/worker.js").encode())}
    for file in sorted((folder / "live/models").rglob("*")):
        if file.is_file():
            addresses[file.relative_to(folder / "live").as_posix()] = _address(file.read_bytes())
    compiled = folder / "engine/kernel.wasm"
    if compiled.is_file():
        addresses["../engine/kernel.wasm"] = _address(compiled.read_bytes())
    files = f"globalThis.keifuFiles = {json.dumps(addresses)};"
    script = _script(folder, ["live", "engine"], "live/live.js").replace("</", "<\\/")
    page = (folder / "index.html").read_text(encoding="utf-8")
    style = f"<style>\n{(folder / 'live/live.css').read_text(encoding='utf-8')}</style>"
    scripts = f"<script>{files}</script>\n<script>{script}</script>"
    return page.replace(STYLE, style).replace(SCRIPT, scripts)


def _script(folder: Path, parts: list[str], entry: str) -> str:
    """Return the modules of some folders as one classic script that runs the module `entry`."""
    modules = (module for part in parts for module in _modules(folder, part))
    return (
        "(() => {" + LOADER + "".join(modules) + f"keifuModule({json.dumps(entry)}, {json.dumps('/' + entry)});\n}})();"
    )


def _modules(folder: Path, part: str) -> Iterator[str]:
    """Yield each module of a folder as a function that returns what the module exports."""
    for file in sorted((folder / part).rglob("*.js")):
        name = file.relative_to(folder).as_posix()
        here = json.dumps(name)
        text = file.read_text(encoding="utf-8")
        exported = ", ".join(EXPORT.findall(text))
        text = IMPORT.sub(partial(_needed, here), text)
        text = EXPORT.sub("", text)
        text = re.sub(r"\bimport\(", f"keifuImport({here}, ", text).replace("import.meta.url", f'"file:///" + {here}')
        unread = re.search(r"(?m)^(?:import|export)\b.*", text)
        assert unread is None, f"{PurePosixPath(name)} has a line that single_file.py does not read: {unread[0]}"
        yield f"keifuModules[{here}] = () => {{\n{text}\nreturn {{ {exported} }};\n}};\n"


def _needed(here: str, found: re.Match[str]) -> str:
    """Return the statement that takes names from another module."""
    return f"const {{{found['names'].replace(' as ', ': ')}}} = keifuModule({here}, {json.dumps(found['path'])});"


def _address(data: bytes) -> str:
    """Return an address that holds the bytes themselves."""
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
