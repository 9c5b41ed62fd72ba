"""The documentation: every Python block runs, every command parses, every link leads somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import ROOT, documentation, documented_commands
from tests.documentation import Block, blocks
from tests.videos import run_on, scene, write

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in documentation.pages()}
BLOCKS = {page: blocks(page, text) for page, text in PAGES.items()}
MORE = ("CHANGELOG.md", "SECURITY.md", "bench/NOTES.md")
LINKED = {**PAGES, **{page: (ROOT / page).read_text(encoding="utf-8") for page in MORE}}

# Packages of extras, without which a page's blocks cannot run.
EXTRAS = {
    "docs/adapters.md": ["pyod"],
    "docs/export.md": ["onnx", "onnxscript", "onnxruntime"],
    "docs/video.md": ["av"],
}


def recorded_run(folder: Path) -> None:
    """A run on video, and a recording to score with it."""
    run_on(folder / "runs" / "gate", scene(), motion=True)
    write(folder / "today.mp4", scene(), "mpeg4")


# What the reader of a page has made before its Python blocks, by its shell blocks.
PREPARED: dict[str, Callable[[Path], None]] = {"docs/video.md": recorded_run}


def python_blocks(marked: bool) -> list[Block]:
    return [
        block
        for page in BLOCKS.values()
        for block in page
        if block.language == "python" and (block.reason is not None) == marked
    ]


@pytest.mark.parametrize("page", sorted({block.page for block in python_blocks(False)}))
@pytest.mark.filterwarnings("ignore:.*normal scores are too few:UserWarning")
def test_python_blocks_run(page, tmp_path, monkeypatch) -> None:
    for package in EXTRAS.get(page, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if page in PREPARED:
        PREPARED[page](tmp_path)
    namespace = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        if block.language == "python" and block.reason is None:
            documentation.run_block(block, namespace)


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"{b.page}:{b.line}") for b in python_blocks(True)]
)
def test_marked_blocks_at_least_compile(block) -> None:
    compile(block.text, block.page, "exec")
    pytest.skip(f"not run: {block.reason}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page) -> None:
    problems = []
    for block in BLOCKS[page]:
        for words in documented_commands.commands(block.text) if block.language == "sh" else ():
            if found := documented_commands.problem(words):
                problems.append(f"{page}:{block.line}: {' '.join(words)}: {found}")
    for span in re.findall(r"`([^`]+)`", documentation.prose(PAGES[page])):
        if found := documented_commands.inline_problem(span):
            problems.append(f"{page}: `{span}`: {found}")
    assert not problems


@pytest.mark.parametrize("page", LINKED)
def test_links_resolve(page) -> None:
    assert not documentation.link_problems(page, LINKED[page])


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"([\w/-]+\.md)", nav))
    assert {p.relative_to(ROOT / "docs").as_posix() for p in ROOT.glob("docs/**/*.md")} <= listed


def test_environment_variables_are_those_that_are_read() -> None:
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"FASTALPS_\w+", page)) == documentation.source_variables()


@pytest.mark.parametrize("module", documented_commands.programs().values())
def test_help_is_for_people(module) -> None:
    result = documented_commands.parsed(module, [], parse=False)
    text = result.parser.format_help()
    assert not re.search(r"\bNone\b|Optional\[|``|<class", text)
    unexplained = [a.dest for a in result.parser._actions if not a.help]
    # bench/paper.py describes its tables, not yet each option.
    assert not unexplained or module == "bench.paper"


# The checker itself -----------------------------------------------------------------------------


def test_a_block_that_fails_names_its_line(tmp_path) -> None:
    (block,) = blocks("docs/page.md", "# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        documentation.run_block(block, {})
    assert failure.traceback[-1].lineno + 1 == 5
    assert str(failure.traceback[-1].path) == os.fspath(ROOT / "docs/page.md")


def test_blocks_share_a_namespace() -> None:
    namespace: dict[str, object] = {}
    for block in blocks("p", "```python\nx = 1\n```\ntext\n```python\ny = x + 1\n```\n"):
        documentation.run_block(block, namespace)
    assert namespace["y"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nls\n```\n", "p:1: a block must be one of python, sh, text, got 'bash'"),
        ("```\nls\n```\n", "got ''"),
        ("```python\nx\n", "left open"),
        ("<!-- not run: a reason -->\n\n```python\nx\n```\n", "right above its block"),
        ("<!-- not run -->\n```python\nx\n```\n", "expected '<!-- not run: REASON -->'"),
        ("<!-- not run: why -->\n```sh\nls\n```\n", "only Python blocks are run"),
    ],
)
def test_blocks_that_no_test_would_see_are_refused(text, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        blocks("p", text)


def test_marks_have_reasons() -> None:
    (block,) = blocks("p", "<!-- not run: needs a camera -->\n```python\nx\n```\n")
    assert block.reason == "needs a camera"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fastalps-train --dataset digits --out run", None),
        ("fastalps-train --dataset digits --out run --epoch 3", "--epoch"),
        ("fastalps-train --dataset digits --out run --epochs many", "epochs"),
        ("fastalps-train --dataset nonesuch --out run", "dataset must be one of"),
        ("fastalps-train --dataset digits", "required: out"),
        ("fastalps-score runs/x --out y", "input"),
        ("fastalps-score runs/x clip.mp4 --out y --overlays -7", "overlays must be"),
        ("fastalps-export runs/x --out y --format tflite", "format must be one of"),
        ("fastalps-train --help", None),
        ("fastalps-tune --out run", "fastalps-tune is a program that the checker does not know"),
        ("torchrun --nproc-per-node=2 -m fastalps.cli.train --out run", None),
        ("torchrun --nproc-per-node=2 -m fastalps.cli.train --out run --jobs 2", "--jobs"),
        ("torchrun --processes=2 -m fastalps.cli.train --out run", "--processes"),
        ("python bench/run.py ops --device cpu", None),
        ("python bench/run.py ops --devices cpu", "--devices"),
        ("python bench/paper.py --table 4", "invalid choice"),
        ("python bench/trial.py --dataset mnist", None),
        ("python bench/trial.py --data mnist", "--data"),
        ("python bench/walk.py", "there is no bench/walk.py"),
        ("python -m fastalps", None),
        ("python -m fastalps.cli.train --nonesuch 1 --out run", "--nonesuch"),
        ("python -m pytest tests/test_nonesuch.py", "there is no tests/test_nonesuch.py"),
        ("make lint types", None),
        ("make tea", "make has no target tea"),
        ("pip install 'fastalps[onnx,video]'", None),
        ("pip install 'fastalps[onnx,tea]'", "there is no extra fastalps[tea]"),
        ("OMP_NUM_THREADS=1 make lint && make tea", "make has no target tea"),
    ],
)
def test_wrong_commands_are_found(command, message) -> None:
    found = [
        p
        for words in documented_commands.commands(command)
        if (p := documented_commands.problem(words))
    ]
    assert (not found) if message is None else (len(found) == 1 and message in found[0])


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ("fastalps-score RUN VIDEO --annotated", None),
        ("fastalps-score RUN --annotate", "fastalps-score has no --annotate"),
        ("python bench/paper.py --tables 1", "bench/paper.py has no --tables"),
        ("--target-fpr", None),
        ("--target-rate 0.1", "no program has --target-rate"),
        ("make tea", "make has no target tea"),
        ("make it", "make has no target it"),
        ("x = 1", None),
    ],
)
def test_wrong_spans_are_found(span, message) -> None:
    assert documented_commands.inline_problem(span) == message


def test_commands_go_over_lines_and_leave_comments_out() -> None:
    text = "fastalps-train --out run \\\n  --resume   # go on\n# nothing\nmake lint; make types\n"
    assert documented_commands.commands(text) == [
        ["fastalps-train", "--out", "run", "--resume"],
        ["make", "lint"],
        ["make", "types"],
    ]


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("performance.md", None),
        ("performance.md#against-peers", None),
        ("../README.md#results", None),
        ("https://nowhere.invalid/page", None),
        ("#here", None),
        ("#there", "no heading has this anchor"),
        ("performances.md", "there is no docs/performances.md"),
        ("performance.md#for-peers", "no heading has this anchor"),
    ],
)
def test_wrong_links_are_found(link, message, monkeypatch) -> None:
    text = f"# Here\n\n[a link]({link}) and `[no link](x.md)`\n\n```text\n[none](y.md)\n```\n"
    if link.startswith("#"):
        # Of the page itself: any that has the heading.
        heading = documentation.anchors(text)
        monkeypatch.setattr(documentation, "anchors", lambda _: heading)
    found = documentation.link_problems("docs/scores.md", text)
    assert (not found) if message is None else (len(found) == 1 and message in found[0])


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py, which is no part of a package."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install fastalps[docs])")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_the_files_that_pages_link_to(hooks) -> None:
    text = "[a](../README.md#results), [b\nb](scores.md#x), [c](https://x.invalid/README.md)"
    assert hooks.rewritten(text, "docs/page.md", "page.md") == (
        "[a](results.md#results), [b\nb](scores.md#x), [c](https://x.invalid/README.md)"
    )
    text = "[a](../../README.md#install), [b](../../CONTRIBUTING.md)"
    assert hooks.rewritten(text, "docs/api/x.md", "api/x.md") == (
        "[a](../install.md#install), [b](../contributing.md)"
    )
    with pytest.raises(hooks.PluginError, match=r"README.md#what-it-does is not in the site"):
        hooks.rewritten("[a](../README.md#what-it-does)", "docs/x.md", "x.md")
    assert hooks.rewritten("[a](docs/scores.md)", "README.md", "results.md") == "[a](scores.md)"
    chosen = hooks.select("# T\n\n## A\n\na\n\n## B\n\nb\n\n## C\n", ("A", "B"))
    assert chosen == "# A and b\n\n## A\n\na\n\n## B\n\nb\n\n"
    assert hooks.select("# T\n\n## A\n\na\n", ("A",)) == "# A\n\na\n"


def test_the_site_is_built_strictly() -> None:
    (line,) = re.findall(r"^.*mkdocs build.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    # With --quiet, mkdocs 1.6 no longer counts warnings, and --strict lets them pass.
    assert "--strict" in line and "--quiet" not in line and "-q" not in line.split()


@pytest.mark.parametrize(
    ("tag", "refused"),
    [
        ('<script src="https://cdn.invalid/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.invalid/x.css">', True),
        ('<img src="http://x.invalid/badge.svg">', True),
        ('<a href="https://x.invalid/">', False),
        ('<script src="assets/x.js"></script>', False),
    ],
)
def test_the_site_loads_nothing_from_other_hosts(hooks, tag, refused) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    if not refused:
        assert hooks.on_post_page(tag, page=page) == tag
        return
    with pytest.raises(hooks.PluginError, match=r"page\.md loads from another host"):
        hooks.on_post_page(tag, page=page)
