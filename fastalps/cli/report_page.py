"""The look of the HTML report: one page without any outside resource, light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastalps.cli.score_summary import Histogram

if TYPE_CHECKING:
    from PIL import Image

# The drawings' own units; they are stretched to the page, lines keep their width.
WIDTH, HEIGHT = 1000, 200
JPEG_QUALITY = 85
THUMBNAIL = 480

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1a202c; --soft: #5a6577;
  --line: #d9dee7; --score: #2b6cb0; --flag: #c53030; }
@media (prefers-color-scheme: dark) { :root { --page: #12161d; --card: #1b212b; --text: #e6eaf0;
  --soft: #9aa5b5; --line: #323b49; --score: #63a4e8; --flag: #fc6c6c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: .5rem 0; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem; margin: 1rem 0; }
p { margin: .4rem 0; }
.soft, figcaption, .axis { color: var(--soft); font-size: .85rem; }
.flag { color: var(--flag); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.2; }
svg { display: block; width: 100%; height: 12rem; }
.plot { border-bottom: 1px solid var(--line); }
.axis { display: flex; justify-content: space-between; gap: 1rem; }
.axis :first-child, .axis :last-child { flex: none; }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
img { width: 100%; height: auto; border-radius: .25rem; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-top: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); width: 40%; }
.line { fill: none; stroke: var(--score); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.over { stroke: var(--flag); }
.limit { stroke: var(--text); stroke-dasharray: 6 4; vector-effect: non-scaling-stroke; }
.bar { fill: var(--score); } .bar.over { fill: var(--flag); stroke: none; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document; its policy keeps a browser from loading anything else."""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def section(heading: str, *content: str) -> str:
    """A card with a heading."""
    return f"<section><h2>{html.escape(heading)}</h2>\n" + "\n".join(content) + "\n</section>"


def table(rows: Sequence[tuple[str, object]]) -> str:
    """Names and values."""
    lines = [
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows
    ]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def tiles(values: Sequence[tuple[str, str, bool]]) -> str:
    """Large figures: what it is, its value, whether it stands out."""
    parts = [
        f"<div><b{' class=flag' if marked else ''}>{html.escape(value)}</b>"
        f"<span class=soft>{html.escape(name)}</span></div>"
        for name, value, marked in values
    ]
    return f"<div class=tiles>{''.join(parts)}</div>"


def thumbnail(picture: Image.Image, description: str, caption: str) -> str:
    """A picture, made small enough for a page, with a caption (HTML)."""
    picture = picture.copy()
    picture.thumbnail((THUMBNAIL, 2 * THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(content.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{html.escape(description)}" width="{picture.width}" '
        f'height="{picture.height}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def timeline(points: Tensor, threshold: float, ends: tuple[str, str]) -> str:
    """Scores over time, what is above the threshold in red.

    Args:
        points: (n,) float32.
        threshold: drawn as a dashed line.
        ends: what the left and the right end of the axis are called.
    """
    values = points.tolist() or [0.0]
    top = 1.05 * max([*values, 1.2 * threshold]) or 1.0
    step = WIDTH / max(1, len(values) - 1)
    # A single point is a line across, which can be seen.
    xs = [i * step for i in range(len(values))] if len(values) > 1 else [0, WIDTH]
    ys = [HEIGHT * (1 - value / top) for value in (values if len(values) > 1 else values * 2)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    limit = HEIGHT * (1 - threshold / top)
    return (
        f'<div class=plot><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="scores over time, highest {max(values):.4g}">'
        f'<defs><clipPath id="above"><rect width="{WIDTH}" height="{max(limit, 0):.1f}"/>'
        f'</clipPath></defs><polyline class="line" points="{corners}"/>'
        f'<polyline class="line over" clip-path="url(#above)" points="{corners}"/>'
        f'<line class="limit" x1="0" x2="{WIDTH}" y1="{limit:.1f}" y2="{limit:.1f}"/></svg></div>'
        f"<div class=axis><span>{html.escape(ends[0])}</span>"
        f"<span>highest {max(values):.4g}, dashed: threshold {threshold:.4g}</span>"
        f"<span>{html.escape(ends[1])}</span></div>"
    )


def histogram(counts: Histogram, threshold: float) -> str:
    """How many frames have which score; the bars' heights are logarithmic."""
    used = counts.counts.nonzero().flatten()
    last = int(used[-1]) if len(used) else 0
    bins = min(len(counts.counts), max(last, int(1.2 * threshold / counts.width)) + 1)
    shown = counts.counts[:bins].double()
    heights = shown.log1p() / max(float(shown.max().log1p()), 1e-9) * (HEIGHT - 4)
    width = WIDTH / bins
    bars = []
    for i, height in enumerate(heights.tolist()):
        if height:
            over = " over" if i * counts.width >= threshold else ""
            bars.append(
                f'<rect class="bar{over}" x="{i * width:.1f}" width="{0.85 * width:.1f}" '
                f'y="{HEIGHT - height:.1f}" height="{height:.1f}">'
                f"<title>{int(shown[i])} frames of {i * counts.width:.4g} to "
                f"{(i + 1) * counts.width:.4g}</title></rect>"
            )
    limit = threshold / counts.width * width
    return (
        f'<div class=plot><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="histogram of the scores">{"".join(bars)}'
        f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{HEIGHT}"/></svg></div>'
        f"<div class=axis><span>score 0</span><span>dashed: threshold {threshold:.4g}</span>"
        f"<span>{bins * counts.width:.4g}</span></div>"
    )
