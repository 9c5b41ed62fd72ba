"""What README.md and docs/ claim, taken apart so that tests can hold it to the code.

A fenced block is `python` (run), `sh` (its commands are checked against the real parsers, not run)
or `text`. A Python block that cannot run everywhere has a comment on the line above its fence:

    <!-- not run: needs a CUDA device -->
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import posixpath
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse

from fastalps.cli import export, options
from fastalps.errors import UserError
from fastalps.training import TrainConfig

ROOT = Path(__file__).parents[1]
LANGUAGES = ("python", "sh", "text")
# Programs of others, whose options are not ours to check.
OTHERS = ("cd", "g++", "./a.out", "tail", "tensorboard", "ffmpeg", ".ci/run")
OPTION_CLASSES = (
    options.DataOptions,
    options.ModelOptions,
    options.EvaluationOptions,
    options.ScoreOptions,
    export.ExportOptions,
    TrainConfig,
)

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
    """README.md and every page of docs/."""
    return ["README.md", *(p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("docs/*.md")))]


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


# Commands ---------------------------------------------------------------------------------------


class Parsed(Exception):
    """Thrown out of a program as soon as it has parsed its arguments."""

    def __init__(self, parser: argparse.ArgumentParser, namespace: Any) -> None:
        super().__init__()
        self.parser, self.namespace = parser, namespace


@contextlib.contextmanager
def _stopping(parse: bool) -> Iterator[None]:
    """Inside, `parse_args` of both kinds of parsers ends in `Parsed`, before any work is done."""
    before = {
        kind: kind.parse_args for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser)
    }

    def stop(kind, parser, arguments=None, *rest, **more):
        raise Parsed(parser, before[kind](parser, arguments, *rest, **more) if parse else None)

    for kind in before:
        kind.parse_args = functools.partialmethod(
            lambda self, *a, kind=kind, **k: stop(kind, self, *a, **k)
        )
    try:
        yield
    finally:
        for kind, method in before.items():
            kind.parse_args = method


def parsed(module: str, arguments: Sequence[str], parse: bool = True) -> Parsed | str:
    """What a program's own parser makes of arguments, or its complaint.

    Args:
        module: with a `main(arguments)`.
        parse: False: only the parser is wanted.
    """
    said = io.StringIO()
    main = importlib.import_module(module).main
    with _stopping(parse), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(list(arguments))
        except Parsed as result:
            return result
        except SystemExit as stop:
            if not stop.code:  # --help
                return parsed(module, [], parse=False)
    return said.getvalue().strip() or f"{module} parses nothing"


@functools.cache
def option_names(module: str) -> frozenset[str]:
    """Every option of a program, such as "--out"."""
    result = parsed(module, [], parse=False)
    assert isinstance(result, Parsed), result
    return frozenset(result.parser._option_string_actions)


@functools.cache
def programs() -> dict[str, str]:
    """Our programs, as they are called, and the modules of their parsers."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = dict(re.findall(r'^(fastalps-\w+) = "([\w.]+):main"$', text, re.MULTILINE))
    for path in sorted((ROOT / "bench").glob("*.py")):
        if "parse_args(" in path.read_text(encoding="utf-8") or path.stem == "trial":
            found[f"bench/{path.name}"] = f"bench.{path.stem}"
    return found


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):(?!=)", text, re.MULTILINE))


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, each as its words."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                found.append(words)
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
    return [words for words in found if words]


def problem(words: Sequence[str]) -> str | None:
    """What is wrong with a command; None = nothing."""
    program, *rest = words
    if program == "make":
        unknown = [w for w in rest if "=" not in w and w not in make_targets()]
        return f"make has no target {unknown[0]}" if unknown else None
    if program == "pip":
        asked = re.findall(r"fastalps\[([\w,]+)\]", " ".join(rest))
        unknown = [name for part in asked for name in part.split(",") if name not in extras()]
        return f"there is no extra fastalps[{unknown[0]}]" if unknown else None
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                launch = get_args_parser().parse_args(rest)
            except SystemExit:
                return said.getvalue().strip()
        return problem(
            [
                "python",
                *(["-m"] if launch.module else []),
                launch.training_script,
                *launch.training_script_args,
            ]
        )
    if program.endswith("python"):
        return _python_problem(rest)
    if program in programs():
        return _arguments_problem(programs()[program], rest)
    return None if program in OTHERS else f"{program} is a program that the checker does not know"


def _python_problem(words: Sequence[str]) -> str | None:
    if words[:1] == ["-m"]:
        module, *rest = words[1:]
        if module.startswith("fastalps."):
            return _arguments_problem(module, rest)
        if module == "pytest":
            missing = [w for w in rest if w.endswith(".py") and not (ROOT / w).is_file()]
            return f"there is no {missing[0]}" if missing else None
        known = module == "http.server" or (module == "fastalps" and not rest)
        return None if known else f"python -m {module} is not known to the checker"
    script, *rest = words
    if not (ROOT / script).is_file():
        return f"there is no {script}"
    return _arguments_problem(programs()[script], rest) if script in programs() else None


def _arguments_problem(module: str, arguments: Sequence[str]) -> str | None:
    result = parsed(module, arguments)
    if isinstance(result, str):
        return result
    # What the parser leaves to the option classes: choices and ranges.
    for kind in OPTION_CLASSES if result.namespace is not None else ():
        names = {field.name for field in dataclasses.fields(kind)}
        if names <= set(vars(result.namespace)):
            try:
                options.pick(result.namespace, kind)
            except (UserError, ValueError) as error:
                return str(error)
    return None


def inline_problem(span: str) -> str | None:
    """What is wrong with a command or option quoted in a sentence, which may be cut short."""
    words = span.split()
    if words[:1] == ["python"] and words[1:2] and words[1].startswith("bench/"):
        words = words[1:]
    if words[:1] == ["make"] and len(words) == 2:
        return problem(words)
    names = {w.partition("=")[0] for w in words if re.match(r"--[a-z]", w)}
    if words and words[0] in programs():
        missing = names - option_names(programs()[words[0]])
        return f"{words[0]} has no {sorted(missing)[0]}" if missing else None
    if words and words[0].startswith("--"):
        known = set().union(*(option_names(module) for module in programs().values()))
        missing = names - known - {"--no-build-isolation"}
        return f"no program has {sorted(missing)[0]}" if missing else None
    return None


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
    files = [ROOT / "setup.py", ROOT / "tests/conftest.py", *ROOT.glob("fastalps/**/*.py")]
    pattern = re.compile(r"environ(?:\.get\(|\[)\s*\"(FASTALPS_\w+)\"")
    return {name for file in files for name in pattern.findall(file.read_text(encoding="utf-8"))}


if str(ROOT) not in sys.path:  # For `bench`, where the tests run from elsewhere.
    sys.path.insert(0, str(ROOT))
