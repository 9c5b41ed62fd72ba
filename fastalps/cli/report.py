"""report.html: what came of a video, in one file that any browser opens without a network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from fastalps.calibration import Calibration
from fastalps.cli import report_page
from fastalps.cli.overlays import Frame, overlay
from fastalps.cli.score_summary import ScoreSummary
from fastalps.models import ModelConfig

REPORT = "report.html"
_REDUCTIONS = {
    "max": "the highest of its patches' errors",
    "mean": "the mean of its patches' errors",
    "topk": "the mean of its highest patches' errors",
}


def report_page_of(
    name: str,
    record: Mapping[str, Any],
    summary: ScoreSummary,
    worst: Sequence[Frame],
    calibration: Calibration,
    model: ModelConfig,
) -> str:
    """The report as HTML.

    Args:
        name: of what was scored.
        record: of `fastalps.environment.result_record`; its metrics are those of summary.json.
        summary: of the frames' scores.
        worst: frames to show, the worst first.
        calibration: what the threshold comes from.
        model: that scored.
    """
    facts = record["metrics"]
    return report_page.page(
        f"fastalps: {name}",
        [
            _head(name, facts, record),
            report_page.section("What the numbers mean", *_meaning(facts, calibration)),
            report_page.section("Timeline", _timeline(facts, summary)),
            report_page.section(
                "Worst frames",
                "<p class=soft>The worst frame of each second, the highest score first. Colour is "
                "the score of the patch under it: none at 0, brightest from twice the threshold "
                "on; a red border: flagged.</p>",
                f"<div class=frames>{''.join(map(_thumbnail, worst))}</div>",
            ),
            report_page.section(
                "Distribution of the scores",
                "<p class=soft>Frames by score; the heights are logarithmic. Red bars lie above "
                "the threshold.</p>",
                report_page.histogram(summary.histogram, summary.threshold),
            ),
            report_page.section("Facts", report_page.table(_facts(name, record, model))),
        ],
    )


def _head(name: str, facts: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    count, flagged = facts["frames"], facts["flagged"]
    share = 100 * flagged / count if count else 0.0
    values = [
        ("frames scored", f"{count:,}", False),
        (f"flagged ({share:.1f}%)", f"{flagged:,}", flagged > 0),
        ("highest score", f"{facts['highest_score']:.4g}", flagged > 0),
        ("threshold", f"{facts['threshold']:.4g}", False),
    ]
    parts = [f"<h1>{html.escape(name)}</h1>", f"<p class=soft>scored {record['date']}</p>"]
    if not facts["complete"]:
        parts.append(
            f"<p class=flag>Not complete: {html.escape(str(facts['ended_by']))}. What follows is "
            "about the frames before.</p>"
        )
    first = facts.get("drift", {}).get("first")
    if first:
        parts.append(f"<p class=flag>{html.escape(first)}</p>")
    return "".join(parts) + f"<section>{report_page.tiles(values)}</section>"


def _meaning(facts: Mapping[str, Any], calibration: Calibration) -> list[str]:
    reduce = calibration.settings.get("frame_reduce", "max")
    gate = calibration.settings.get("gate_threshold")
    threshold, side = facts["threshold"], calibration.settings.get("smoothing", 1)
    smoothed = "" if side == 1 else f", averaged over {side} x {side} pixels before it is squared"
    rule = facts["threshold_means"].removeprefix(f"{calibration.score_meaning}; ")
    rule = rule.replace("it is flagged", "a frame is flagged")
    texts = [
        f"A frame's score is {_REDUCTIONS.get(reduce, reduce)}. A patch's error is the mean "
        "squared difference between its pixels, in [0, 1], and what a network that has only seen "
        f"normal scenes makes of them{smoothed}: 0 is a perfect reconstruction, higher is more "
        "anomalous. "
        f"An error of {threshold:.4g} is a typical difference of {255 * threshold**0.5:.1f} of "
        "255 gray levels a pixel. A score is no probability."
        if threshold >= 0
        else "",
        f"Threshold: {rule}.",
    ]
    if gate is not None:
        moving = calibration.settings.get("frames") == "motion"
        still = "no change" if moving else "the background"
        texts.append(
            f"Patches that differ from {still} by at most {gate:g} gray levels on average are "
            "not looked at and score 0."
        )
    return [f"<p>{html.escape(text)}</p>" for text in texts if text]


def _timeline(facts: Mapping[str, Any], summary: ScoreSummary) -> str:
    step = summary.trace.step
    note = "" if step == 1 else f"<p class=soft>Each point is the highest of {step} frames.</p>"
    ends = ("frame 1", f"frame {facts['frames']}")
    return note + report_page.timeline(summary.trace.points(), summary.threshold, ends)


def _thumbnail(frame: Frame) -> str:
    times = "" if frame.time is None else f", {clock(frame.time)}"
    mark = " <span class=flag>flagged</span>" if frame.flagged else ""
    share = f" ({frame.score / frame.threshold:.2f} × threshold)" if frame.threshold > 0 else ""
    caption = f"{html.escape(frame.name)}{times}: {frame.score:.4g}{share}{mark}"
    return report_page.thumbnail(overlay(frame), f"frame {frame.name} with its heatmap", caption)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss.ss."""
    minutes, rest = divmod(round(seconds, 2), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:05.2f}"


def _facts(name: str, record: Mapping[str, Any], model: ModelConfig) -> list[tuple[str, object]]:
    facts, machine = record["metrics"], record["environment"]
    libraries = machine["libraries"]
    rows: list[tuple[str, object]] = [("input", name)]
    if "frame_size" in facts:
        height, width = facts["frame_size"]
        rate = facts["frame_rate"]
        rows += [
            ("frame size", f"{width} × {height} pixels, as gray"),
            ("frame rate", "unknown" if rate is None else f"{rate:g} frames/s"),
            ("frames dropped to keep up", facts["dropped_frames"]),
            ("damaged packets skipped", facts["damaged_packets"]),
        ]
        if facts["live"]:
            rows.append(("reconnections", facts["reconnections"]))
    rows += [
        (
            "model",
            f"preset {model.preset}, {model.perturbation} perturbation, latent of {model.latent}, "
            f"patches of {model.image_size[1]} × {model.image_size[0]} pixels",
        ),
        ("precision", facts["precision"]),
        (
            "speed",
            f"{facts['frames_per_second']:g} frames/s ({facts['timed']}); "
            f"{facts['frames_per_second_overall']:g} frames/s overall",
        ),
        (
            "patches past the motion gate",
            f"{facts['patches_past_the_motion_gate']:,} of {facts['patches']:,}",
        ),
    ]
    if "drift" in facts:
        drift = facts["drift"]
        rows.append(("windows with drift", f"{drift['drifted']} of {drift['windows']}"))
    rows += [
        ("processor", machine["cpu"]["model"] or "unknown"),
        ("versions", ", ".join(f"{key} {value}" for key, value in libraries.items() if value)),
    ]
    return rows
