"""Stacked training: every model of a stack ends where it would have ended alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fastalps
from fastalps import TrainConfig, Trainer
from fastalps.calibration import calibrate
from fastalps.data import OneClassData
from fastalps.models import ALPS
from fastalps.training import batches, fit_stacked, stacked, trainer, validation
from fastalps.training.grouped import stack, unstack
from fastalps.training.run import CHECKPOINT
from fastalps.training.steps import Steps
from tests.conftest import needs_cuda
from tests.tasks import stripes, task_of, weights, without_speed

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainConfig(
    epochs=4,
    batch_size=16,
    distorter_every=2,
    device="cpu",
    schedule="cosine",
    average_decay=0.9,
)
WIDTHS = {"latent": 4, "encoder": (6, 8, 10), "decoder": (12, 10, 8, 8, 6, 6)}
# Of different lengths: 3, 6 and 5 batches an epoch.
COUNTS, SEEDS = (60, 100, 85), (3, 8, 5)


@pytest.fixture
def tasks(rng) -> list[OneClassData]:
    """Three one-class tasks of 8 x 8 pixels, with different numbers of training images."""
    found = []
    for number, count in enumerate(COUNTS):
        normal = stripes(count + 40, bool(number % 2), rng) // (number + 1)
        odd = stripes(20, not number % 2, rng)
        found.append(task_of(f"stripes[{number}]", normal, odd))
    return found


@pytest.fixture
def in_float64(monkeypatch) -> None:
    """Batches, and models, in double precision: what differs in more than rounding then shows."""

    def unit_pixels(images):
        return images.double() / (255 if images.dtype == torch.uint8 else 1)

    monkeypatch.setattr(trainer, "check_model", lambda *_: None)
    monkeypatch.setattr(batches, "unit_pixels", unit_pixels)
    monkeypatch.setattr(validation, "unit_pixels", unit_pixels)


def make_models(size=8, channels: int = 1, **options) -> list[ALPS]:
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(ALPS(size, channels, **{**WIDTHS, **options}))
    return found


def make_trainers(folder=None, **options) -> list[Trainer]:
    config = dataclasses.replace(OPTIONS, **options)
    return [
        Trainer(
            dataclasses.replace(config, seed=seed),
            None if folder is None else folder / str(number),
            progress=False,
        )
        for number, seed in enumerate(SEEDS)
    ]


def compare(together, alone, tolerance: float = 1e-8) -> None:
    for one, other in zip(together, alone, strict=True):
        assert (one.best_epoch, one.score) == (other.best_epoch, other.score)
        for name, value in other.last_weights.items():
            torch.testing.assert_close(
                one.last_weights[name], value, rtol=0, atol=tolerance, msg=name
            )
        for name, value in other.model.state_dict().items():
            mine = one.model.state_dict()[name]
            torch.testing.assert_close(mine, value, rtol=0, atol=tolerance, msg=name)
        for mine, row in zip(without_speed(one.history), without_speed(other.history), strict=True):
            assert mine == pytest.approx(row, rel=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("perturbation", ["adversarial", "noise", "none"])
def test_a_stack_ends_where_each_would_alone(tasks, in_float64, perturbation, batch_norm) -> None:
    def models():
        built = make_models(perturbation=perturbation, batch_norm=batch_norm)
        return [model.double() for model in built]

    trainers = make_trainers()
    alone = [t.fit(m, task) for t, m, task in zip(trainers, models(), tasks, strict=True)]
    mine = models()
    together = fit_stacked(trainers, mine, tasks)
    assert [result.model for result in together] == mine
    compare(together, alone)
    for one, other, task in zip(together, alone, tasks, strict=True):
        scores = (validation.score_all(r.model, task.test) for r in (one, other))
        for a, b in zip(*scores, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("training", "model"),
    [
        ({"distorter_every": 1, "energy_penalty": 0.1}, {"bound": "tanh"}),
        ({"distorter_learning_rate": 3e-3, "average_decay": 0.0}, {"bound": "norm"}),
        ({"channels_last": False, "schedule": "constant"}, {"strength": 0.5}),
        ({"select": "last", "validate_every": 3}, {"size": (9, 11), "channels": 2}),
    ],
)
def test_options(tasks, in_float64, training, model) -> None:
    size, channels = model.get("size", (8, 8)), model.get("channels", 1)
    tasks = [
        dataclasses.replace(task, train=cut(task.train, size, channels))
        if (size, channels) == ((8, 8), 1)
        else cut(task.train, size, channels)
        for task in tasks
    ]
    trainers = make_trainers(**training)
    alone = [
        t.fit(m.double(), task)
        for t, m, task in zip(trainers, make_models(**model), tasks, strict=True)
    ]
    together = fit_stacked(trainers, [m.double() for m in make_models(**model)], tasks)
    compare(together, alone)


def test_models_stop_at_their_own_time(tasks, in_float64, monkeypatch) -> None:
    best = {float(task.validation.double().mean()): epoch for epoch, task in enumerate(tasks, 1)}
    measured: dict[tuple[int, float], int] = {}

    def measure(self, model):
        """Errors that are smallest in epoch 1, 2 or 3, by the task."""
        task = float(self.images.double().mean())
        epoch = measured[id(self), task] = measured.get((id(self), task), 0) + 1
        return {"validation_average": abs(epoch - best[task])}

    monkeypatch.setattr(validation.Validator, "measure", measure)
    trainers = make_trainers(patience=1, protocol="strict", epochs=8)
    models = [[model.double() for model in make_models()] for _ in range(2)]
    alone = [t.fit(m, d) for t, m, d in zip(trainers, models[0], tasks, strict=True)]
    measured.clear()
    together = fit_stacked(trainers, models[1], tasks)
    # Whoever has stopped stays as it is while the others go on.
    assert [len(result.history) for result in together] == [2, 3, 4]
    compare(together, alone)


def cut(images: torch.Tensor, size, channels: int) -> torch.Tensor:
    wide = torch.nn.functional.pad(images, (0, size[1] - 8, 0, size[0] - 8), value=90)
    return wide.repeat(1, channels, 1, 1)


def test_float32_and_mixed_precision_come_close(tasks) -> None:
    for amp in ("off", "bf16"):
        trainers = make_trainers(amp=amp)
        alone = [t.fit(m, d) for t, m, d in zip(trainers, make_models(), tasks, strict=True)]
        together = fit_stacked(trainers, make_models(), tasks)
        for one, other in zip(together, alone, strict=True):
            expected = other.history[-1]["normal_error"]
            assert one.history[-1]["normal_error"] == pytest.approx(expected, rel=0.02)


def test_history_has_each_models_own_images_a_second(tasks) -> None:
    together = fit_stacked(make_trainers(), make_models(), tasks)
    rows = [result.history[0] for result in together]
    images = [count // 16 * 16 for count in COUNTS]
    # Of one time for all.
    assert (
        len({round(n / r["images_per_second"], 9) for n, r in zip(images, rows, strict=True)}) == 1
    )


def test_resumed_stack_ends_where_an_unbroken_one_does(tasks, tmp_path, monkeypatch) -> None:
    whole = fit_stacked(make_trainers(), make_models(), tasks)
    finish, calls = stacked.Run.finish_epoch, []

    def interrupted(self, row):
        calls.append(row["epoch"])
        if calls == [1, 1, 1, 2, 2]:  # one model has saved its second epoch, two have not
            raise KeyboardInterrupt
        finish(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(stacked.Run, "finish_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit_stacked(make_trainers(tmp_path), make_models(), tasks)
    other = make_models()[::-1]
    resumed = fit_stacked(make_trainers(tmp_path), other, tasks, [True] * 3)
    for one, unbroken in zip(resumed, whole, strict=True):
        assert without_speed(one.history) == without_speed(unbroken.history)
        for name, value in unbroken.last_weights.items():
            assert torch.equal(one.last_weights[name], value), name


def test_checkpoints_are_those_of_training_alone(tasks, tmp_path, in_float64) -> None:
    def doubles():
        return [model.double() for model in make_models()]

    options = {"schedule": "constant"}
    alone = [
        t.fit(m, d) for t, m, d in zip(make_trainers(**options), doubles(), tasks, strict=True)
    ]
    # The first begins alone, then all go on stacked, then each ends alone.
    make_trainers(tmp_path, epochs=1, **options)[0].fit(doubles()[0], tasks[0])
    middle = make_trainers(tmp_path, epochs=3, **options)
    fit_stacked(middle, doubles(), tasks, [True, False, False])
    ends = make_trainers(tmp_path, **options)
    results = [t.fit(m, d, True) for t, m, d in zip(ends, doubles(), tasks, strict=True)]
    compare(results, alone)


def test_models_own_their_memory_afterwards(tasks) -> None:
    models = make_models()
    fit_stacked(make_trainers(epochs=1), models, tasks)
    places = [t.untyped_storage().data_ptr() for m in models for t in m.state_dict().values()]
    assert len(set(places)) == len(places)
    before = weights(models[1])
    with torch.no_grad():
        for value in models[0].state_dict().values():
            value.zero_()
    assert all(torch.equal(before[n], v) for n, v in models[1].state_dict().items())


def test_what_was_measured_on_the_old_weights_goes(tasks) -> None:
    models = make_models()
    for model, task in zip(models, tasks, strict=True):
        model.calibration = calibrate(fastalps.Scorer(model), task.train, 0.1)
        model.quantization = fastalps.quantize(model, task.train)
    fit_stacked(make_trainers(epochs=1), models, tasks)
    assert all(model.calibration is model.quantization is None for model in models)


def test_a_stack_computes_each_model_and_shares_its_memory(rng) -> None:
    models = make_models()
    images = torch.rand(5, 3, 1, 8, 8, generator=rng)
    for model in models:
        model.train()(torch.rand(9, 1, 8, 8, generator=rng))  # statistics of its own
        model.eval()
    alone = [model(images[:, k]) for k, model in enumerate(models)]
    network = stack(models).eval()
    for name in ("latent", "perturbation", "reconstruction", "perturbed_reconstruction"):
        found = getattr(network(images.flatten(0, 1)), name).unflatten(0, (5, 3))
        for k, output in enumerate(alone):
            torch.testing.assert_close(found[:, k], getattr(output, name))
    with torch.no_grad():
        models[1].decoder.dense.bias.fill_(7)
    assert (network.decoder.network.dense.bias == 7).sum() == len(models[1].decoder.dense.bias)
    unstack(models)
    with torch.no_grad():
        models[1].decoder.dense.bias.zero_()
    assert (network.decoder.network.dense.bias == 7).any()


def test_an_idle_model_does_not_move(rng) -> None:
    models = make_models()
    network = stack(models).train()
    steps = stacked.StackedSteps(network, [Steps(model, OPTIONS) for model in models])
    batch = torch.rand(3 * 16, 1, 8, 8, generator=rng)
    steps.autoencoder(batch)
    steps.distorter(batch)

    def state(k: int) -> dict[str, torch.Tensor]:
        tensors = {**models[k].state_dict(), **steps.each[k].optimizer_tensors()}
        # Statistics do change; the loop puts them back at the epoch's end.
        kept = {n: t for n, t in tensors.items() if "running" not in n and "tracked" not in n}
        return {name: tensor.clone() for name, tensor in kept.items()}

    before = [state(k) for k in range(3)]
    steps.rest([False, True, False])
    steps.autoencoder(batch)
    steps.distorter(batch)
    for k, old in enumerate(before):
        same = {name for name, value in state(k).items() if torch.equal(value, old[name])}
        assert same == (set(old) if k == 1 else set())


def test_double_models_are_refused(tasks) -> None:
    models = make_models()
    models[1].double()
    with pytest.raises(TypeError, match=r"expected float32 weights, got torch\.float64"):
        fit_stacked(make_trainers(), models, tasks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_torchs_default_dtype_changes_nothing(tasks, dtype) -> None:
    expected = fit_stacked(make_trainers(), make_models(), tasks)
    torch.set_default_dtype(dtype)
    try:
        found = fit_stacked(make_trainers(), make_models(), tasks)
    finally:
        torch.set_default_dtype(torch.float32)
    compare(found, expected, 0)


def test_no_run_of_a_stack_is_overwritten(tasks, tmp_path) -> None:
    trainers = make_trainers(tmp_path, epochs=1)
    trainers[1].fit(make_models()[1], tasks[1])
    before = (tmp_path / "1" / CHECKPOINT).read_bytes()
    with pytest.raises(fastalps.UserError, match="1 already holds a run"):
        fit_stacked(trainers, make_models(), tasks)
    assert (tmp_path / "1" / CHECKPOINT).read_bytes() == before
    # Nor has any other run of the stack begun.
    assert not list((tmp_path / "0").iterdir()) + list((tmp_path / "2").iterdir())


def test_divergence_names_the_model(tasks, tmp_path) -> None:
    broken = make_models(batch_norm=False)
    with torch.no_grad():
        broken[1].decoder.dense.weight.fill_(math.nan)
    with pytest.raises(fastalps.UserError, match="model 1 of the stack: training diverged"):
        fit_stacked(make_trainers(tmp_path), broken, tasks)
    assert (tmp_path / "2" / CHECKPOINT).is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amp": "fp16"}, "fp16 scales the gradients of a stack as one"),
        ({"batch_size": 64}, "every model of a stack needs 64 images for a batch, one has 60"),
    ],
)
def test_options_that_a_stack_cannot(tasks, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit_stacked(make_trainers(**options), make_models(), tasks)


def test_models_that_do_not_go_together(tasks, tmp_path) -> None:
    trainers, models = make_trainers(), make_models()
    with pytest.raises(ValueError, match="data: expected one for each of 3 models, got 2"):
        fit_stacked(trainers, models, tasks[:2])
    with pytest.raises(ValueError, match="trainers: expected one for each of 0 models, got 0"):
        fit_stacked([], [], [])
    with pytest.raises(ValueError, match=r"has one latent, got 4 \(number 0\) and 5 \(number 2\)"):
        fit_stacked(trainers, [*models[:2], ALPS(8, 1, **{**WIDTHS, "latent": 5})], tasks)
    slower = Trainer(dataclasses.replace(OPTIONS, learning_rate=1e-4), progress=False)
    with pytest.raises(ValueError, match="trainers: a stack has one learning_rate"):
        fit_stacked([*trainers[:2], slower], models, tasks)
    altered = make_models()
    altered[1].encoder.register_forward_hook(lambda module, given, found: 2 * found)
    with pytest.raises(ValueError, match=r"models: layer encoder has a hook, .* fit it alone"):
        fit_stacked(trainers, altered, tasks)
    with pytest.raises(ValueError, match="got one of them twice"):
        fit_stacked(trainers, [models[0], *models[:2]], tasks)
    with pytest.raises(ValueError, match="images of one dtype"):
        fit_stacked(trainers, models, [tasks[0].train / 255, *tasks[1:]])
    with pytest.raises(ValueError, match="resume: needs the run_dir"):
        fit_stacked(trainers, models, tasks, [False, True, False])
    with pytest.raises(fastalps.UserError, match="no such file"):
        fit_stacked(make_trainers(tmp_path), models, tasks, [True] * 3)


@pytest.mark.gpu
@needs_cuda
class TestCuda:
    @pytest.mark.parametrize("perturbation", ["adversarial", "none"])
    def test_captured_steps_equal_eager_ones(self, tasks, perturbation) -> None:
        runs = [
            fit_stacked(
                make_trainers(device="cuda", cuda_graphs=graphs, deterministic=True),
                make_models(perturbation=perturbation),
                tasks,
            )
            for graphs in ("off", "on")
        ]
        compare(runs[1], runs[0], 1e-4)

    @pytest.mark.parametrize("perturbation", ["adversarial", "noise", "none"])
    @pytest.mark.parametrize("amp", ["off", "bf16"])
    def test_a_captured_stack_learns_as_each_would_alone(self, tasks, amp, perturbation) -> None:
        options = {"device": "cuda", "amp": amp, "epochs": 30, "learning_rate": 5e-3}
        trainers = make_trainers(**options)
        models = [make_models(perturbation=perturbation) for _ in range(2)]
        alone = [t.fit(m, d) for t, m, d in zip(trainers, models[0], tasks, strict=True)]
        together = fit_stacked(trainers, models[1], tasks)
        for one, other in zip(together, alone, strict=True):
            assert one.history[-1]["normal_error"] < one.history[0]["normal_error"] / 2
            expected = other.history[-1]["normal_error"]
            assert one.history[-1]["normal_error"] == pytest.approx(expected, rel=0.2)

    def test_resume(self, tasks, tmp_path) -> None:
        options = {"device": "cuda", "deterministic": True, "schedule": "constant"}
        whole = fit_stacked(make_trainers(**options), make_models(), tasks)
        fit_stacked(make_trainers(tmp_path, epochs=2, **options), make_models(), tasks)
        trainers = make_trainers(tmp_path, **options)
        resumed = fit_stacked(trainers, make_models()[::-1], tasks, [True] * 3)
        compare(resumed, whole, 0.0)
