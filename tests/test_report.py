"""The report, its parts, and the other files that are written beside the scores of video."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastalps.cli import score
from fastalps.cli.overlays import Frame, WorstFrames
from fastalps.cli.report import clock
from fastalps.cli.report_page import histogram, timeline
from fastalps.cli.score_files import ScoreFiles
from fastalps.cli.score_summary import BINS, POINTS, Histogram, ScoreSummary, Trace
from fastalps.errors import UserError
from tests.commands import rows_of
from tests.images import save

HEIGHT, WIDTH, FRAMES = 40, 60, 24


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A folder of frames whose name must be escaped, with a run for them beside it."""
    import fastalps
    from fastalps.gate import MotionGate

    folder = tmp_path_factory.mktemp("report") / "a<b> & 'c'"
    frames = np.full((FRAMES, HEIGHT, WIDTH), 100, dtype=np.uint8)
    for t in range(FRAMES):
        frames[t, 12:24, 2 * t : 2 * t + 12] = 130 + 5 * t
        save(folder / f"{t + 1:03d}.png", frames[t])
    torch.manual_seed(0)
    scorer = fastalps.Scorer(
        fastalps.ALPS(10, 1, "fast", latent=4), gate=MotionGate(2.0), score="average"
    )
    calibration = scorer.calibrate(torch.from_numpy(frames), 0.2, level="frame")
    fastalps.save(scorer.model, folder.parent / "model.safetensors", calibration)
    return folder


@pytest.fixture(scope="module")
def out(clip) -> Path:
    folder = clip.parent / "out"
    model = clip.parent / "model.safetensors"
    assert score.main([str(model), str(clip), "--out", str(folder), "--overlays", "2"]) == 0
    return folder


