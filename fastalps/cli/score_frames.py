"""Scoring frames as they come, and writing what came of them."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastalps import distributed, environment
from fastalps.calibration import Calibration, level_scores
from fastalps.cli import command, plots, run_folder, shared_scoring
from fastalps.cli.annotate import ANNOTATED, AnnotatedVideo
from fastalps.cli.frame_sources import Chunk, Source
from fastalps.cli.old_results import remove_results
from fastalps.cli.options import ScoreOptions
from fastalps.cli.overlays import Frame, WorstFrames, draw_overlay
from fastalps.cli.report import REPORT, report_page_of
from fastalps.cli.score_files import LINES, OVERLAYS, SUMMARY, TIMELINE, ScoreFiles, partial
from fastalps.cli.score_profile import FINISH, MOTION, READ, SCORE, START, WRITE, Profile
from fastalps.cli.score_summary import ScoreSummary, Watch
from fastalps.data import motion_frames
from fastalps.errors import UserError
from fastalps.files import make_folder, write_text
from fastalps.frame_scores import FrameScores
from fastalps.gate import MotionGate
from fastalps.scoring import Scorer
from fastalps.stage_times import StageTimes

# Frames in the report; of a source that states no frame rate, one of so many.
REPORTED = 12
SPACING = 25


def threshold_of(calibration: Calibration, options: ScoreOptions) -> tuple[float, str]:
    """The threshold, and what it and a score mean."""
    if options.threshold is None:
        return calibration.threshold, calibration.explain()
    asked = options.threshold
    return asked, f"{calibration.score_meaning}; above {asked:g} it is flagged, as asked for"


@dataclass(frozen=True)
class Extras:
    """What is written on demand.

    Attributes:
        annotated: the video with heatmaps and flags.
        profile: where the time went, into the summary and onto the screen.
    """

    annotated: bool = False
    profile: bool = False


def score_source(
    source: Source,
    scorer: Scorer,
    folder: Path,
    calibration: Calibration,
    options: ScoreOptions,
    times: StageTimes,
    extras: Extras,
) -> None:
    """Scores frames to their end, an error or Ctrl-C, and writes all results into `folder`.

    Args:
        times: of the command, begun with it; with a profile, the source and the scorer add to it.

    Raises:
        UserError: nothing could be scored, or the source broke off. command.Interrupted: Ctrl-C.
            What was scored before has been written by then, under names with ".partial" (but
            under the final ones where a source without an end was stopped by Ctrl-C).
    """
    run = FrameRun(source, scorer, folder, calibration, options, times, extras)
    problem: UserError | command.Interrupted | None = None
    complete = True
    begin = time.perf_counter()
    try:
        run.score_all()
    except UserError as error:
        if not run.summary.frames:
            raise
        problem, complete = error, False
    except KeyboardInterrupt:
        if not run.summary.frames:
            raise
        if distributed.world_size() > 1:
            # torchrun passes on what the terminal has sent to all: once is enough.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        problem = command.Interrupted(f"stopped after {run.summary.frames} frames")
        complete = source.live
    finally:
        run.close()
    run.write(complete, problem, time.perf_counter() - begin)
    if problem is not None:
        raise problem


@dataclass
class _Counts:
    """Patches, and how many of them the motion gate let through."""

    patches: int = 0
    kept: int = 0


class FrameRun:
    """The frames of one source on their way through a scorer."""

    def __init__(
        self,
        source: Source,
        scorer: Scorer,
        folder: Path,
        calibration: Calibration,
        options: ScoreOptions,
        times: StageTimes,
        extras: Extras,
    ) -> None:
        if scorer.channels != 1:
            raise UserError(
                f"the model takes {scorer.channels} channels, but frames are read as gray (1); "
                "train one on gray frames"
            )
        self.source, self.scorer, self.folder = source, scorer, folder
        self.calibration, self.options = calibration, options
        self.clock, self.extras = times, extras
        self.threshold, self.meaning = threshold_of(calibration, options)
        self.summary = ScoreSummary(self.threshold)
        self.watch = Watch(calibration)
        self.worst = WorstFrames(max(0, options.overlays))
        rate = None if source.video is None else source.video.frame_rate
        self.reported = WorstFrames(REPORTED, max(1, round(rate or SPACING)))
        self.annotated = AnnotatedVideo(folder, rate) if extras.annotated else None
        self.counts = _Counts()
        timed = () if source.video is None else ("time",)
        self.files = ScoreFiles(folder, ("frame", *timed, "score", "flagged"))
        # Read, and not yet scored.
        self._chunks: deque[Chunk] = deque()

    def score_all(self) -> None:
        """Scores every frame of the source; rows are written chunk by chunk."""
        moving = self.calibration.settings.get("frames") == "motion"
        gate = self.scorer.gate
        if gate is not None:
            self.scorer.gate = MotionGate(gate.threshold, self.source.background(moving))
        self.clock.lap(START)
        for result in shared_scoring.score_frames(self.scorer, self._pixels(moving)):
            self.clock.lap(SCORE)
            self._take(self._chunks.popleft(), result)
            self.clock.lap(WRITE)
        self.watch.finish()

    def _pixels(self, moving: bool) -> Iterator[Tensor]:
        """What the scorer sees of each chunk, the last of `_chunks` then."""
        before: Tensor | None = None
        chunks = iter(self.source)
        while True:
            # The scorer has worked since it took the chunk before.
            self.clock.lap(SCORE)
            chunk = next(chunks, None)
            self.clock.lap(READ)
            if chunk is None:
                return
            self._chunks.append(chunk)
            frames = chunk.frames
            if moving:
                frames = motion_frames(chunk.frames, before)
                before = chunk.frames[-1].clone()
                self.clock.lap(MOTION)
            yield frames

    def _take(self, chunk: Chunk, result: FrameScores) -> None:
        counts, options = self.counts, self.options
        counts.patches += result.patches.numel()
        counts.kept += result.patches.numel() if result.kept is None else int(result.kept.sum())
        scores = result.frames.cpu()
        self.watch.add(level_scores(result, self.calibration.level))
        offset = self.summary.frames
        if not offset:
            # Not before: what fails at the input leaves all as it was.
            remove_results(self.folder)
        self.summary.add(scores)
        times = ((),) * len(scores) if self.source.video is None else zip(chunk.times)
        self.files.write(
            [
                (name, *map(_rounded, seconds), score, score > self.threshold)
                for name, seconds, score in zip(chunk.names, times, scores.tolist(), strict=True)
            ]
        )
        for i, score in enumerate(scores.tolist()):

            def made(i: int = i) -> Frame:
                return self._frame(chunk, result, i)

            if options.overlays < 0:
                draw_overlay(make_folder(self.folder / OVERLAYS), made())
            self.worst.offer(offset + i, score, made)
            self.reported.offer(offset + i, score, made)
            if self.annotated is not None:
                self.annotated.add(made())

    def _frame(self, chunk: Chunk, result: FrameScores, i: int) -> Frame:
        return Frame(
            chunk.names[i],
            # Not a view, which would keep the whole chunk.
            chunk.frames[i].clone(),
            result.heatmaps([i])[0].cpu(),
            float(result.frames[i]),
            self.threshold,
            chunk.times[i],
        )

    def close(self) -> None:
        """Ends the files that grew with the frames, under the names that they have."""
        self.files.close()
        if self.annotated is not None:
            self.annotated.close()

    def write(self, complete: bool, problem: Exception | None, wall_seconds: float) -> None:
        """Writes the results and prints what they are; their names tell whether all is there."""
        if complete:
            self.files.finish()
            if self.annotated is not None:
                self.annotated.finish()
        for frame in self.worst.frames():
            draw_overlay(make_folder(self.folder / OVERLAYS), frame)
        name = self.source.name
        plots.trace(
            self._named(TIMELINE, complete),
            self.summary.trace.points(),
            self.summary.trace.step,
            self.calibration,
            self.threshold,
            f"{name}: scores",
        )
        record = environment.result_record(
            f"score, level {self.calibration.level}",
            self.facts(complete, problem, wall_seconds),
            seed=None,
            input=name,
        )
        page = report_page_of(
            name,
            record,
            self.summary,
            self.reported.frames(),
            self.calibration,
            self.scorer.model.config,
        )
        write_text(self._named(REPORT, complete), page)
        self.clock.lap(FINISH)
        if self.extras.profile:
            record["metrics"]["profile"] = self._profile().facts()
        run_folder.write_metrics(self._named(SUMMARY, complete), record)
        self._print(complete, wall_seconds)

    def _profile(self) -> Profile:
        counts, video = self.counts, self.source.video
        return Profile(
            self.clock,
            self.scorer,
            self.options,
            self.summary.frames,
            "frames",
            self.source.threads,
            video=video is not None,
            paced=video is not None and (video.live or video.realtime),
            kept=counts.kept / counts.patches if self.scorer.gate and counts.patches else None,
            annotated=self.extras.annotated,
        )

    def _seconds(self) -> float:
        """Of the way from decoded pixels to scores."""
        return self.clock.wall[MOTION] + self.clock.wall[SCORE]

    def _named(self, name: str, complete: bool) -> Path:
        path = self.folder / name
        return path if complete else partial(path)

    def facts(
        self, complete: bool, problem: Exception | None, wall_seconds: float
    ) -> dict[str, Any]:
        """The figures of the run, ready for JSON."""
        summary, counts, video = self.summary, self.counts, self.source.video
        rate = summary.frames / self._seconds() if self._seconds() else 0.0
        facts: dict[str, Any] = {
            "frames": summary.frames,
            "complete": complete,
            "ended_by": None if problem is None else str(problem),
            "flagged": summary.flagged,
            "highest_score": summary.highest,
            "threshold": self.threshold,
            "threshold_means": self.meaning,
            "frames_per_second": round(rate, 2),
            "timed": "scoring only, from decoded pixels to scores; not reading, not drawing",
            "frames_per_second_overall": round(summary.frames / wall_seconds, 2),
            "precision": self.scorer.precision,
            "processes": distributed.world_size(),
            "patches": counts.patches,
            "patches_past_the_motion_gate": counts.kept,
        }
        if video is not None:
            facts |= {
                "frame_size": list(video.frame_size),
                "frame_rate": video.frame_rate,
                "live": video.live,
                "dropped_frames": video.dropped,
                "damaged_packets": video.damaged,
                "reconnections": video.reconnected,
            }
        return facts | self.watch.facts()

    def _print(self, complete: bool, wall_seconds: float) -> None:
        summary, counts, video = self.summary, self.counts, self.source.video
        rate = summary.frames / self._seconds() if self._seconds() else 0.0
        print(
            f"{summary.frames} frames, {summary.flagged} flagged; scored at {rate:,.1f} frames/s "
            f"({self.scorer.precision}{shared_scoring.processes_text()}; decoding and drawing not "
            f"counted), {summary.frames / wall_seconds:,.1f} frames/s overall"
        )
        if counts.patches:
            share = 100 * counts.kept / counts.patches
            print(f"{share:.1f}% of the patches passed the motion gate; the others score 0")
        if video is not None and (video.realtime or video.dropped or video.damaged):
            print(
                f"{video.dropped} frames dropped to keep up, {video.damaged} damaged packets "
                f"skipped, {video.reconnected} reconnections"
            )
        print(self.meaning)
        text = self.watch.text()
        if text is not None:
            print(text)
        if self.extras.profile:
            print(self._profile().text())
        names = [run_folder.SCORES, LINES, REPORT, TIMELINE, SUMMARY]
        if self.annotated is not None:
            names.append(ANNOTATED)
        listed = ", ".join(self._named(name, complete).name for name in names)
        print(f"wrote {self.folder}: {listed}")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
