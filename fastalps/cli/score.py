"""``fastalps-score``: a trained run and new images or frames in, scores and pictures out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastalps
from fastalps import distributed, environment
from fastalps.calibration import Calibration
from fastalps.cli import command, plots, run_folder, shared_scoring
from fastalps.cli.frame_sources import Source
from fastalps.cli.old_results import check_apart, remove_results
from fastalps.cli.options import ScoreOptions, make_parser, parse, pick
from fastalps.cli.score_files import SUMMARY, TIMELINE
from fastalps.cli.score_frames import Extras, score_source, threshold_of
from fastalps.cli.score_profile import READ, SCORE, START, WRITE, Profile
from fastalps.cli.score_summary import Watch
from fastalps.data import read_images
from fastalps.data.decode import worker_count
from fastalps.data.video_source import VIDEO_SUFFIXES, is_url
from fastalps.errors import UserError
from fastalps.files import make_folder
from fastalps.gate import MotionGate
from fastalps.models import ALPS
from fastalps.scoring import Scorer
from fastalps.stage_times import StageTimes

NAME = "fastalps-score"

USAGE = """fastalps-score RUN INPUT --out DIR [options]

  fastalps-score runs/two new-images --out scored
  fastalps-score runs/ped2 data/UCSDped2/Test/Test001 --out scored --overlays 20
  fastalps-score runs/gate gate.mp4 --out scored
  fastalps-score runs/gate rtsp://camera/stream --out scored --realtime   (Ctrl-C ends it)
  torchrun --nproc-per-node=4 -m fastalps.cli.score runs/ped2 frames --out scored"""

DESCRIPTION = """Scores new data with a run of fastalps-train.

RUN is the run's folder (or its model.safetensors), or pretrained:mnist-0 or
pretrained:ucsd-ped2-motion (docs/pretrained.md). INPUT is, for a run on images, a folder of
images (sub-folders too) or one image, resized to the model's size where they differ; for a run on
video, a video file, a folder of frames, a camera (/dev/video0) or an address (rtsp://, http://), of
any size from a patch up. Videos need PyAV: pip install 'fastalps[video]'. DIR gets scores.csv
(name, score, flagged), timeline.png, summary.json and, for video, scores.jsonl, overlays/ (the
frames with the highest scores under their heatmaps) and report.html, which holds all of it for a
browser. Scores of video are written as they come, to scores.partial.csv and .jsonl until all are
there. They replace those of an earlier run in DIR. Flagged is what scores above the threshold that
the run set on held-out normal data; a line warns where the scores have drifted from that data's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, see `fastalps.cli.command.run`."""
    return command.run(NAME, score, arguments)


def score(arguments: Sequence[str]) -> None:
    """Parses the arguments, scores the input and writes the results."""
    parser = make_parser(NAME, DESCRIPTION, USAGE, ScoreOptions)
    parser.add_argument(
        "run", help="folder of a run of fastalps-train, a model.safetensors, or pretrained:NAME"
    )
    parser.add_argument("input", help="images, frames, a video, a camera or an address")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="drop frames (and count them) where scoring is slower than the video",
    )
    parser.add_argument(
        "--annotated",
        action="store_true",
        help="write annotated.mp4, too: each frame of a video with heatmap, score and flag",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="tell where the time went, stage by stage, and what the slowest one needs",
    )
    times = StageTimes()
    try:
        namespace = parse(parser, arguments)
        options = pick(namespace, ScoreOptions)
    except UserError as error:
        if distributed.starts_first():
            raise
        raise command.Told from error
    # Messages are frames and scores, which are on CPUs before and after.
    with distributed.launched(options.device, "gloo") as device:
        device = str(environment.find_device(device))
        if distributed.rank():
            shared_scoring.follow(lambda: _load(namespace.run, options, device)[0])
            return
        with shared_scoring.leading():
            scorer, calibration = _load(namespace.run, options, device)
            _score(namespace, options, scorer, calibration, times)


def _load(run: str, options: ScoreOptions, device: str) -> tuple[Scorer, Calibration]:
    model = fastalps.load(run_folder.model_path(run))
    if model.calibration is None:
        raise UserError(f"{run}: the model has no threshold; calibrate and save it")
    return make_scorer(model, model.calibration, options, device), model.calibration


