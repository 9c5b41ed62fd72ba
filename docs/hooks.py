"""What the site needs besides its pages: files of the repository, and a check of what it loads.

Pages link to files beside docs/ (README.md, CONTRIBUTING.md, examples/) as GitHub shows them. Those
in `GUESTS`, and the sections of README.md in `SECTIONS`, become pages or files of the site, and the
links to them are rewritten.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

# Path in the repository: path in the site.
GUESTS = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/score_onnx.py": "examples/score_onnx.py",
    "examples/score_onnx.cpp": "examples/score_onnx.cpp",
}
# Page of the site: the sections (level 2) of README.md that it shows.
SECTIONS = {"install.md": ("Install",), "results.md": ("Results", "Benchmarks")}

# [text](target), in one line or broken over two; not within code.
LINK = re.compile(r"(?<!`)(\[[^\]`]*(?:`[^`]*`[^\]`]*)*\])\(([^)\s]+)\)")
OUTSIDE = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def on_files(files: Files, config: Any) -> Files:
    """Adds the guests."""
    for source, target in GUESTS.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if target.endswith(".md"):
            text = rewritten(text, source, target)
        files.append(File.generated(config, target, content=text))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target, sections in SECTIONS.items():
        text = rewritten(select(readme, sections), "README.md", target)
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to guests lead to their pages."""
    path = page.file.src_uri
    if path in GUESTS.values() or path in SECTIONS:
        return markdown
    return rewritten(markdown, f"docs/{path}", path)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuses a page that loads anything from another host."""
    found = [tag for tag in OUTSIDE.findall(output) if 'rel="canonical"' not in tag]
    if found:
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def select(text: str, sections: tuple[str, ...]) -> str:
    """The sections with these titles; several are put under a title of their own."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    chosen = []
    for name in sections:
        match = [part for part in parts if part.startswith(f"## {name}\n")]
        if len(match) != 1:
            raise PluginError(f"expected one section {name!r}, found {len(match)}")
        chosen += match
    if len(chosen) == 1:
        return chosen[0].removeprefix("#")
    title = " and ".join([sections[0], *(name.lower() for name in sections[1:])])
    return f"# {title}\n\n" + "".join(chosen)


def site_path(file: str, anchor: str) -> str:
    """Where the site has a file of the repository, or the section of README.md with this anchor."""
    if file != "README.md":
        return GUESTS.get(file) or file.removeprefix("docs/")
    for target, sections in SECTIONS.items():
        if anchor in {name.lower().replace(" ", "-") for name in sections}:
            return target
    raise PluginError(f"README.md#{anchor} is not in the site; add it to SECTIONS in docs/hooks.py")


def rewritten(markdown: str, source: str, target: str) -> str:
    """Links as they are in `source` (of the repository), made to hold in `target` (of the site)."""

    def replace(match: re.Match[str]) -> str:
        text, link = match.groups()
        path, hash_sign, anchor = link.partition("#")
        if not path or "//" in path or path.startswith("mailto:"):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        here = site_path(file, anchor)
        relative = posixpath.relpath(here, posixpath.dirname(target) or ".")
        return f"{text}({relative}{hash_sign}{anchor})"

    return LINK.sub(replace, markdown)
