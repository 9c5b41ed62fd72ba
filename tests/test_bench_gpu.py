"""The benchmark's cases of CUDA devices, without one: prepared and run on the CPU, or listed."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cases, harness, peers, run
from bench.cases import gpu_runs, gpu_scoring, scoring
from bench.frames import load_test_set, synthetic_frames
from bench.harness import Candidate, Case, Settings, Work, run_case


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Smoke settings on the CPU, of a machine that says it multiplies bf16."""
    monkeypatch.setattr(gpu_scoring, "has_fast_bfloat16", lambda device: True)
    # Equal ones, so that networks are trained once.
    return Settings("smoke", "cpu", 2, Path("no-such-folder"))


@pytest.mark.parametrize(
    "name", ["ped2-on-device", "ped2-gated-on-device", "ped2-from-host", "one-frame-on-device"]
)
def test_every_case_is_right_on_a_cpu(name: str, settings: Settings) -> None:
    (case,) = (c for c in gpu_scoring.every_case(settings) if c.name.endswith(f"/{name}"))
    result = run_case(case, settings)
    assert result["ok"], result
    rows = result["candidates"]
    ours = next(iter(rows.values()))
    assert ours["ratio"]["median"] == 1 and next(iter(rows)).startswith("fastalps bf16")
    for row, found in rows.items():
        assert "failed" not in found, (row, found)
        assert ("absent" in found) == (row.startswith("compile") or row.endswith("captured")), row
    frames = 1 if name.startswith("one") else 3
    assert result["amounts"]["patches"] == 96 * frames
    assert (result["amounts"]["scored_patches"] < 96 * frames) == ("gated" in name)
    json.dumps(result)


def test_a_score_too_many_or_missing_is_wrong(settings: Settings) -> None:
    case = gpu_scoring._prepare_on_device("fast", True)
    work = case(settings)
    (frames,) = work.arguments[0]
    right = work.candidates[0].run(frames)
    assert work.error("", right) < 1e-2
    lowest, highest = right.clone(), right.clone()
    lowest[0, -1, right[0, -1].nonzero()[0]] = 0
    highest[1, -1, (right[1, -1] == 0).nonzero()[0]] = 1
    nan = right.clone()
    nan[0, 0, 0] = math.nan
    for wrong in (lowest, highest, nan, right[:, :2], right[:1]):
        assert work.error("", wrong) == math.inf


def test_quick_compares_every_tenth_frame(settings: Settings, monkeypatch) -> None:
    monkeypatch.setattr(gpu_scoring, "_count", lambda settings: 12)
    monkeypatch.setattr(gpu_scoring, "BATCH", 5)
    quick = Settings("quick", "cpu", 2, settings.data)
    work = gpu_scoring._prepare_on_device("fast", False)(quick)
    assert work.details["checked_frames"] == 2 and work.details["peers_batch"] == 480
    result = work.candidates[0].run(*work.arguments[0])
    assert work.error("", result) < 1e-2
    result[0, 10, 5] *= 1.1
    assert work.error("", result) > 5e-2


class _Sums:
    """A network whose errors tell what it was given, and which sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, patches: Tensor) -> Tensor:
        self.sizes.append(len(patches))
        sums = patches.flatten(1).sum(1)
        return torch.stack([sums, 2 * sums])


@pytest.mark.parametrize("most", [1, 7, 96, 1000])
def test_peers_see_one_size_and_the_right_patches(most: int) -> None:
    frames = synthetic_frames(3, torch.Generator().manual_seed(0))
    background = synthetic_frames(1, torch.Generator().manual_seed(1))[0]
    background[:120] = frames[0, :120]
    patches = scoring.tile_permute(frames)
    sums = patches.flatten(2).sum(2)
    whole, gated = _Sums(), _Sums()
    found = gpu_runs.peer_run(whole, most)(frames)
    torch.testing.assert_close(found, torch.stack([sums, 2 * sums]))
    kept = torch.zeros(3, 96, dtype=torch.bool)
    index = scoring.eager_active(frames, background)[1]
    kept[index[:, 0], index[:, 1]] = True
    assert 0 < kept.sum() < kept.numel()
    found = gpu_runs.peer_run(gated, most, background)(frames)
    torch.testing.assert_close(found, torch.stack([sums, 2 * sums]) * kept)
    for network, count in ((whole, 288), (gated, int(kept.sum()))):
        assert len(set(network.sizes)) == 1 and network.sizes[0] <= most
        assert 0 <= sum(network.sizes) - count < len(network.sizes)
    # Nothing moves.
    still = gpu_runs.peer_run(_Sums(), most, frames[0])(frames[:1])
    assert still.shape == (2, 1, 96) and not still.any()


def test_ped2s_batches_are_even() -> None:
    assert 2010 % gpu_scoring.BATCH == 0


class _FakeCuda:
    """torch.cuda's capture, enough of it to follow who does what in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        log = self.log

        class Stream:
            def wait_stream(self, other) -> None:
                log.append("wait")

        class Graph:
            def replay(self) -> None:
                log.append("replay")

        here = Stream()
        for name, value in {
            "Stream": Stream,
            "current_stream": lambda: here,
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": Graph,
            "graph": self.capture,
            "synchronize": lambda: log.append("synchronize"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def capture(self, graph):
        self.log.append("begin")
        yield
        self.log.append("end")


def test_captured_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _FakeCuda(monkeypatch)

    class Engine:
        output = torch.zeros(2, 1, 96)

        def frame_errors(self, frames: Tensor, cut, passes):
            assert cut == ((30, 30), (30, 30), "cover") and passes == "both"
            cuda.log.append("call")
            self.frames = frames
            return self.output, None

    engine = Engine()
    frame = torch.zeros(1, 240, 360, dtype=torch.uint8)
    captured = gpu_runs.captured_run(engine, frame)
    assert cuda.log == ["wait", "call", "call", "call", "wait", "begin", "call", "end"]
    candidate = gpu_runs.waited(Candidate("captured", captured), Settings(device="cuda"))
    result = candidate.run(frame + 7)
    assert cuda.log[8:] == ["replay", "synchronize"]
    assert engine.frames.eq(7).all() and not frame.any()
    assert torch.equal(result, engine.output) and result is not engine.output


def test_extra_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1500)
    frames = torch.zeros(1)
    assert gpu_runs.extra_memory(lambda frames: frames, frames, Settings(device="cuda")) == 500


def test_compile_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile(network, **options):
        asked.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile)
    model = scoring.fastalps.ALPS(30, preset="fast")
    patches = torch.rand(2, 1, 30, 30)
    for mode in (None, "max-autotune"):
        network = peers.compiled(model, "cpu", torch.float32, mode)
        assert network(patches).shape == (2, 2)
    assert [options["mode"] for options in asked] == [None, "max-autotune"]


