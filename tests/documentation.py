"""What README.md and docs/ claim, taken apart so that tests can hold it to the code.

A fenced block is `python` (run), `sh` (its commands are checked, see `tests.documented_commands`)
or `text`. A Python block that cannot run everywhere has a comment on the line above its fence:

    <!-- not run: needs a CUDA device -->
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Any

from tests import ROOT

LANGUAGES = ("python", "sh", "text")

FENCE = re.compile(r"^\s*```(.*)$")
MARK = re.compile(r"^<!-- not run: (\S.*) -->$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path of its file in the repository.
        line: of its first line in the file, from 1.
        language: what stands behind the fence.
        text: without the fences.
        reason: why it is not run; None = it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None


def pages() -> list[str]:
    """README.md, CONTRIBUTING.md and every page of docs/."""
    site = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
    return ["README.md", "CONTRIBUTING.md", *site]


def blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page; ValueError for one that no test would look at."""
    found: list[Block] = []
    language, start, reason, body = None, 0, None, []
    mark: tuple[int, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if language is not None:
            if fence:
                found.append(Block(page, start, language, "\n".join(body) + "\n", reason))
                language = None
            else:
                body.append(line)
            continue
        if fence:
            language, start, body = fence[1].strip(), number + 1, []
            if language not in LANGUAGES:
                raise ValueError(
                    f"{page}:{number}: a block must be one of {', '.join(LANGUAGES)}, "
                    f"got {language!r}"
                )
            reason, mark = (mark[1] if mark else None), None
            if reason is not None and language != "python":
                raise ValueError(f"{page}:{number}: only Python blocks are run, remove the mark")
        if mark is not None:
            raise ValueError(f"{page}:{mark[0]}: a mark must stand right above its block")
        if "<!-- not" in line:
            matched = MARK.match(line)
            if matched is None:
                raise ValueError(
                    f"{page}:{number}: expected '<!-- not run: REASON -->', got {line}"
                )
            mark = number, matched[1]
    if language is not None or mark is not None:
        raise ValueError(f"{page}: the last block or mark is left open")
    return found


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    lines, inside = [], False
    for line in text.splitlines():
        fence = FENCE.match(line) is not None
        lines.append("" if inside or fence else line)
        inside ^= fence
    return "\n".join(lines)


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    """Runs a Python block; a traceback names the page and its line."""
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, str(ROOT / block.page), "exec"), namespace)


# Links ------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def link_problems(page: str, text: str) -> list[str]:
    """Relative links of a page to files or headings that are not there."""
    found = []
    plain = re.sub(r"`[^`]*`", "", prose(text))
    for target in LINK.findall(plain):
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = ROOT / posixpath.normpath(
            posixpath.join(posixpath.dirname(page), path or page.rpartition("/")[2])
        )
        if not file.exists():
            found.append(f"{page}: {target}: there is no {file.relative_to(ROOT)}")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            found.append(f"{page}: {target}: no heading has this anchor")
    return found


def source_variables() -> set[str]:
    """The environment variables of ours that anything reads."""
    files = [ROOT / "setup.py", *ROOT.glob("tests/*.py"), *ROOT.glob("fastalps/**/*.py")]
    pattern = re.compile(r"environ(?:\.get\(|\[)\s*\"(FASTALPS_\w+)\"")
    return {name for file in files for name in pattern.findall(file.read_text(encoding="utf-8"))}
