"""Random numbers of several threads: each draws what it would alone, and nothing stays changed."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastalps import ALPS, quantization
from fastalps.seeds import seeded
from fastalps.training.validation import score_all


def drawn(seed: int) -> torch.Tensor:
    with seeded(seed):
        return torch.rand(3)


def scores_of(seed: int) -> torch.Tensor:
    with seeded(7):
        model = ALPS(8, preset="fast", perturbation="noise").eval()
    return score_all(model, torch.full((2, 1, 8, 8), seed / 10)).perturbed


def agreement_of(seed: int) -> torch.Tensor:
    class Drawing:
        def errors(self, images, passes):
            return torch.rand(2, 3) * images

    return quantization._scores(Drawing(), torch.full((2, 3), 1 + seed))


@pytest.mark.parametrize("draw", [drawn, scores_of, agreement_of])
def test_threads_draw_as_one_does(draw, monkeypatch) -> None:
    expected = [draw(seed) for seed in range(2)]
    state = torch.get_rng_state()
    together = threading.Barrier(2)

    def meet() -> None:
        # Both threads are here at once, unless one waits for the other to end.
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.5)

    def meeting(real):
        def slow(*arguments, **options):
            meet()
            values = real(*arguments, **options)
            meet()
            return values

        return slow

    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, meeting(getattr(torch, name)))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(draw, range(2)))
    assert torch.equal(torch.get_rng_state(), state)
    for mine, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, alone, rtol=0, atol=0)


def test_seeds_nest() -> None:
    state = torch.get_rng_state()
    with seeded(1):
        first = torch.rand(2)
        with seeded(1):
            assert torch.equal(torch.rand(2), first)
        assert not torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_leaves_the_generator_as_it_was() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        torch.rand(int(1 / 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(1).shape == (3,)
