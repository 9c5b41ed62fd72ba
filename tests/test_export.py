"""Exported files: run where fastalps cannot be imported, and against the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastalps
from fastalps import ALPS, Calibration, MotionGate, Scorer, UserError, ops
from fastalps.cli import export as command
from fastalps.export import export_onnx, export_program
from fastalps.export_networks import FrameGraph
from fastalps.export_plan import Plan
from tests import ROOT
from tests.clips import moving
from tests.commands import error_of
from tests.networks import randomise

EXAMPLES = ROOT / "examples"
GATED = {
    "gate_threshold": 6.0,
    "stride": [7, 9],
    "edge": "cover",
    "frame_reduce": "max",
    "top_k": 3,
}


def calibrated(size: int = 12, channels: int = 1, **fields) -> ALPS:
    model = randomise(ALPS(size, channels, "fast"), 4)
    chosen = {"score": "perturbed", "level": "frame", "settings": GATED, **fields}
    model.calibration = Calibration(
        0.0991, target_false_positive_rate=0.05, samples=200, quantiles=((0.5, 0.09),), **chosen
    )
    return model


def alone(code: str, *arguments: str, blocked: str = "fastalps") -> str:
    """Runs code in a process where some modules cannot be imported; what it prints."""
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked.split())
    proof = "\ntry:\n    import fastalps\nexcept ImportError:\n    pass\nelse:\n    sys.exit(9)\n"
    done = subprocess.run(
        [sys.executable, "-c", block + proof + code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def onnx_tools() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install fastalps[onnx])")


RUN_ONNX = """
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for name in sys.argv[2:]:
    inputs = dict(numpy.load(name + ".npz"))
    numpy.save(name + ".out.npy", session.run(None, inputs)[0])
print(*[value.name for value in session.get_inputs()], session.get_outputs()[0].name)
"""
RUN_PROGRAM = """
import numpy, torch
network = torch.export.load(sys.argv[1]).module()
for name in sys.argv[2:]:
    inputs = [torch.from_numpy(value) for value in numpy.load(name + ".npz").values()]
    numpy.save(name + ".out.npy", network(*inputs).numpy())
