"""Drift: how often it is reported without cause, when it is found, and how it is told."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import fastalps
from fastalps import Calibration, DriftMonitor
from fastalps.calibration import QUANTILES, correlation_length, order_statistic, quantiles_of
from fastalps.cli import score
from fastalps.drift import WATCHED, _beta_binomial_tail
from tests.images import save


def calibrated(scores: torch.Tensor, level: str = "frame") -> Calibration:
    return Calibration(
        threshold=float(scores.max()),
        score="average",
        level=level,
        target_false_positive_rate=0.01,
        samples=len(scores),
        quantiles=quantiles_of(scores),
        correlation=correlation_length(scores),
    )


def autoregressive(count: int, memory: float, rng: torch.Generator) -> torch.Tensor:
    """Scores that forget: x[t] = memory * x[t - 1] + noise, made positive."""
    from scipy.signal import lfilter

    noise = torch.randn(count + 500, generator=rng, dtype=torch.float64)
    return torch.from_numpy(lfilter([1], [1, -memory], noise.numpy())[500:].copy()).exp()


def test_quantiles_are_scores(rng) -> None:
    scores = torch.rand(137, generator=rng)
    pairs = quantiles_of(scores)
    assert [probability for probability, _ in pairs] == list(QUANTILES)
    for probability, value in pairs:
        assert value in scores
        assert value == pytest.approx(
            float(np.quantile(scores.numpy(), probability, method="inverted_cdf"))
        )
    assert order_statistic(100, 0.07) == 7
    assert order_statistic(3, 0.01) == 1


def test_tail_is_scipys() -> None:
    for least, size, a, b in ((3, 10, 2.5, 4.0), (0, 5, 1.0, 1.0), (64, 64, 76, 75), (1, 0, 2, 2)):
        expected = stats.betabinom.sf(least - 1, size, a, b) if size else float(least <= 0)
        assert _beta_binomial_tail(least, size, a, b) == pytest.approx(expected, rel=1e-9)


def test_correlation_of_independent_and_of_slow_scores() -> None:
    generator = torch.Generator().manual_seed(3)
    found = [correlation_length(torch.rand(500, generator=generator)) for _ in range(20)]
    assert min(found) >= 1 and sum(found) / 20 < 1.5
    slow = [correlation_length(autoregressive(2000, 0.9, generator)) for _ in range(20)]
    # (1 + memory) / (1 - memory) of the values themselves; ranks come close.
    assert 12 < sum(slow) / 20 < 26
    for constant in (torch.zeros(100), torch.zeros(0), torch.ones(1)):
        assert correlation_length(constant) == 1
    # Ties are no trend.
    gated = torch.zeros(400)
    gated[torch.randperm(400, generator=generator)[:40]] = torch.rand(40, generator=generator)
    assert correlation_length(gated) < 3


@pytest.mark.parametrize(("memory", "normals"), [(0.0, 60), (0.0, 1000), (0.9, 1000)])
def test_false_alarms_are_as_rare_as_stated(memory, normals) -> None:
    """At a rate of 2% of the windows; binomial noise of the count itself is allowed for."""
    generator = torch.Generator().manual_seed(7)
    windows = drifted = 0
    for _ in range(60):
        monitor = DriftMonitor(
            calibrated(autoregressive(normals, memory, generator)), false_alarm_rate=0.02
        )
        monitor.update(autoregressive(10 * monitor.window, memory, generator))
        windows += monitor.windows
        drifted += monitor.drifted
    assert windows == 600
    # 12 expected; more than 24 would come about once in a thousand tests.
    assert drifted <= 24


def test_ties_raise_no_alarm() -> None:
    """Gated frames score 0: most scores are equal to a quantile."""
    generator = torch.Generator().manual_seed(8)

    def gated(count: int) -> torch.Tensor:
        scores = torch.rand(count, generator=generator)
        return scores.where(torch.rand(count, generator=generator) > 0.95, 0.0)

    monitor = DriftMonitor(calibrated(gated(400)), window=100)
    assert monitor.update(gated(5000)) is None
    assert monitor.windows == 50


@pytest.mark.parametrize(
    ("change", "above", "probabilities"),
    [
        (lambda x: x + 0.4, True, (0.1, 0.5, 0.9)),
        (lambda x: 0.4 * x, False, (0.1, 0.5, 0.9)),
        (lambda x: 0.5 + 3 * (x - 0.5), None, (0.1, 0.9)),
    ],
)
def test_shift_and_spread_are_found(change, above, probabilities) -> None:
    generator = torch.Generator().manual_seed(9)
    monitor = DriftMonitor(calibrated(torch.rand(300, generator=generator)))
    assert monitor.update(torch.rand(10 * monitor.window, generator=generator)) is None
    start = monitor.seen
    drift = monitor.update(change(torch.rand(monitor.window, generator=generator)))
    assert drift is not None and monitor.drifted == 1
    assert (drift.first, drift.last) == (start, start + monitor.window)
    assert above in (None, drift.above)
    assert drift.probability in probabilities and drift.p_value < 1e-3


def test_a_few_anomalies_are_no_drift() -> None:
    generator = torch.Generator().manual_seed(10)
    monitor = DriftMonitor(calibrated(torch.rand(300, generator=generator)))
    scores = torch.rand(20 * monitor.window, generator=generator)
    scores[::20] = 5.0
    assert monitor.update(scores) is None


def test_pieces_do_not_matter(rng) -> None:
    calibration = calibrated(torch.rand(200, generator=rng))
    scores = torch.rand(1000, generator=rng) * torch.linspace(1, 2, 1000)
    whole, pieces = (DriftMonitor(calibration, window=128) for _ in range(2))
    first = whole.update(scores)
    found = [drift for part in scores.split(37) if (drift := pieces.update(part.numpy()))]
    assert found[0] == first
    assert (whole.windows, whole.drifted) == (7, pieces.drifted) == (pieces.windows, len(found))
    assert whole.finish() == pieces.finish()
    assert whole.windows == 8


def test_short_streams(rng) -> None:
    calibration = calibrated(torch.rand(200, generator=rng))
    monitor = DriftMonitor(calibration)
    assert 1 < monitor.smallest < monitor.window
    monitor.update(torch.full((monitor.smallest - 1,), 9.0))
    assert monitor.finish() is None and monitor.windows == 0
    assert f"at least {monitor.smallest} are needed" in monitor.summary()
    monitor = DriftMonitor(calibration)
    assert monitor.update(torch.full((monitor.smallest,), 9.0)) is None
    drift = monitor.finish()
    assert drift is not None and drift.share == 1 and drift.last == monitor.smallest
    assert "1 of 1 windows" in monitor.summary()
    assert monitor.finish() is None


def test_one_line_says_what_and_what_to_do(rng) -> None:
    monitor = DriftMonitor(calibrated(torch.rand(300, generator=rng), "image"), window=100)
    text = str(monitor.update([2.0] * 100))
    assert text.startswith("drift: 100% of images 1 to 100 score above ")
    assert "held-out normal images" in text and "calibrate on recent normal data" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be a number of scores"),
        ({"window": True}, "window must be a number of scores"),
        ({"false_alarm_rate": 1.0}, "false_alarm_rate must be between 0 and 1"),
    ],
)
def test_wrong_arguments(rng, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        DriftMonitor(calibrated(torch.rand(50, generator=rng)), **arguments)


def test_wrong_scores_and_calibrations(rng) -> None:
    calibration = calibrated(torch.rand(50, generator=rng))
    monitor = DriftMonitor(calibration)
    with pytest.raises(ValueError, match=r"scores must be \(n,\)"):
        monitor.update(torch.rand(3, 2))
    with pytest.raises(ValueError, match="scores must be finite"):
        monitor.update([0.1, math.nan])
    assert monitor.seen == 0
    with pytest.raises(ValueError, match="must hold the quantiles"):
        DriftMonitor(replace(calibration, quantiles=()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantiles": [(0.5, 1.0), (0.1, 2.0)]}, "quantiles: expected pairs"),
        ({"quantiles": [(0.1, 2.0), (0.5, 1.0)]}, "quantiles: expected pairs"),
        ({"quantiles": [(0.0, 2.0)]}, "quantiles: expected pairs"),
        ({"quantiles": [(0.5, math.nan)]}, "quantiles: expected pairs"),
        ({"correlation": 0.5}, "correlation: expected at least 1"),
    ],
)
def test_wrong_quantiles(rng, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(calibrated(torch.rand(50, generator=rng)), **fields)


def test_quantiles_are_stored_with_the_model(tmp_path, rng) -> None:
    model = fastalps.ALPS(8, 1, "fast", latent=4)
    images = torch.randint(0, 256, (80, 1, 8, 8), generator=rng, dtype=torch.uint8)
    scorer = fastalps.Scorer(model, precision="fp32")
    calibration = scorer.calibrate(images, 0.05)
    scores = scorer.score_images(images)
    assert dict(calibration.quantiles)[0.5] == scores.sort().values[39]
    assert set(WATCHED) < set(dict(calibration.quantiles))
    assert calibration.correlation >= 1
    fastalps.save(model, tmp_path / "model.safetensors", calibration)
    stored = fastalps.load(tmp_path / "model.safetensors").calibration
    assert stored == calibration
    text = stored.explain()
    assert "0 is a perfect reconstruction" in text and "5% of 80 held-out normal images" in text
    assert "half of them score at most" in text and "\n" not in text


def test_command_warns_in_one_line(tmp_path, rng, caplog, capsys) -> None:
    model = fastalps.ALPS(8, 1, "fast", latent=4).eval()
    scorer = fastalps.Scorer(model, precision="fp32")
    normal = torch.randint(96, 160, (300, 1, 8, 8), generator=rng, dtype=torch.uint8)
    calibration = scorer.calibrate(normal[:200], 0.05)
    fastalps.save(model, tmp_path / "model.safetensors", calibration)
    inputs = {"same": normal[200:], "other": normal[200:].float().sub(128).mul(3.9).add(128).byte()}
    for name, images in inputs.items():
        for i, image in enumerate(images):
            save(tmp_path / name / f"{i:03}.png", image[0].numpy())
        out = tmp_path / f"scored-{name}"
        options = ["--out", str(out), "--precision", "fp32", "--device", "cpu"]
        caplog.clear()
        assert (
            score.main([str(tmp_path / "model.safetensors"), str(tmp_path / name), *options]) == 0
        )
        summary = json.loads((out / "summary.json").read_text())["metrics"]["drift"]
        lines = [record.getMessage() for record in caplog.records]
        printed = capsys.readouterr().out
        if name == "same":
            assert lines == [] and summary["drifted"] == 0 and summary["first"] is None
        else:
            assert len(lines) == 1 and lines[0] == summary["first"]
            assert lines[0].startswith("drift: 100% of images 1 to ")
        assert f"drift: in {summary['drifted']} of {summary['windows']} windows" in printed
