"""`fastalps-score --profile`: the clock, which stage is named, and what the command writes."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from fastalps import backends
from fastalps.cli import score, score_profile
from fastalps.cli.options import ScoreOptions
from fastalps.cli.score_profile import FINISH, MOTION, READ, SCORE, START, WRITE, Profile
from fastalps.data.decode import worker_count
from fastalps.stage_times import DECODE, StageTimes
from fastalps.streaming import COMPUTE, COPY, DEVICE_WAIT
from tests.commands import error_of
from tests.images import save
from tests.videos import PATCH, run_on, run_on_images, scene, write

pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastalps[video]'")


def test_laps_divide_the_whole(monkeypatch) -> None:
    clock = iter([1.0, 3.0, 4.0, 8.0])
    monkeypatch.setattr("fastalps.stage_times.time.perf_counter", lambda: next(clock))
    times = StageTimes()
    for stage in ("a", "b", "a"):
        times.lap(stage)
    assert dict(times.wall) == {"a": 6.0, "b": 1.0} and times.total == 7.0


def test_work_of_several_threads() -> None:
    times = StageTimes()
    square = times.calls("square", lambda x: x * x)

    def run() -> None:
        for x in range(100):
            assert square(x) == x * x

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert times.pieces["square"] == 400 and times.worked["square"] > 0
    assert list(times.items("count", iter(range(5)))) == list(range(5))
    assert not times.wall

    def broken():
        yield 1
        raise ValueError("the lens fell off")

    items = times.items("broken", broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="lens"):
        next(items)


def made_up(
    device="cpu", precision="fp32", preset="paper", gate=True, quantized=True, method="fused"
):
    """What a profile asks a scorer for."""
    model = SimpleNamespace(
        config=SimpleNamespace(preset=preset), quantization=object() if quantized else None
    )
    device = torch.device(device)
    return SimpleNamespace(
        device=device,
        precision=precision,
        model=model,
        method=method,
        gate=object() if gate else None,
    )


def profile(wall: dict, worked: dict | None = None, scorer=None, threads=2, **more) -> Profile:
    times = StageTimes()
    times.wall.update({START: 30.0, FINISH: 30.0} | wall)
    times.worked.update({DECODE: 4.0} | (worked or {}))
    times.computed.update({DECODE: 3.0} | more.pop("computed", {}))
    times.pieces[DECODE] = 100
    options = more.pop("options", ScoreOptions())
    return Profile(times, scorer or made_up(), options, 100, "frames", threads, **more)


SCORES = {SCORE: 8.0, READ: 1.0, WRITE: 1.0}


@pytest.mark.parametrize(
    ("found", "name", "advice"),
    [
        (profile(SCORES | {READ: 8.5}), "decode (2 threads)", None),
        (profile(SCORES | {READ: 8.5}, computed={DECODE: 0.5}), "decode (2 threads)", "--workers"),
        (profile(SCORES | {READ: 8.5}, threads=1, video=True), "decode (1 thread)", "codec"),
        (profile(SCORES | {READ: 8.5}, video=True, paced=True), "decode (2 threads)", "keeps up"),
        (profile(SCORES | {MOTION: 9.0}), "change between frames", "gray frames"),
        (profile(SCORES | {WRITE: 9.0}), "write scores", "disk"),
        (profile(SCORES | {WRITE: 9.0}, annotated=True), "write scores", "no --annotated"),
        (profile(SCORES), "gate and network", "preset fast"),
        (profile(SCORES, kept=0.8), "gate and network", "80% of the patches"),
        (profile(SCORES, scorer=made_up(gate=False, preset="fast")), "network", "torchrun"),
        (
            profile(
                SCORES,
                {COPY: 1.0, COMPUTE: 5.0, DEVICE_WAIT: 7.0},
                made_up("cuda", precision="fp32"),
            ),
            "gate and network",
            "bf16",
        ),
        (
            profile(SCORES, {COPY: 6.0, COMPUTE: 5.0, DEVICE_WAIT: 7.0}, made_up("cuda")),
            "copy to the device",
            "smaller frames",
        ),
        (
            profile(SCORES, {COPY: 1.0, COMPUTE: 5.0, DEVICE_WAIT: 1.0}, made_up("cuda")),
            "start the device's work",
            "--chunk",
        ),
        (
            # The host waits within the gate of this path: not for work to be started.
            profile(
                SCORES,
                {COPY: 1.0, COMPUTE: 5.0, DEVICE_WAIT: 1.0},
                made_up("cuda", method="layers"),
            ),
            "gate and network",
            "bf16",
        ),
    ],
)
def test_the_slowest_stage_is_named(found: Profile, name, advice) -> None:
    assert found.slowest().name == name
    assert advice is None or advice in found.advice()
    text = found.text()
    assert f"slowest: {name}, " in text and found.advice() in text
    assert f"\n  {name} " in text
    assert "done once" in text
    # Nothing of the clock is lost, and nothing is in it twice.
    assert sum(row.wall for row in found.stages()) == pytest.approx(found.times.total)
    facts = json.loads(json.dumps(found.facts()))
    assert facts["slowest"] == name and facts["wall_seconds"] == pytest.approx(found.times.total)


def test_rates_of_stages_alone() -> None:
    rows = {row.name: row for row in profile(SCORES).stages()}
    # Two threads worked 4 seconds on 100 frames: together 50 a second.
    assert rows["decode (2 threads)"].alone == 50.0
    assert rows["gate and network"].alone == 12.5
    assert rows["once: model, background"].alone is None
    paced = {row.name: row for row in profile(SCORES, paced=True).stages()}
    assert paced["decode (2 threads)"].alone is None


def test_int8_only_where_it_is_fast(monkeypatch) -> None:
    for instructions, expected in ((("avx512_vnni",), True), (("avx_vnni",), True), ((), False)):
        monkeypatch.setattr(backends, "dot_products", lambda i=instructions: i)
        assert ("int8" in profile(SCORES).advice()) == expected
        assert "int8" not in profile(SCORES, scorer=made_up(quantized=False)).advice()


def test_more_decoding_threads_only_where_there_are_cpus(monkeypatch) -> None:
    reading = SCORES | {READ: 8.5}
    monkeypatch.setattr(score_profile, "worker_count", lambda asked: 8)
    assert "--workers 8" in profile(reading).advice()
    assert "--workers" not in profile(reading, threads=8).advice()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("profiled")
    frames = scene(33)
    for t, frame in enumerate(frames):
        save(root / "frames" / f"{t}.png", frame)
        save(root / "images" / f"{t}.png", frame[:PATCH, :PATCH])
    run_on_images(root / "image-run")
    run_on(root / "gray-run", frames)
    run_on(root / "motion-run", frames, motion=True)
    write(root / "a.mkv", frames)
    return root


@pytest.mark.parametrize(
    ("run", "source", "stages"),
    [
        ("gray-run", "frames", {READ, SCORE, WRITE, START, FINISH}),
        ("motion-run", "frames", {READ, MOTION, SCORE, WRITE, START, FINISH}),
        ("motion-run", "a.mkv", {READ, MOTION, SCORE, WRITE, START, FINISH}),
        ("image-run", "images", {READ, SCORE, WRITE, START}),
    ],
)
def test_command(inputs, tmp_path, capsys, run, source, stages) -> None:
    common = [str(inputs / run), str(inputs / source), "--device", "cpu"]
    more = [] if source == "images" else ["--chunk", "5"]
    assert score.main([*common, *more, "--out", str(tmp_path / "plain")]) == 0
    assert "where the time went" not in capsys.readouterr().out
    facts = json.loads((tmp_path / "plain" / "summary.json").read_text())["metrics"]
    assert "profile" not in facts
    assert score.main([*common, *more, "--out", str(tmp_path / "timed"), "--profile"]) == 0
    text = capsys.readouterr().out
    assert text.count("where the time went (33 ") == 1 and text.count("slowest: ") == 1
    facts = json.loads((tmp_path / "timed" / "summary.json").read_text())["metrics"]["profile"]
    rows = facts["stages"]
    assert len(rows) == len(stages) and facts["slowest"] in [row["stage"] for row in rows]
    assert sum(row["wall_seconds"] for row in rows) == pytest.approx(
        facts["wall_seconds"], abs=0.01
    )
    decoding = next(row for row in rows if row["stage"].startswith("decode"))
    assert decoding["worked_seconds"] > 0
    assert all(row["stage"] in text for row in rows)
    plain, timed = (tmp_path / name / "scores.csv" for name in ("plain", "timed"))
    assert plain.read_bytes() == timed.read_bytes()


def test_nothing_more_is_timed_unless_asked(inputs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(StageTimes, "add", lambda *_: pytest.fail("timed"))
    arguments = [str(inputs / "motion-run"), str(inputs / "frames"), "--out", str(tmp_path)]
    assert score.main([*arguments, "--device", "cpu"]) == 0


def test_workers(inputs, tmp_path, capsys) -> None:
    arguments = [str(inputs / "gray-run"), str(inputs / "frames"), "--out", str(tmp_path)]
    arguments += ["--profile", "--device", "cpu"]
    assert score.main([*arguments, "--workers", "3"]) == 0
    assert "decode (3 threads)" in capsys.readouterr().out
    assert score.main([*arguments, "--workers", "0"]) == 2
    assert "workers must be a positive number" in error_of(capsys)
    assert worker_count(None) >= 1
