"""The trainer: what each step changes, selection, resuming bit for bit, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fastalps
from fastalps import TrainConfig, Trainer
from fastalps.calibration import calibrate
from fastalps.data import OneClassData
from fastalps.errors import UserError
from fastalps.models import ALPS
from fastalps.training.batches import Batches
from fastalps.training.run_state import Average
from fastalps.training.steps import Steps
from fastalps.training.trainer import CHECKPOINT, HISTORY
from fastalps.training.validation import Validator
from tests.commands import rows_of
from tests.conftest import needs_cuda
from tests.tasks import stripes, task_of, weights, without_speed

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHORT = TrainConfig(epochs=4, batch_size=16, distorter_every=2, device="cpu", seed=3)


def small_model(seed: int = 0, **options) -> ALPS:
    torch.manual_seed(seed)
    return ALPS(8, 1, "fast", latent=4, **options)


@pytest.fixture
def task(rng) -> OneClassData:
    return task_of("stripes[0]", stripes(100, True, rng), stripes(20, False, rng))


def fit(task, tmp_path=None, model=None, resume=False, **options):
    config = dataclasses.replace(SHORT, **options)
    trainer = Trainer(config, tmp_path, progress=False)
    return trainer.fit(model or small_model(), task, resume)


def changed(before, model) -> set[str]:
    after = model.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("perturbation", ["adversarial", "noise", "none"])
def test_learns_to_tell_the_classes_apart(task, perturbation) -> None:
    model = small_model(perturbation=perturbation)
    result = fit(task, model=model, epochs=30)
    assert result.model is model
    assert not model.training
    assert result.history[-1]["normal_error"] < result.history[0]["normal_error"] / 2
    scores = getattr(model.score(task.test / 255), result.score)
    assert fastalps.metrics.auroc(scores, task.test_labels) > 0.95
    assert ("distorter_error" in result.history[1]) == (perturbation == "adversarial")


def test_autoencoder_step_leaves_the_distorter_alone(task) -> None:
    model = small_model().train()
    before = weights(model)
    Steps(model, SHORT).autoencoder(task.train[:16] / 255)
    moved = changed(before, model)
    learned = {name for name, _ in model.named_parameters() if not name.startswith("distorter")}
    assert learned <= moved
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert all(name.endswith(statistics) for name in moved if name.startswith("distorter"))


def test_distorter_step_leaves_the_autoencoder_alone(task) -> None:
    model = small_model().train()
    before = weights(model)
    Steps(model, SHORT).distorter(task.train[:16] / 255)
    moved = changed(before, model)
    assert moved
    assert all(name.startswith("distorter.") for name in moved)
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Frozen batch norms take up their statistics again.
    Steps(model, SHORT).autoencoder(task.train[:16] / 255)
    assert "encoder.layers.1.running_mean" in changed(before, model)


def test_players_pull_in_opposite_directions(task) -> None:
    """Steps of the distorter alone raise the perturbed error, of the autoencoder alone lower it."""
    model = small_model().train()
    steps = Steps(model, dataclasses.replace(SHORT, learning_rate=3e-3))
    batch = task.train[:32] / 255
    for _ in range(40):
        steps.autoencoder(batch)
    raised = [float(steps.distorter(batch)[0]) for _ in range(40)]
    assert raised[-1] > 1.2 * raised[0]
    lowered = [float(steps.autoencoder(batch)[1]) for _ in range(40)]
    assert lowered[-1] < lowered[0]


def test_step_is_the_formula(task) -> None:
    """The step's gradients are those of the paper's loss, written out with plain torch."""
    torch.manual_seed(1)
    config = dataclasses.replace(SHORT, normal_weight=1.5, perturbed_weight=0.4)
    mine, theirs = small_model().double().train(), small_model().double().train()
    batch = task.train[:16].double() / 255
    Steps(mine, config).autoencoder(batch)
    z = theirs.encoder(batch)
    with torch.no_grad():
        p = theirs.distorter(batch)
    both = theirs.decoder(torch.cat([z, z + p])).sigmoid()
    normal, perturbed = ((part - batch).square().mean() for part in both.chunk(2))
    (1.5 * normal + 0.4 * perturbed).backward()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        if not name.startswith("distorter"):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_batches_cover_an_epoch_once_and_differ_between_epochs(rng) -> None:
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 8, 8)
    batches = Batches(images, 16, CPU, torch.channels_last)
    epochs = []
    for epoch in (1, 2):
        parts = list(batches.epoch(5, epoch))
        assert [len(part) for part in parts] == [16] * 3 == [16] * len(batches)
        epochs.append([round(float(image[0, 0, 0]) * 255) for part in parts for image in part])
        assert len(set(epochs[-1])) == 48
    assert epochs[0] != epochs[1]
    again = torch.cat(list(batches.epoch(5, 1)))
    assert [round(float(image[0, 0, 0]) * 255) for image in again] == epochs[0]


def test_average_follows_the_weights() -> None:
    model = torch.nn.Linear(2, 1)
    average = Average(model, 0.5)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    average.update()
    decay = 2 / 11
    average.swap()
    torch.testing.assert_close(model.weight.detach(), first + 1 - decay)
    average.swap()
    torch.testing.assert_close(model.weight.detach(), first + 1)


def test_same_seed_same_weights(task) -> None:
    first, second, other = (fit(task, seed=seed) for seed in (3, 3, 4))
    assert not changed(weights(first.model), second.model)
    assert without_speed(first.history) == without_speed(second.history)
    assert changed(weights(first.model), other.model)


@pytest.mark.filterwarnings("ignore")
def test_taps_that_meet_no_pixel_stay(task) -> None:
    """Images of 8x8 have a smallest map of one pixel, which only the middle tap meets."""
    model = small_model()
    before = weights(model)
    after = fit(task, model=model, amp="bf16").model.state_dict()
    for name in ("encoder.layers.9.weight", "decoder.layers.2.weight"):
        unmet = torch.ones(3, 3, dtype=torch.bool)
        unmet[1, 1] = False
        assert after[name].isfinite().all() and not torch.equal(after[name], before[name])
        assert torch.equal(after[name][..., unmet], before[name][..., unmet])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"average_decay": 0.9, "checkpoint_every": 2},
        {"amp": "bf16", "deterministic": True, "protocol": "strict"},
    ],
)
@pytest.mark.parametrize("perturbation", ["adversarial", "noise"])
@pytest.mark.filterwarnings("ignore")
def test_resume_continues_bit_for_bit(task, tmp_path, monkeypatch, options, perturbation) -> None:
    whole = fit(task, tmp_path / "whole", small_model(perturbation=perturbation), **options)

    epoch, calls = Trainer._epoch, []

    def interrupted(self, number, *rest):
        calls.append(number)
        if number == 4:
            raise KeyboardInterrupt
        return epoch(self, number, *rest)

    monkeypatch.setattr(Trainer, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(task, tmp_path / "cut", small_model(perturbation=perturbation), **options)
    monkeypatch.setattr(Trainer, "_epoch", epoch)
    # Other first weights: those of the checkpoint must win.
    fresh = small_model(seed=9, perturbation=perturbation)
    resumed = fit(task, tmp_path / "cut", fresh, resume=True, **options)
    assert calls == [1, 2, 3, 4]
    assert not changed(weights(whole.model), resumed.model)
    assert without_speed(whole.history) == without_speed(resumed.history)
    assert whole.best_epoch == resumed.best_epoch


def test_interrupted_in_the_first_epoch_resumes(task, tmp_path, monkeypatch) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(task, tmp_path)
    resumed = fit(task, tmp_path, small_model(seed=5), resume=True)
    assert not changed(weights(fit(task).model), resumed.model)


def test_a_finished_run_goes_on_for_longer(task, tmp_path) -> None:
    fit(task, tmp_path, epochs=2)
    longer = fit(task, tmp_path, small_model(1), resume=True, epochs=4)
    assert not changed(weights(fit(task).model), longer.model)
    assert [row["epoch"] for row in longer.history] == [1, 2, 3, 4]


def test_history_file(task, tmp_path) -> None:
    result = fit(task, tmp_path)
    rows = rows_of(tmp_path / HISTORY)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    for row, kept in zip(rows, result.history, strict=True):
        for name, value in kept.items():
            assert float(row[name]) == pytest.approx(value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, HISTORY]


def test_resume_gives_back_the_history_file(task, tmp_path) -> None:
    fit(task, tmp_path)
    before = (tmp_path / HISTORY).read_bytes()
    (tmp_path / HISTORY).unlink()
    fit(task, tmp_path, resume=True)
    assert (tmp_path / HISTORY).read_bytes() == before


def test_selection_keeps_the_best_epoch(task) -> None:
    loss = fit(task, protocol="strict", epochs=6, learning_rate=0.05)
    errors = [row["validation_average"] for row in loss.history]
    assert loss.selection == "loss"
    assert loss.score == "average"
    assert loss.best_epoch == 1 + errors.index(min(errors))
    normal = task.validation[~task.validation_labels] / 255
    assert float(loss.model.score(normal).average.mean()) == pytest.approx(min(errors), rel=1e-5)

    auroc = fit(task, protocol="paper", epochs=6)
    kept = auroc.history[auroc.best_epoch - 1][f"validation_auroc_{auroc.score}"]
    assert kept == max(
        value
        for row in auroc.history
        for name, value in row.items()
        if name.startswith("validation_auroc")
    )
    assert fit(task, select="last").best_epoch == 4


def test_what_was_measured_on_the_old_weights_goes(task, tmp_path) -> None:
    model = fit(task, tmp_path, epochs=1).model
    for resume in (False, True):
        model.calibration = calibrate(fastalps.Scorer(model), task.train, 0.1)
        model.quantization = fastalps.quantize(model, task.train)
        with pytest.raises(UserError, match="trained on other images"):
            fit(task.train[1:], tmp_path, model, resume=True)
        assert model.calibration is not None and model.quantization is not None
        fit(task, tmp_path if resume else None, model, resume=resume, epochs=2)
        assert model.calibration is None and model.quantization is None


def test_strict_never_looks_at_anomalies(task) -> None:
    inverted = dataclasses.replace(
        task, validation=torch.where(task.validation_labels.view(-1, 1, 1, 1), 0, task.validation)
    )
    first, second = (fit(data, protocol="strict", epochs=6) for data in (task, inverted))
    assert first.best_epoch == second.best_epoch
    assert not changed(weights(first.model), second.model)


def test_patience_stops(task) -> None:
    # A rate so large that the validation error soon only grows.
    result = fit(task, protocol="strict", epochs=60, patience=2, learning_rate=0.1)
    assert len(result.history) < 60
    assert len(result.history) == result.best_epoch + 2


@pytest.fixture
def best_fourth(monkeypatch) -> None:
    """Validation errors by which the first epoch is the best until the fourth comes."""
    update = Validator.update

    def by_number(self, best, epoch, row):
        row["validation_average"] = {1: 0.5, 4: 0.25}.get(epoch, 1.0)
        return update(self, best, epoch, row)

    monkeypatch.setattr(Validator, "update", by_number)


@pytest.mark.usefixtures("best_fourth")
def test_other_patience_goes_on(task, tmp_path) -> None:
    options = {"protocol": "strict", "epochs": 20}
    assert len(fit(task, tmp_path, patience=1, **options).history) == 2
    for patience, epochs in ((4, 8), (6, 10)):
        resumed = fit(task, tmp_path, small_model(1), True, patience=patience, **options)
        whole = fit(task, patience=patience, **options)
        assert len(whole.history) == epochs and whole.best_epoch == 4
        assert without_speed(resumed.history) == without_speed(whole.history)
        assert not changed(weights(whole.model), resumed.model)


@pytest.mark.usefixtures("best_fourth")
def test_nothing_left_to_train_is_told(task, tmp_path, caplog) -> None:
    done = fit(task, tmp_path, protocol="strict", epochs=3)
    assert not caplog.messages
    for options in ({"epochs": 3}, {"epochs": 20, "patience": 2}):
        again = fit(task, tmp_path, small_model(1), resume=True, protocol="strict", **options)
        assert not changed(weights(done.model), again.model) and len(again.history) == 3
    first, second = caplog.messages
    assert "nothing is left to train: 3 epochs are done; raise epochs to go on" in first
    assert "epoch 1 of 3 is the best, with patience 2; raise patience to go on" in second


def test_validation_between_epochs(task) -> None:
    result = fit(task, epochs=5, validate_every=3)
    assert ["validation_normal" in row for row in result.history] == [
        *(False, False, True, False, True)
    ]
    assert result.best_epoch in (3, 5)


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"channels_last": False}, {"compile": True}])
@pytest.mark.filterwarnings("ignore")
def test_other_ways_to_the_same_result(task, options) -> None:
    plain = fit(task, epochs=2)
    other = fit(task, epochs=2, **options)
    expected = plain.history[-1]["normal_error"]
    assert other.history[-1]["normal_error"] == pytest.approx(expected, rel=0.05)


def test_just_images(task) -> None:
    for images in (task.train, task.train / 255, (task.train / 255).double()):
        result = fit(images)
        assert result.selection == "last"
        assert result.best_epoch == 4
        assert math.isfinite(result.history[-1]["normal_error"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("perturbation", ["adversarial", "noise"])
def test_torchs_default_dtype_changes_nothing(task, dtype, perturbation) -> None:
    expected = fit(task, model=small_model(perturbation=perturbation), average_decay=0.9)
    torch.set_default_dtype(dtype)
    try:
        found = fit(task, model=small_model(perturbation=perturbation), average_decay=0.9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert without_speed(found.history) == without_speed(expected.history)
    assert not changed(weights(found.model), expected.model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_that_are_not_float32(task, dtype) -> None:
    message = rf"expected float32 weights, got {dtype} .*model\.float\(\)"
    with pytest.raises(TypeError, match=message):
        fit(task, model=small_model().to(dtype))


def test_images_with_a_graph_of_their_own(task, tmp_path) -> None:
    images = (task.train / 255).requires_grad_()
    found = fit(images * 1, tmp_path)
    assert not changed(weights(fit(task.train).model), found.model)
    assert images.grad is None


def test_frozen_weights(task) -> None:
    model = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"got a frozen autoencoder; call model\.requires_grad_"):
        fit(task, model=model)
    model.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="got a frozen distorter"):
        fit(task, model=model)
    fit(task, model=model, distorter_every=5)


def test_gray_levels_that_are_no_bytes_are_warned_of(rng) -> None:
    with pytest.warns(UserWarning, match=r"expected in \[0, 1\], got .*divide them by 255"):
        Trainer(SHORT, progress=False).prepare(small_model(), stripes(20, True, rng).float())


def test_float_and_uint8_images_train_alike(task) -> None:
    assert not changed(weights(fit(task.train).model), fit(task.train / 255).model)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 8, 8), "at least 2 training images, got 0; there is nothing to learn"),
        (torch.zeros(1, 1, 8, 8), "at least 2 training images, got 1"),
        (torch.zeros(4, 1, 8, 9), r"takes images \(N, 1, 8, 8\), got \(4, 1, 8, 9\)"),
        (torch.zeros(4, 8, 8), r"got \(4, 8, 8\)"),
        (torch.full((4, 1, 8, 8), math.nan), "NaN or infinite pixels"),
        (torch.full((4, 1, 8, 8), math.inf), "NaN or infinite pixels"),
    ],
)
def test_wrong_images(images, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(images)


def test_batches_of_one_where_batch_norm_needs_more(rng) -> None:
    config, images = dataclasses.replace(SHORT, epochs=1, batch_size=1), stripes(4, True, rng)
    trainer = Trainer(config, progress=False)
    with pytest.raises(ValueError, match=r"batch_size: expected at least 2.* as small as 8 x 8"):
        trainer.fit(small_model(), images)
    trainer.fit(small_model(batch_norm=False), images)
    trainer.fit(ALPS(17, 1, "fast", latent=4), torch.rand(4, 1, 17, 17))


@pytest.mark.parametrize(
    "images",
    [
        [1, 2],
        torch.zeros(4, 1, 8, 8, dtype=torch.int64),
        torch.zeros(4, 1, 8, 8).to(torch.float8_e4m3fn),
    ],
)
def test_wrong_kinds(images) -> None:
    with pytest.raises(TypeError, match="data: expected"):
        fit(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected an integer"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number"),
        ({"learning_rate": math.nan}, "learning_rate: expected a positive number"),
        ({"beta1": 1.0}, r"beta1: expected in \[0, 1\)"),
        ({"amp": "fp8"}, "amp: expected one of off, bf16, fp16"),
        ({"protocol": "lenient"}, "protocol: expected one of paper, strict"),
        ({"protocol": "strict", "select": "auroc"}, "'auroc' needs anomalies"),
        ({"patience": 0}, "patience: expected an integer of at least 1"),
    ],
)
def test_wrong_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "device: expected auto, cpu or cuda"),
        ({"device": "meta"}, "device: expected auto, cpu or cuda"),
        ({"amp": "fp16"}, "fp16 needs a CUDA device"),
        ({"cuda_graphs": "on"}, "'on' needs a CUDA device"),
    ],
)
def test_options_that_the_device_cannot(task, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(task, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_absent_device(task) -> None:
    with pytest.raises(ValueError, match=r"device: cuda is not here \(0 CUDA devices\)"):
        fit(task, device="cuda")


def test_selection_that_the_data_cannot(task) -> None:
    normal = dataclasses.replace(
        task, validation=task.validation[:20], validation_labels=task.validation_labels[:20]
    )
    with pytest.raises(ValueError, match="auroc needs normal and anomalous validation images"):
        fit(normal)
    with pytest.raises(ValueError, match="loss needs normal validation images, got none"):
        fit(task.train, select="loss")


def test_divergence_ends_with_the_epoch_and_keeps_the_run(task, tmp_path) -> None:
    with pytest.raises(fastalps.UserError, match=r"training diverged: .* lower learning_rate"):
        fit(task, tmp_path, small_model(batch_norm=False), learning_rate=1e30)
    assert (tmp_path / CHECKPOINT).is_file()


def test_a_run_is_never_overwritten(task, tmp_path) -> None:
    fit(task, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"already holds a run .*resume=True, or give another"):
        fit(task, tmp_path, small_model(1))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_resume_needs_its_run(task, tmp_path) -> None:
    with pytest.raises(ValueError, match="needs the run_dir"):
        fit(task, resume=True)
    with pytest.raises(fastalps.UserError, match="no such file"):
        fit(task, tmp_path, resume=True)
    fit(task, tmp_path)
    with pytest.raises(fastalps.UserError, match=r"run has learning_rate = 0\.001, now 0\.1"):
        fit(task, tmp_path, resume=True, learning_rate=0.1)
    with pytest.raises(fastalps.UserError, match="run has latent = 4, now 8"):
        fit(task, tmp_path, ALPS(8, 1, "fast", latent=8), resume=True)
    with pytest.raises(fastalps.UserError, match="trained on other images"):
        fit(dataclasses.replace(task, train=task.train.flip(0)), tmp_path, resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"garbage")
    with pytest.raises(fastalps.UserError, match="not a readable safetensors file"):
        fit(task, tmp_path, resume=True)


def test_model_file_is_no_checkpoint(task, tmp_path) -> None:
    fastalps.save(small_model(), tmp_path / CHECKPOINT)
    with pytest.raises(fastalps.UserError, match="expected a fastalps-run file"):
        fit(task, tmp_path, resume=True)


def test_run_dir_that_is_a_file(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fastalps.UserError, match="cannot create the folder"):
        Trainer(SHORT, tmp_path / "file")


@pytest.mark.gpu
@needs_cuda
class TestCuda:
    @pytest.mark.parametrize("perturbation", ["adversarial", "none"])
    def test_captured_steps_equal_eager_ones(self, task, perturbation) -> None:
        runs = [
            fit(
                task,
                model=small_model(perturbation=perturbation),
                device="cuda",
                cuda_graphs=graphs,
                deterministic=True,
            )
            for graphs in ("off", "on")
        ]
        for name, value in runs[0].model.state_dict().items():
            torch.testing.assert_close(
                runs[1].model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name
            )

    @pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
    def test_mixed_precision_learns(self, task, amp) -> None:
        result = fit(task, device="cuda", amp=amp, epochs=30)
        assert result.history[-1]["normal_error"] < result.history[0]["normal_error"] / 2

    def test_resume(self, task, tmp_path) -> None:
        options = {"device": "cuda", "deterministic": True, "average_decay": 0.9}
        whole = fit(task, **options)
        fit(task, tmp_path, epochs=2, **options)
        resumed = fit(task, tmp_path, small_model(5), resume=True, **options)
        assert not changed(weights(whole.model), resumed.model)


def test_cosine_schedule(task, tmp_path) -> None:
    config = dataclasses.replace(SHORT, schedule="cosine", learning_rate=2e-3)
    steps = Steps(small_model(), config)

    def rates(name: str) -> list[float]:
        found = []
        for epoch in range(1, 5):
            steps.schedule(epoch)
            found.append(float(steps.optimizers[name].param_groups[0]["lr"]))
        return found

    expected = [0.5 * (1 + math.cos(math.pi * i / 4)) * 2e-3 for i in range(4)]
    assert rates("autoencoder") == pytest.approx(expected)
    assert rates("distorter") == pytest.approx(expected)
    whole = fit(task, schedule="cosine")
    fit(task, tmp_path, schedule="cosine", checkpoint_every=1)
    # The last epochs of a longer run have other rates: it is another run.
    with pytest.raises(UserError, match="epochs = 4, now 6"):
        fit(task, tmp_path, resume=True, schedule="cosine", epochs=6)
    constant = fit(task)
    assert without_speed(whole.history)[0] == without_speed(constant.history)[0]
    assert without_speed(whole.history)[-1] != without_speed(constant.history)[-1]
