"""`fastalps-score --profile`: where the time went, which stage was the slowest, and what to do.

The command's own thread takes frames from the decoding threads, hands them to the scorer and
writes. Its clock is divided among the stages without a rest (`StageTimes.lap`): a stage counts for
what it held this thread up, whatever else ran meanwhile. On a CUDA device the thread only waits;
that wait counts for the slower one of copying and computing, by the device's own events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastalps import distributed, quantization
from fastalps.cli.options import ScoreOptions
from fastalps.data.decode import worker_count
from fastalps.scoring import Scorer
from fastalps.stage_times import DECODE, StageTimes
from fastalps.streaming import COMPUTE, COPY, DEVICE_WAIT

# Stages of the command's thread, in `StageTimes.wall`.
START, READ, MOTION, SCORE, WRITE, FINISH = "start", "read", "motion", "score", "write", "finish"

TIMED = (
    "wall clock: how long the thread that scores and writes was in a stage or waited for it (adds "
    "up); worked: what the stage did, decoding on all its threads, also beside others (does not)"
)


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    Attributes:
        name: as it is shown.
        wall: seconds that the command's thread spent in it or waited for it.
        worked: seconds of work, of all its threads together.
        alone: frames or images a second that its work would allow, were there nothing else: at
            least, as it was measured beside the others. None = it has no such rate.
        once: whether it is done once, however long the input is.
    """

    name: str
    wall: float
    worked: float
    alone: float | None = None
    once: bool = False


