"""Commands in the documentation, checked against the programs' own parsers; none is run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jsonargparse

from fastalps.cli import export, options
from fastalps.errors import UserError
from fastalps.training import TrainConfig
from tests import ROOT

if str(ROOT) not in sys.path:  # For `bench`, where the tests run from elsewhere.
    sys.path.insert(0, str(ROOT))

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
    entries = re.findall(r'^(fastalps-\w+) = "fastalps\.cli\.entry:(\w+)"$', text, re.MULTILINE)
    found = {name: f"fastalps.cli.{module}" for name, module in entries}
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