"""


def scores_of(file: Path, batches: list[dict[str, torch.Tensor]]) -> tuple[list, str]:
    names = [str(file.with_name(f"batch{i}")) for i in range(len(batches))]
    for name, batch in zip(names, batches, strict=True):
        np.savez(name, **{key: value.numpy() for key, value in batch.items()})
    if file.suffix == ".onnx":
        said = alone(RUN_ONNX, str(file), *names, blocked="fastalps torch")
    else:
        said = alone(RUN_PROGRAM, str(file), *names)
    return [torch.from_numpy(np.load(f"{name}.out.npy")) for name in names], said


def test_onnx_of_images(onnx_tools, tmp_path, rng) -> None:
    import onnx

    model = calibrated(score="average", level="image", settings={}).train()
    path = tmp_path / "images.onnx"
    exported = export_onnx(model, path)
    assert model.training
    assert exported.difference < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["images.onnx"]

    batches = [
        torch.randint(0, 256, (count, 1, 12, 12), generator=rng, dtype=torch.uint8)
        for count in (1, 2, 17, 0)
    ]
    found, names = scores_of(path, [{"images": batch} for batch in batches])
    assert names.split() == ["images", "scores"]
    for batch, scores in zip(batches, found, strict=True):
        torch.testing.assert_close(scores, model.score(batch / 255).average, rtol=1e-5, atol=0)

    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions and [item.domain for item in proto.opset_import] == [""]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts == exported.metadata
    assert (facts["format"], facts["version"]) == ("fastalps-export", "1")
    assert json.loads(facts["image_size"]) == [12, 12] and facts["channels"] == "1"
    assert (facts["score"], float(facts["threshold"])) == ("average", 0.0991)
    assert "5% of 200 held-out normal images" in facts["threshold_means"]
    # Nothing about the machine that wrote it.
    content = path.read_bytes()
    assert b".py" not in content and str(EXAMPLES.parent).encode() not in content


def test_onnx_of_frames_with_the_gate(onnx_tools, tmp_path, rng) -> None:
    model = calibrated()
    path = tmp_path / "frames.onnx"
    exported = export_onnx(model, path, frame_size=(30, 41), gate=True)
    frames = moving(9, rng)
    background = moving(1, rng)[0]
    background[:, :30] = frames[0, :, :30]
    (found,), names = scores_of(path, [{"frames": frames, "background": background}])
    assert names.split() == ["frames", "background", "patch_scores"]
    scorer = Scorer(model, "perturbed", "fp32", stride=(7, 9), gate=MotionGate(6.0, background))
    result = scorer.score_frames(frames)
    assert 0.1 < result.kept.float().mean() < 0.9
    assert torch.equal(found > 0, result.kept)
    torch.testing.assert_close(found, result.patches, rtol=1e-5, atol=0)
    assert exported.metadata["gate_threshold"] == "6.0"
    assert "as they do here" in exported.metadata["threshold_means"]


def test_onnx_of_coloured_float_frames(onnx_tools, tmp_path, rng) -> None:
    model = calibrated(channels=3)
    path = tmp_path / "frames.onnx"
    options = {"stride": 8, "edge": "drop", "score": "normal", "pixels": "float32"}
    exported = export_onnx(model, path, frame_size=(29, 40), **options)
    frames = torch.rand(4, 3, 29, 40, generator=rng)
    (found,), names = scores_of(path, [{"frames": frames}])
    assert names.split() == ["frames", "patch_scores"]
    scorer = Scorer(model, "normal", "fp32", stride=8, edge="drop")
    torch.testing.assert_close(found, scorer.score_frames(frames).patches, rtol=1e-5, atol=0)
    assert "threshold" not in exported.metadata
    assert exported.metadata["threshold_means"] == "none: not calibrated for the normal score"


@pytest.mark.parametrize("whole", [False, True])
def test_programs_need_torch_alone(tmp_path, rng, whole) -> None:
    model = calibrated()
    path = tmp_path / "model.pt2"
    exported = export_program(
        model, path, pixels="uint8" if whole else "float32", frame_size=(30, 41) if whole else None
    )
    assert exported.difference < 1e-5
    if whole:
        batches = [{"frames": moving(count, rng)} for count in (1, 5)]
        scorer = Scorer(model, "perturbed", "fp32", stride=(7, 9))
        expected = [scorer.score_frames(batch["frames"]).patches for batch in batches]
    else:
        batches = [{"images": torch.rand(n, 1, 12, 12, generator=rng)} for n in (1, 6)]
        expected = [model.score(batch["images"]).perturbed for batch in batches]
    found, _ = scores_of(path, batches)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    files = {"fastalps.json": ""}
    program = torch.export.load(path, extra_files=files)
    assert json.loads(files["fastalps.json"]) == exported.metadata
    assert "whereas here all are scored" in exported.metadata["threshold_means"]
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "fastalps" in name]
    content = path.read_bytes()
    assert b".py" not in content and str(EXAMPLES.parent).encode() not in content


@pytest.mark.parametrize("edge", ["cover", "drop"])
@pytest.mark.parametrize("stride", [(12, 12), (5, 7)])
def test_tiling_is_the_ops(rng, edge, stride) -> None:
    model = calibrated(channels=2)
    frames = torch.randint(0, 256, (3, 2, 33, 50), generator=rng, dtype=torch.uint8)
    grid = ops.patch_grid((33, 50), 12, stride, edge)
    graph = FrameGraph(model, "average", torch.uint8, *grid)
    expected = ops.tile_patches(frames, 12, stride, edge=edge, scale=1.0)
    assert torch.equal(graph.tile(frames).float(), expected)


@pytest.mark.parametrize("perturbation", ["none", "noise"])
def test_models_without_an_adversary(rng, perturbation) -> None:
    model = ALPS(9, 1, "fast", perturbation=perturbation).eval()
    score = "average" if perturbation == "none" else "normal"
    plan = Plan(model, None, None, None, score, "uint8", False)
    images = plan.example(4)["images"]
    expected = getattr(model.score(images / 255), score)
    torch.testing.assert_close(plan.graph(images), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "best"}, "score: expected one of"),
        ({"pixels": "int8"}, "pixels must be one of"),
        ({"stride": 4}, "stride is for whole frames"),
        ({"gate": True}, "gate is for whole frames"),
        ({"frame_size": 10}, "patch"),
        ({"frame_size": 20, "edge": "error"}, "do not divide"),
        ({"frame_size": 20, "gate": True, "pixels": "float32"}, "gate works on uint8 frames"),
    ],
)
def test_wrong_arguments(tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        export_program(calibrated(), tmp_path / "model.pt2", **options)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit(tmp_path) -> None:
    path = tmp_path / "model.pt2"
    with pytest.raises(TypeError, match="model must be an ALPS"):
        export_program(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="drawn at random"):
        export_program(ALPS(8, 1, "fast", perturbation="noise"), path)
    with pytest.raises(ValueError, match="calibrated with a motion gate"):
        export_program(ALPS(8, 1, "fast"), path, frame_size=20, gate=True)
    with pytest.raises(ValueError, match="one channel"):
        export_program(calibrated(channels=2), path, frame_size=20, gate=True)
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"the old one")
    truth = Plan.expected
    monkeypatch.setattr(Plan, "expected", lambda self, inputs: truth(self, inputs) * 1.0001)
    with pytest.raises(UserError, match=r"differ from the model's by a relative 0\.0001"):
        export_program(calibrated(), path)
    assert path.read_bytes() == b"the old one" and len(list(tmp_path.iterdir())) == 1


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    fastalps.save(calibrated(), folder / "model.safetensors")
    return folder


def test_command(run, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "frames.pt2"
    options = ["--format", "pt2", "--frame-size", "30x41", "--stride", "10"]
    assert command.main([str(run), *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "frames uint8 (batch, 30, 41); out: patch_scores float32 (batch, 12)" in printed
    assert "score: perturbed; threshold: 0.0991" in printed
    assert "a score is a mean squared error of pixels in [0, 1]" in printed
    assert "checked against the model on random pixels" in printed
    assert out.exists()


def test_unchecked_files_say_so(onnx_tools, run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = tmp_path / "images.onnx"
    assert command.main([str(run / "model.safetensors"), "--out", str(out)]) == 0
    assert "not checked against the model: onnxruntime is not installed" in capsys.readouterr().out
    assert out.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: ["absent", "--out", "a.onnx"], "there is no run absent"),
        (lambda run: [str(run.parent), "--out", "a.onnx"], "holds no model.safetensors"),
        (lambda run: [str(foreign(run)), "--out", "a.onnx"], "not a readable safetensors file"),
        (lambda run: [str(run)], "out"),
        (lambda run: [str(run), "--out", "a.pt2"], "named like the format pt2"),
        (lambda run: [str(run), "--out", "a", "--format", "trt"], "format must be one of onnx"),
        (
            lambda run: [str(run), "--out", "a.pt2", "--format", "pt2", "--score", "x"],
            "score: expected",
        ),
        (lambda run: [str(run), "--out", "a.onnx", "--frame-size", "0x4"], "frame_size must be"),
        (lambda run: [str(run), "--out", "a.onnx", "--frame-size", "tall"], "frame_size must be"),
        (lambda run: [str(run), "--out", "a.onnx", "--stride", "-3"], "stride must be"),
        (
            lambda run: [str(run), "--out", "absent/a.pt2", "--format", "pt2"],
            "cannot write absent/a.pt2: No such file or directory",
        ),
        (
            lambda run: [str(run), "--out", str(run), "--format", "pt2"],
            "it is a folder; give the name of a file",
        ),
        (
            lambda run: [str(run), "--out", "a.pt2", "--format", "pt2", "--frame-size", "9"],
            "patch",
        ),
    ],
)
def test_bad_exports(run, tmp_path, monkeypatch, capsys, make, message) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert command.main(make(run)) == 2
    assert message in error_of(capsys)
    assert not list(work.iterdir())
    assert {path.name for path in run.iterdir()} <= {"model.safetensors", "other.safetensors"}


@pytest.mark.parametrize("size", [["99999999999999999999999x16"], ["20000", "--stride", "1"]])
def test_frames_that_the_memory_cannot_hold(run, tmp_path, monkeypatch, capsys, size) -> None:
    monkeypatch.setattr("fastalps.memory.memory_bytes", lambda: 2**30)
    out = tmp_path / "frames.pt2"
    arguments = [str(run), "--format", "pt2", "--out", str(out), "--frame-size", *size]
    assert command.main(arguments) == 2
    assert "the patches of 3 frames of" in error_of(capsys) and not out.exists()


def foreign(run: Path) -> Path:
    path = run / "other.safetensors"
    path.write_bytes(b"\x80\x04not a model")
    return path


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_missing_extra(run, tmp_path, monkeypatch, capsys, name) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert command.main([str(run), "--out", str(tmp_path / "a.onnx")]) == 2
    if name == "onnxscript":
        pytest.importorskip("onnx", reason="onnx is not installed (pip install fastalps[onnx])")
    assert f"needs the package {name}, which is not installed" in error_of(capsys)
    assert not (tmp_path / "a.onnx").exists()


def test_help_teaches() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastalps.cli.export", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--frame-size 240x360" in done.stdout and not done.stderr


# The examples -----------------------------------------------------------------------------------


@pytest.fixture
def frames_file(onnx_tools, tmp_path, rng) -> tuple[Path, torch.Tensor, list[tuple[float, bool]]]:
    """A file, frames, and their scores and flags by the model."""
    model = calibrated()
    path = tmp_path / "frames.onnx"
    export_onnx(model, path, frame_size=(30, 41))
    frames = moving(70, rng)
    scores = Scorer(model, "perturbed", "fp32", stride=(7, 9)).score_frames(frames).frames
    assert model.calibration is not None
    return path, frames, [(float(s), bool(s > model.calibration.threshold)) for s in scores]


def check_lines(lines: list[str], expected: list[tuple[float, bool]]) -> None:
    for i, (line, (score, flagged)) in enumerate(zip(lines, expected, strict=True)):
        item, found, flag = line.split(",")
        assert int(item) == i
        assert float(found) == pytest.approx(score, rel=1e-5)
        assert int(flag) == flagged


def test_examples(frames_file, tmp_path) -> None:
    path, frames, expected = frames_file
    np.save(tmp_path / "frames.npy", frames.numpy())
    code = f"import runpy\nrunpy.run_path({str(EXAMPLES / 'score_onnx.py')!r})"
    arguments = (str(path), str(tmp_path / "frames.npy"))
    printed = alone(code, *arguments, blocked="fastalps torch").splitlines()
    assert printed[0] == "item,score,flagged"
    check_lines(printed[1:], expected)

    program = compiled_example(tmp_path)
    frames.numpy().tofile(tmp_path / "frames.raw")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path / "lib")}

    def call(*arguments: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, env=environment, check=False
        )

    done = call(path, tmp_path / "frames.raw")
    assert done.returncode == 0, done.stderr
    check_lines(done.stdout.splitlines(), expected)
    for wrong in ((tmp_path / "absent.onnx", tmp_path / "frames.raw"), (path, tmp_path / "absent")):
        done = call(*wrong)
        assert done.returncode == 2 and done.stderr and not done.stdout


def compiled_example(folder: Path) -> Path:
    """The C++ example, linked with the library inside the Python package of ONNX Runtime."""
    import onnxruntime

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    probe = subprocess.run(
        [compiler, "-E", "-x", "c++", "-"],
        input="#include <onnxruntime_cxx_api.h>",
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip("the C++ headers of ONNX Runtime were not found (name their folder in CPATH)")
    libraries = list((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("the onnxruntime package holds no libonnxruntime.so here")
    (folder / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "lib" / name).symlink_to(libraries[0])
    program = folder / "score_onnx"
    options = ["-std=c++17", "-Wall", "-L", folder / "lib", "-o", program]
    subprocess.run([compiler, EXAMPLES / "score_onnx.cpp", *options, "-lonnxruntime"], check=True)
    return program