def test_test_set(tmp_path: Path) -> None:
    source, frames = load_test_set(Settings(data=tmp_path / "none"), 140)
    assert "random textured" in source and "134 frames over and over" in source
    assert frames.shape == (140, 240, 360) and torch.equal(frames[134:], frames[:6])
    from PIL import Image

    for clip, count in (("Test001", 2), ("Test002", 3), ("Test002_gt", 1)):
        (tmp_path / "Test" / clip).mkdir(parents=True)
        for number in range(1, count + 1):
            gray = Image.new("L", (360, 240), 50 * int(clip[6]) + number)
            gray.save(tmp_path / "Test" / clip / f"{number:03}.png")
    source, frames = load_test_set(Settings(data=tmp_path), 6)
    assert source == "UCSD Ped2, 2 test clips; 5 frames over and over"
    assert frames[:, 0, 0].tolist() == [51, 52, 101, 102, 103, 51]
    source, frames = load_test_set(Settings(data=tmp_path), 2)
    assert source == "UCSD Ped2, 1 test clips" and len(frames) == 2


@pytest.mark.parametrize("effort", ["smoke", "quick", "full"])
def test_lists_the_cases_of_cuda(effort: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    option = [] if effort == "full" else [f"--{effort}"]
    assert run.main(["--device", "cuda", "--list", *option]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == set(cases.GROUPS)
    found = {name for name in names if name.startswith("scoring/")}
    assert "scoring/fast/ped2-on-device" in found
    assert ("scoring/paper/ped2-on-device" in found) == (effort == "full")
    assert ("scoring/network-b/ped2-gated-on-device" in found) == (effort != "smoke")
    assert not any(name.endswith(("/all", "-patches")) for name in found)


@pytest.fixture
def tf32():
    """Allowed before, and as it was after."""
    modules = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = True
    yield
    for module, value in zip(modules, before, strict=True):
        module.allow_tf32 = value


@pytest.mark.usefixtures("kept_threads")
def test_tf32_is_off_on_cuda_and_recorded(tmp_path: Path, capsys, monkeypatch, tf32) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(run, "result_record", lambda protocol, metrics, **rest: rest)
    seen = []

    def prepare(settings: Settings) -> Work:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(cases, "load", lambda *_: [Case("ops/a", "a", prepare)])
    out = tmp_path / "out.json"
    assert run.main(["--device", "cuda", "--smoke", "--fresh-memory", "--out", str(out)]) == 1
    assert seen == [(False, False)]
    output = capsys.readouterr()
    assert "a GPU; TF32 is off" in output.out
    assert "FAILED: RuntimeError: no such kernel" in output.out and "failed: ops/a" in output.err
    assert json.loads(out.read_text())["tf32"] is False


@pytest.mark.usefixtures("kept_threads")
def test_a_stopped_run_leaves_the_cases_that_it_had(tmp_path: Path, monkeypatch) -> None:
    def stop(settings: Settings) -> Work:
        raise KeyboardInterrupt

    work = Work([Candidate("fastalps", lambda: torch.ones(1), None)], lambda *_: 0.0)
    found = [Case("ops/a", "a", lambda settings: work), Case("ops/b", "b", stop)]
    monkeypatch.setattr(cases, "load", lambda *_: found)
    out = tmp_path / "out.json"
    assert run.main(["--smoke", "--fresh-memory", "--out", str(out)]) == 130
    record = json.loads(out.read_text())
    assert list(record["metrics"]) == ["ops/a"] and record["tf32"] is None


def test_input_sets_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latency case asks for them by the bytes of a frame."""

    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert harness.input_sets(Settings(device="cuda"), 240 * 360) == 64