class Page(html.parser.HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    OPEN = ("meta", "img", "polyline", "line", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        if tag not in self.OPEN:
            assert self.stack.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_report_needs_nothing_else(out) -> None:
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("link") and not page.all("script") and not page.all("iframe")
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    for image in page.all("img"):
        assert (image["src"] or "").startswith("data:image/jpeg;base64,") and image["alt"]
        content = base64.b64decode((image["src"] or "").partition(",")[2])
        with Image.open(io.BytesIO(content)) as picture:
            assert (picture.width, picture.height) == (int(image["width"]), int(image["height"]))
            assert np.asarray(picture).std() > 5
    # One of each second: 24 frames are one.
    assert len(page.all("img")) == 1 and len(page.all("svg")) == 2
    assert {"viewport"} <= {meta.get("name") for meta in page.all("meta")}
    assert "prefers-color-scheme: dark" in text


def test_the_report_says_what_the_other_files_say(out) -> None:
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "a&lt;b&gt; &amp; &#x27;c&#x27;" in text and "a<b>" not in text
    facts = json.loads((out / "summary.json").read_text())["metrics"]
    rows = rows_of(out / "scores.csv")
    scores = [float(row["score"]) for row in rows]
    assert facts["frames"] == len(rows) == FRAMES
    assert facts["flagged"] == sum(row["flagged"] == "1" for row in rows) > 0
    assert facts["highest_score"] == max(scores)
    shown = (
        f"{facts['threshold']:.4g}",
        f"{max(scores):.4g}",
        f"{100 * facts['flagged'] / FRAMES:.1f}%",
        "held-out normal frames are",
        "preset fast",
        "fastalps ",
    )
    for part in shown:
        assert part in text
    worst = rows[scores.index(max(scores))]["frame"]
    assert f"{worst}: {max(scores):.4g}" in text


def test_incomplete_results_are_recognisable(clip, tmp_path, capsys) -> None:
    frames = tmp_path / "frames"
    for t in range(12):
        save(frames / f"{t:03d}.png", np.full((HEIGHT, WIDTH), 90 + t, dtype=np.uint8))
    content = (frames / "011.png").read_bytes()
    save(frames / "012.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    # Readable as far as its header, which is all that is read in advance.
    (frames / "012.png").write_bytes(content[:40])
    import fastalps

    model = fastalps.load(clip.parent / "model.safetensors")
    model.calibration.settings["frames"] = "motion"
    fastalps.save(model, tmp_path / "motion.safetensors")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "motion.safetensors"), str(frames), "--out", str(out)]
    assert score.main([*arguments, "--chunk", "4"]) == 2
    assert "012.png" in capsys.readouterr().err
    names = {path.name for path in out.iterdir()} - {"overlays"}
    kinds = ("scores.{}csv", "scores.{}jsonl", "report.{}html", "timeline.{}png", "summary.{}json")
    assert names == {kind.format("partial.") for kind in kinds}
    assert len((out / "scores.partial.csv").read_text().splitlines()) == 1 + 12
    assert "Not complete: " in (out / "report.partial.html").read_text(encoding="utf-8")


def test_annotated_video(clip, tmp_path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastalps[video]'")
    out = tmp_path / "out"
    model = clip.parent / "model.safetensors"
    assert score.main([str(model), str(clip), "--out", str(out), "--annotated"]) == 0
    with av.open(str(out / "annotated.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == FRAMES
    # Colour on gray frames is the heatmap's.
    picture = frames[-1][30:-8, 8:-8].astype(int)
    difference = np.abs(picture[..., 0] - picture[..., 2])
    assert (difference > 40).mean() > 0.01


# Parts ------------------------------------------------------------------------------------------


def test_trace_keeps_the_highest(rng) -> None:
    scores = torch.rand(5 * POINTS + 7, generator=rng)
    trace = Trace()
    for part in scores.split(37):
        trace.add(part)
    points = trace.points()
    assert trace.step == 8 and len(points) <= POINTS
    expected = [float(part.max()) for part in scores.split(8)]
    assert points.tolist() == expected
    assert Trace().points().shape == (0,)


def test_histogram_counts_all(rng) -> None:
    counts = Histogram(0.01)
    scores = torch.cat([torch.rand(500, generator=rng) * 0.03, torch.tensor([0.0, 0.9])])
    for part in scores.split(50):
        counts.add(part)
    expected = torch.histc(scores.double(), BINS, 0, counts.width * BINS).long()
    assert int(counts.counts.sum()) == 502
    assert (counts.counts - expected).abs().sum() <= 2
    assert counts.width * BINS > 0.9 and Histogram(0.0).width > 0


def test_summary_refuses_broken_scores() -> None:
    summary = ScoreSummary(0.1)
    summary.add(torch.empty(0))
    with pytest.raises(UserError, match="not finite"):
        summary.add(torch.tensor([0.1, torch.inf]))


def test_worst_frames_are_apart(rng) -> None:
    scores = torch.rand(100, generator=rng).tolist()
    pixels = torch.zeros(2, 2)

    def frames(count: int, spacing: int) -> list[str]:
        worst = WorstFrames(count, spacing)
        for i, value in enumerate(scores):
            worst.offer(i, value, lambda i=i, v=value: Frame(str(i), pixels, pixels, v, 0.5))
        return [frame.name for frame in worst.frames()]

    order = sorted(range(100), key=lambda i: -scores[i])
    assert frames(5, 1) == [str(i) for i in order[:5]]
    best = sorted(max(range(b, b + 10), key=lambda i: scores[i]) for b in range(0, 100, 10))
    best.sort(key=lambda i: -scores[i])
    assert frames(4, 10) == [str(i) for i in best[:4]]
    assert frames(0, 1) == []


def test_files_say_when_they_are_complete(tmp_path) -> None:
    files = ScoreFiles(tmp_path, ("frame", "time", "score", "flagged"))
    files.write([])
    assert not list(tmp_path.iterdir())
    files.write([("1", None, 0.1, True)])
    # Readable while it grows.
    assert (tmp_path / "scores.partial.csv").read_text().splitlines()[1] == "1,,0.1,1"
    files.write([("2", 0.5, 1 / 3, False)])
    files.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "scores.jsonl"}
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"frame": "2", "time": 0.5, "score": 1 / 3, "flagged": False}


def test_drawings_of_few_frames() -> None:
    for values in ([], [0.5], [0.0, 0.0]):
        points = torch.tensor(values)
        for threshold in (0.0, 0.2):
            Page(timeline(points, threshold, ("1", "2")))
            counts = Histogram(threshold)
            counts.add(points)
            Page(histogram(counts, threshold))


def test_clock() -> None:
    assert clock(0) == "0:00:00.00" and clock(3725.5) == "1:02:05.50"
    assert clock(59.999) == "0:01:00.00"
