"""Ranking metrics against their definitions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalps import metrics
from fastalps.environment import cpu_features, describe, result_record
from fastalps.files import write_json


def random_ranking(rng: torch.Generator, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    count = int(torch.randint(20, 200, (), generator=rng))
    scores = torch.randn(count, generator=rng)
    if ties:
        scores = (scores * 2).round()
    labels = torch.rand(count, generator=rng) < 0.3
    labels[0], labels[1] = True, False
    return scores + labels, labels


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_share_of_ordered_pairs(rng: torch.Generator, ties: bool) -> None:
    scores, labels = random_ranking(rng, ties)
    difference = scores[labels][:, None] - scores[~labels][None, :]
    expected = ((difference > 0).double() + (difference == 0).double() / 2).mean()
    assert metrics.auroc(scores, labels) == pytest.approx(float(expected), abs=1e-12)
    assert metrics.auroc(-scores, labels) == pytest.approx(1 - float(expected), abs=1e-12)


def test_aupr_is_the_mean_precision_at_each_positive(rng: torch.Generator) -> None:
    scores, labels = random_ranking(rng, ties=False)
    ranked = labels[scores.argsort(descending=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    expected = float((precision * ranked).sum() / ranked.sum())
    assert metrics.aupr(scores, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_eer_is_where_the_curve_crosses_the_diagonal(rng: torch.Generator, ties: bool) -> None:
    scores, labels = random_ranking(rng, ties)
    curve = metrics.roc(scores, labels)
    error = metrics.eer(scores, labels)
    # Walking the polyline finely finds the same crossing.
    position = np.linspace(0, len(curve.false_positive_rate) - 1, 200_001)
    index = np.arange(len(curve.false_positive_rate))
    false_positive = np.interp(position, index, curve.false_positive_rate)
    true_positive = np.interp(position, index, curve.true_positive_rate)
    nearest = np.argmin(np.abs(false_positive - (1 - true_positive)))
    assert error == pytest.approx(false_positive[nearest], abs=1e-3)


def test_eer_by_hand() -> None:
    # ROC points (0, 0), (0, 1/2), (1/2, 1/2), (1/2, 1), (1, 1): it meets fpr = 1 - tpr at 1/2.
    assert metrics.eer([1, 2, 3, 4], [0, 1, 0, 1]) == pytest.approx(0.5)
    assert metrics.eer([1, 2, 3, 4], [0, 0, 1, 1]) == 0.0
    assert metrics.eer([4, 3, 2, 1], [0, 0, 1, 1]) == 1.0
    # All tied: the straight line from (0, 0) to (1, 1).
    assert metrics.eer([7, 7, 7], [0, 1, 1]) == pytest.approx(0.5)
    # Between two points: (0, 0) to (1/2, 1) crosses at fpr 1/3.
    assert metrics.eer([1, 2, 2], [0, 0, 1]) == pytest.approx(1 / 3)


def test_roc_keeps_every_threshold() -> None:
    curve = metrics.roc(np.arange(100), np.arange(100) >= 50)
    assert len(curve.thresholds) == 101
    assert curve.false_positive_rate[-1] == curve.true_positive_rate[-1] == 1.0


@pytest.mark.parametrize("metric", [metrics.roc, metrics.auroc, metrics.aupr, metrics.eer])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "both classes, but all 2 labels are anomalous"),
        ([1.0, 2.0], [0, 0], "both classes, but all 2 labels are normal"),
        ([], [], "must not be empty"),
        ([1.0, 2.0, 3.0], [0, 1], r"shape \(2,\) for 3 scores"),
        ([1.0, float("nan"), float("inf")], [0, 1, 1], "2 NaN or infinite of 3, the first nan at"),
        ([[1.0, 2.0]], [[0, 1]], r"one-dimensional \(N,\), got shape \(1, 2\)"),
        ([1.0, 2.0], [0, 2], "only 0 .* and 1"),
        (["a", "b"], [0, 1], "must be numbers"),
    ],
)
def test_bad_rankings_are_refused(metric, scores, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_any_number_dtype(dtype: torch.dtype) -> None:
    scores = torch.tensor([1, 3, 2, 4]).to(dtype)
    assert metrics.auroc(scores, torch.tensor([0, 0, 1, 1])) == 0.75


def test_minmax(rng: torch.Generator) -> None:
    scores = torch.randn(50, generator=rng) * 9 - 4
    scaled = metrics.minmax(scores)
    assert scaled.min() == 0
    assert scaled.max() == 1
    expected = (scores - scores.min()) / (scores.max() - scores.min())
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    assert (metrics.minmax([3.0, 3.0]) == 0).all()
    assert list(metrics.minmax([-1.5e308, 1.5e308])) == [0.0, 1.0]
    with pytest.raises(ValueError, match="finite"):
        metrics.minmax([1.0, float("-inf")])


def test_heavy_libraries_load_at_first_use_only() -> None:
    code = (
        "import sys, fastalps, fastalps.metrics, fastalps.protocols, fastalps.gate\n"
        "import fastalps.environment\n"
        "heavy = {'sklearn', 'scipy', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert fastalps.metrics.auroc([1, 2], [0, 1]) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_result_record_is_json(tmp_path) -> None:
    record = result_record("strict", {"auroc": 0.5}, seed=3, data="digits")
    write_json(tmp_path / "result.json", record)
    assert list(record)[:5] == ["protocol", "seed", "date", "commit", "environment"]
    assert record["data"] == "digits"
    assert record["metrics"] == {"auroc": 0.5}
    assert record["environment"]["libraries"]["torch"] == torch.__version__


def test_environment_agrees_with_torch() -> None:
    assert describe()["threads"]["intra_op"] == torch.get_num_threads()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert cpu_features()["avx2"]


def test_environment_survives_without_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def without_proc(path: Path, *arguments, **options) -> str:
        if path == Path("/proc/cpuinfo"):
            raise OSError("not on this system")
        return read_text(path, *arguments, **options)

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(Path, "read_text", without_proc)
    record = result_record("strict", {}, seed=None)
    assert record["commit"] is None
    assert set(record["environment"]["cpu"]) >= {"model", "features"}