def _score(
    namespace: Any,
    options: ScoreOptions,
    scorer: Scorer,
    calibration: Calibration,
    times: StageTimes,
) -> None:
    # What threads and the device do is timed on demand.
    details = times if namespace.profile else None
    scorer.times = details
    check_apart(namespace.input, namespace.out, searched=calibration.level == "image")
    if calibration.level == "image":
        if is_url(namespace.input) or namespace.realtime or namespace.annotated:
            raise UserError(
                f"{namespace.run} is a run on images, which scores a folder of images or one "
                "image; for videos and cameras train a run on video"
            )
        folder = make_folder(namespace.out)
        _score_images(
            scorer, Path(namespace.input), folder, calibration, options, times, namespace.profile
        )
        return
    with Source(namespace.input, options, namespace.realtime, details) as source:
        folder = make_folder(namespace.out)
        extras = Extras(namespace.annotated, namespace.profile)
        score_source(source, scorer, folder, calibration, options, times, extras)


def make_scorer(
    model: ALPS, calibration: Calibration, options: ScoreOptions, device: str
) -> Scorer:
    """A scorer with the settings that the threshold was set with."""
    settings = calibration.settings
    common: dict[str, Any] = {"batch_size": options.batch_size, "device": device}
    if calibration.level == "image":
        return Scorer(model, calibration.score, options.precision, **common)
    threshold = settings.get("gate_threshold")
    return Scorer(
        model,
        calibration.score,
        options.precision,
        stride=settings.get("stride"),
        edge=settings.get("edge", "cover"),
        gate=None if threshold is None else MotionGate(threshold),
        frame_reduce=settings.get("frame_reduce", "max"),
        top_k=settings.get("top_k", 3),
        **common,
    )


def _score_images(
    scorer: Scorer,
    source: Path,
    folder: Path,
    calibration: Calibration,
    options: ScoreOptions,
    times: StageTimes,
    profile: bool,
) -> None:
    if not source.exists():
        raise UserError(f"the input {source} does not exist; give a folder of images or an image")
    if source.suffix.lower() in VIDEO_SUFFIXES:
        raise UserError(
            f"{source} is a video, but the run is on images; give a run that was trained on video"
        )
    threads = worker_count(options.workers)
    times.lap(START)
    images, names = read_images(
        source,
        size=scorer.image_size,
        channels=scorer.channels,
        workers=threads,
        times=times if profile else None,
    )
    times.lap(READ)
    scores = shared_scoring.score_images(scorer, images)
    times.lap(SCORE)
    watch = Watch(calibration)
    watch.add(scores)
    watch.finish()
    threshold, meaning = threshold_of(calibration, options)
    flagged = scores > threshold
    rows = [
        (name, float(value), bool(flag))
        for name, value, flag in zip(names, scores, flagged, strict=True)
    ]
    remove_results(folder)
    run_folder.write_scores(folder / run_folder.SCORES, ("image", "score", "flagged"), rows)
    plots.timeline(folder / TIMELINE, scores, calibration, threshold, f"{source.name}: scores")
    rate = len(scores) / times.wall[SCORE]
    facts: dict[str, Any] = {
        "images": len(scores),
        "flagged": int(flagged.sum()),
        "threshold": threshold,
        "threshold_means": meaning,
        "images_per_second": round(rate, 2),
        "timed": "scoring only, from decoded pixels to scores; not reading, not drawing",
        "precision": scorer.precision,
        "processes": distributed.world_size(),
    }
    facts |= watch.facts()
    times.lap(WRITE)
    profiled = Profile(times, scorer, options, len(scores), "images", threads) if profile else None
    if profiled is not None:
        facts["profile"] = profiled.facts()
    record = environment.result_record("score, level image", facts, seed=None, input=source.name)
    run_folder.write_metrics(folder / SUMMARY, record)
    print(
        f"{len(scores)} images, {int(flagged.sum())} flagged; scored at {rate:,.1f} images/s "
        f"({scorer.precision}{shared_scoring.processes_text()}; decoding and drawing not counted)"
    )
    print(meaning)
    text = watch.text()
    if text is not None:
        print(text)
    if profiled is not None:
        print(profiled.text())
    print(f"wrote {folder}: {run_folder.SCORES}, {TIMELINE}, {SUMMARY}")


if __name__ == "__main__":
    sys.exit(main())