@dataclass(frozen=True)
class Profile:
    """Where the time of one scoring went.

    Args:
        times: of the whole command, up to now.
        scorer: what scored.
        options: what was asked for.
        count: frames or images that were scored.
        unit: "frames" or "images".
        threads: that decoded.
        video: whether they were a video's.
        paced: whether the source sets the pace (a camera, --realtime).
        kept: share of the patches that passed the motion gate; None = there is no gate.
        annotated: whether a video was written.
    """

    times: StageTimes
    scorer: Scorer
    options: ScoreOptions
    count: int
    unit: str
    threads: int
    video: bool = False
    paced: bool = False
    kept: float | None = None
    annotated: bool = False

    def stages(self) -> list[Stage]:
        """The rows, in the order of the way; their `wall` adds up to the whole."""
        wall, worked = self.times.wall, self.times.worked
        threads = _threads(self.threads)
        pace = None
        if worked[DECODE] and not self.paced:
            # More are decoded than scored where a limit or Ctrl-C ends it.
            pace = self.threads * self.times.pieces[DECODE] / worked[DECODE]
        begun = "once: model, background" if self.unit == "frames" else "once: model"
        rows = [
            Stage(begun, wall[START], wall[START], once=True),
            Stage(f"decode ({threads})", wall[READ], worked[DECODE], pace),
        ]
        if wall[MOTION]:
            rows.append(self._own("change between frames", MOTION))
        rows += self._scoring()
        rows.append(self._own("write scores", WRITE))
        if wall[FINISH]:
            rows.append(Stage("once: pictures, report", wall[FINISH], wall[FINISH], once=True))
        return rows

    def _own(self, name: str, stage: str) -> Stage:
        """A stage that only the command's thread works on."""
        seconds = self.times.wall[stage]
        return Stage(name, seconds, seconds, self._rate(seconds))

    def _rate(self, seconds: float) -> float | None:
        return self.count / seconds if seconds else None

    def _scoring(self) -> list[Stage]:
        worked = self.times.worked
        name = self._network()
        if COMPUTE not in worked:
            return [self._own(name, SCORE)]
        waited = min(worked[DEVICE_WAIT], self.times.wall[SCORE])
        if self.scorer.gate is not None and self.scorer.method == "layers":
            # The host waits for the gate's count before it can start the network: all but waiting.
            waited = self.times.wall[SCORE]
        started = self.times.wall[SCORE] - waited
        copied, computed = worked[COPY], worked[COMPUTE]
        return [
            Stage("start the device's work", started, started, self._rate(started)),
            Stage("copy to the device", waited * (copied > computed), copied, self._rate(copied)),
            Stage(name, waited * (copied <= computed), computed, self._rate(computed)),
        ]

    def _network(self) -> str:
        size = distributed.world_size()
        name = "network" if self.scorer.gate is None else "gate and network"
        return f"{name} ({size} processes)" if size > 1 else name

    def slowest(self) -> Stage:
        """The stage that held the command up most, of those that grow with the input."""
        return max((row for row in self.stages() if not row.once), key=lambda row: row.wall)

    def advice(self) -> str:
        """What makes the slowest stage faster."""
        name = self.slowest().name
        if name.startswith("decode"):
            return self._advice_on_decoding()
        if name.startswith("change"):
            return "smaller frames, or a run on gray frames, which goes without"
        if name.startswith("start"):
            return "more frames at a time (--chunk)"
        if name.startswith("copy"):
            return "smaller frames: the link to the device has all that it can take"
        if name.startswith("write"):
            less = [
                text
                for text, asked in (
                    ("fewer --overlays", self.options.overlays and self.unit == "frames"),
                    ("no --annotated", self.annotated),
                )
                if asked
            ]
            return ", ".join([*less, "a faster disk for --out"])
        return self._advice_on_the_network()

    def _advice_on_decoding(self) -> str:
        if self.paced:
            return "nothing: the source sets the pace, and scoring keeps up with it"
        if self.video:
            return "a video of fewer pixels or of a codec that is quicker to decode, or more CPUs"
        times = self.times
        if times.computed[DECODE] < 0.5 * times.worked[DECODE]:
            return (
                "a faster disk, or more decoding threads (--workers), as they mostly waited for "
                "the disk or for a CPU"
            )
        if self.threads < worker_count(None):
            return f"more decoding threads (--workers {worker_count(None)}), smaller {self.unit}"
        return f"more CPUs, as each has a decoding thread, or smaller {self.unit}"

    def _advice_on_the_network(self) -> str:
        scorer, precision = self.scorer, self.scorer.precision
        ways = []
        if scorer.device.type == "cpu":
            narrow = quantization.in_hardware("int8")
            if narrow and precision != "int8" and scorer.model.quantization is not None:
                ways.append("--precision int8")
        elif precision == "fp32":
            ways.append("--precision bf16")
        if self.kept is not None and self.kept > 0.5:
            ways.append(
                f"a run with a higher --gate-threshold ({100 * self.kept:.0f}% of the patches pass)"
            )
        if scorer.model.config.preset != "fast":
            ways.append("a run with --preset fast")
        if scorer.device.type == "cpu":
            ways.append("more CPUs (several processes with torchrun) or a GPU")
        elif not ways:
            ways.append("a faster device, or several (torchrun)")
        return ", ".join(ways)

    def facts(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "timed": TIMED,
            "wall_seconds": round(self.times.total, 4),
            "stages": [
                {
                    "stage": row.name,
                    "wall_seconds": round(row.wall, 4),
                    "worked_seconds": round(row.worked, 4),
                    f"{self.unit}_per_second_alone": None
                    if row.alone is None
                    else round(row.alone, 1),
                    "once": row.once,
                }
                for row in self.stages()
            ],
            "slowest": self.slowest().name,
            "advice": self.advice(),
        }

    def text(self) -> str:
        """The table, and the line about the slowest stage."""
        total, slowest = self.times.total, self.slowest()
        where = str(self.scorer.device)
        if where == "cpu":
            where += f", {_threads(torch.get_num_threads())}"

        def share(seconds: float) -> str:
            return f"{seconds / total:.0%}" if total else ""

        def rate(value: float | None) -> str:
            return "" if value is None else f"{value:,.0f} {self.unit}/s"

        table = [("stage", "wall clock", "share", "worked", "alone, at least")]
        for row in self.stages():
            worked = f"{row.worked:.2f} s"
            table.append((row.name, f"{row.wall:.2f} s", share(row.wall), worked, rate(row.alone)))
        overall = self.count / total if total else None
        table.append(("total", f"{total:.2f} s", share(total), "", rate(overall)))
        lines = [
            f"where the time went ({self.count} {self.unit}, {where}):",
            *(f"  {a:26}{b:>10}{c:>7}{d:>10}{e:>19}".rstrip() for a, b, c, d, e in table),
            TIMED,
            f"slowest: {slowest.name}, {share(slowest.wall)} of the wall clock; faster with: "
            f"{self.advice()}",
        ]
        once = sum(row.wall for row in self.stages() if row.once)
        if once > 0.5 * total:
            lines.append(f"{share(once)} is done once: a longer input takes hardly more of it")
        return "\n".join(lines)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
