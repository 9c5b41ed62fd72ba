"""``fastalps-train``: data in, a folder with a model, its scores, figures and metrics out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastalps import distributed, environment
from fastalps.cli import command, plots, run_folder
from fastalps.cli.evaluation import Evaluation, evaluate_images
from fastalps.cli.options import (
    VIDEO_DATASETS,
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    absolute,
    make_parser,
    parse,
    pick,
)
from fastalps.cli.video_evaluation import Video, evaluate_normal_video, evaluate_video
from fastalps.data import (
    Clip,
    OneClassData,
    load_images,
    load_ucsd,
    motion_frames,
    patch_task,
    still_background,
)
from fastalps.data.video_clips import load_videos
from fastalps.errors import UserError
from fastalps.files import make_folder, write_text
from fastalps.gate import MotionGate
from fastalps.models import ALPS
from fastalps.protocols import motion_baseline
from fastalps.quantization import LEAST_IMAGES as LEAST_TO_QUANTIZE
from fastalps.quantization import quantize
from fastalps.training import FitResult, TensorBoardLogger, TrainConfig, Trainer
from fastalps.training.trainer import CHECKPOINT, check_images, choose_device

NAME = "fastalps-train"
BOARD = "tensorboard"
logger = logging.getLogger("fastalps")

USAGE = """fastalps-train --dataset NAME [--root DIR] [--normal-class K] --out RUN [options]

  fastalps-train --dataset digits --normal-class 3 --epochs 30 --out runs/three
  fastalps-train --dataset mnist --root data/mnist --normal-class 2 --out runs/two
  fastalps-train --dataset folder --root my-images --protocol strict --out runs/mine
  fastalps-train --dataset ucsd-ped2 --root data/UCSDped2 --out runs/ped2
  fastalps-train --dataset video --root normal-videos --frames motion --out runs/gate
  fastalps-train --resume --out runs/ped2                 (after Ctrl-C or a crash)"""

DESCRIPTION = """Trains ALPS on normal data and tests it.

RUN gets model.safetensors, config.yaml, history.csv (an epoch a row), metrics.json (AUROC, AUPR and
EER of each score), scores.csv (what they are computed from) and figures/. A score is the mean
squared error of an image's reconstruction, pixels in [0, 1]: normal, perturbed, or the average of
both; higher = more anomalous. The threshold is set on held-out normal data only. --dataset, --root
and --out are enough to begin with; all else has a default."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, see `fastalps.cli.command.run`."""
    return command.run(NAME, train, arguments)


def train(arguments: Sequence[str]) -> None:
    """Parses the arguments, trains, evaluates and writes the run's folder."""
    parser = make_parser(
        NAME, DESCRIPTION, USAGE, DataOptions, ModelOptions, TrainConfig, EvaluationOptions
    )
    parser.add_argument("--out", required=True, help="the run's folder; must not hold a run yet")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, bit for bit"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the history for TensorBoard, too, into RUN/tensorboard",
    )
    options = parse(parser, _with_stored_configuration(arguments))
    data_options = pick(options, DataOptions)
    model_options = pick(options, ModelOptions)
    config = pick(options, TrainConfig)
    evaluation_options = pick(options, EvaluationOptions)
    folder = Path(options.out)
    if options.resume:
        run_folder.check_resumable(folder)
    else:
        run_folder.check_unused(folder)
    board = TensorBoardLogger(folder / BOARD) if options.tensorboard else None
    if data_options.dataset in VIDEO_DATASETS and config.select == "auto":
        # No anomaly is known outside the test sets: nothing but normal loss can pick an epoch.
        config = dataclasses.replace(config, protocol="strict")

    # The folder stays this command's until all is written.
    with contextlib.ExitStack() as held:
        with distributed.launched(config.device) as here:
            config = dataclasses.replace(config, device=here)
            processes, first = distributed.world_size(), distributed.rank() == 0
            data, video = _load(data_options, config, evaluation_options)
            torch.manual_seed(config.seed)
            model = ALPS(
                tuple(data.train.shape[2:]),
                data.train.shape[1],
                model_options.preset,
                **model_options.overrides(),
            )
            device = choose_device(config)
            check_images(data.train, model, config)
            _take(folder, options.resume, device, held)
            if first:
                _store_configuration(parser, options, folder)
                print(
                    f"{data.name}: {len(data.train)} training images of "
                    f"{' x '.join(map(str, data.train.shape[1:]))}, {len(data.validation)} held "
                    f"out; {config.epochs} epochs on {_described(device, processes)}"
                )
            begin = time.perf_counter()
            fitted = _fit(model, data, config, folder, options.resume, board)
            seconds = time.perf_counter() - begin
        if first:
            result = _evaluate(fitted, data, video, evaluation_options)
            _write(folder, fitted, data, result, config, data_options, seconds)
            for line in result.lines:
                print(line)
            print(result.calibration.explain())
            print(
                f"wrote {folder}: {run_folder.MODEL}, {run_folder.METRICS}, {run_folder.SCORES}, "
                "figures/"
            )


def _take(folder: Path, resume: bool, device: torch.device, held: contextlib.ExitStack) -> None:
    """Keeps the run's folder for process 0, and so for all, as long as `held` is open.

    Raises:
        UserError: in process 0: the folder is in use, or another run has come meanwhile.
        command.Told: in the others then.
    """
    refusal = None
    if distributed.rank() == 0:
        try:
            held.enter_context(run_folder.locked(folder))
            if not resume:
                # Another run may have begun and ended since the arguments were checked.
                run_folder.check_unused(folder)
        except UserError as error:
            refusal = error
    refused = distributed.average(torch.tensor(float(refusal is not None), device=device))
    if refusal is not None:
        raise refusal
    if refused:
        raise command.Told


def _store_configuration(parser: Any, options: Any, folder: Path) -> None:
    """Writes all options but those that the run's folder is itself."""
    stored = options.clone(with_meta=False)
    stored.root, stored.cache = absolute(options.root), absolute(options.cache)
    for name in ("out", "resume", "config"):
        stored.pop(name, None)
    text = parser.dump(stored, skip_unset=False, skip_validation=True)
    write_text(make_folder(folder) / run_folder.CONFIG, text)


def _with_stored_configuration(arguments: Sequence[str]) -> list[str]:
    """`arguments` with the stored configuration of a run that is resumed in front.

    So `--resume --out RUN` alone goes on with all the options that the run was started with.
    """
    out = None
    for i, argument in enumerate(arguments):
        if argument == "--out" and i + 1 < len(arguments):
            out = arguments[i + 1]
        elif argument.startswith("--out="):
            out = argument.partition("=")[2]
    stored = Path(out or "") / run_folder.CONFIG
    if "--resume" not in arguments or out is None or not stored.is_file():
        return list(arguments)
    return ["--config", str(stored), *arguments]


def _load(
    options: DataOptions, config: TrainConfig, evaluation: EvaluationOptions
) -> tuple[OneClassData, Video | None]:
    """The task, and for video the clips to evaluate on."""
    if options.dataset in VIDEO_DATASETS:
        if options.root is None:
            raise UserError(
                f"the data set {options.dataset} needs --root, the folder that holds it"
            )
        if options.normal_class is not None:
            raise UserError(f"--normal-class does not apply to {options.dataset}; leave it out")
        if options.dataset == "video":
            if options.cache is not None:
                raise UserError("--cache does not apply to video; leave it out")
            clips, test = load_videos(options.root), []
        else:
            subset = options.dataset.removeprefix("ucsd-")
            clips = load_ucsd(options.root, subset, "train", cache=options.cache)
            test = load_ucsd(options.root, subset, "test", cache=options.cache)
        baseline = motion_baseline(test, evaluation.patch_size)
        gate = MotionGate(evaluation.gate_threshold)
        if options.frames == "motion":
            size = (clips[0].frames.shape[1], clips[0].frames.shape[2])
            gate = MotionGate(evaluation.gate_threshold, still_background(size))
            clips, test = _moving(clips), _moving(test)
        task, held_out = patch_task(options.dataset, clips, evaluation.patch_size, gate)
        return task, Video(options.frames, held_out, test, gate, baseline)
    if options.dataset == "folder" and options.root is not None:
        from fastalps.data import load_folder

        if options.normal_class is not None:
            raise UserError(
                "--normal-class does not apply to folder, whose sub-folders say what is normal; "
                "leave it out"
            )
        data = load_folder(
            options.root,
            image_size=options.image_size,
            protocol=config.protocol,
            seed=config.seed,
        )
        return data, None
    data = load_images(
        options.dataset,
        options.root,
        normal_class=options.normal_class,
        protocol=config.protocol,
        seed=config.seed,
        download=options.download,
    )
    return data, None


def _moving(clips: list[Clip]) -> list[Clip]:
    return [dataclasses.replace(clip, frames=motion_frames(clip.frames)) for clip in clips]


def _fit(
    model: ALPS,
    data: OneClassData,
    config: TrainConfig,
    folder: Path,
    resume: bool,
    board: TensorBoardLogger | None,
) -> FitResult:
    loggers = [] if board is None else [board]
    try:
        return Trainer(config, folder, loggers=loggers).fit(model, data, resume)
    except KeyboardInterrupt:
        if (folder / CHECKPOINT).is_file():
            hint = f"the finished epochs are kept; go on with: {NAME} --resume --out {folder}"
        else:
            hint = "nothing was trained yet"
        raise command.Interrupted(f"stopped; {hint}") from None
    finally:
        if board is not None:
            board.close()


def _evaluate(
    fitted: FitResult, data: OneClassData, video: Video | None, options: EvaluationOptions
) -> Evaluation:
    if video is None:
        return evaluate_images(fitted, data, options)
    if not video.test:
        return evaluate_normal_video(fitted, video, options)
    return evaluate_video(fitted, video, options)


def _write(
    folder: Path,
    fitted: FitResult,
    data: OneClassData,
    result: Evaluation,
    config: TrainConfig,
    options: DataOptions,
    seconds: float,
) -> None:
    import fastalps

    record = environment.result_record(
        config.protocol,
        result.metrics,
        seed=config.seed,
        data=data.name,
        dataset=options.dataset,
        frames=options.frames if options.dataset in VIDEO_DATASETS else None,
        model=dataclasses.asdict(fitted.model.config),
        parameters=sum(p.numel() for p in fitted.model.parameters()),
        flops_per_image=fitted.model.flops(),
        training=dataclasses.asdict(config),
        training_images=len(data.train),
        training_seconds=round(seconds, 3),
        chosen_epoch=fitted.best_epoch,
        chosen_by=fitted.selection,
        chosen_score=fitted.score,
        calibration=dataclasses.asdict(result.calibration),
    )
    if len(data.train) >= LEAST_TO_QUANTIZE:
        fitted.model.quantization = quantize(fitted.model, data.train)
    fastalps.save(fitted.model, folder / run_folder.MODEL, result.calibration)
    run_folder.write_scores(folder / run_folder.SCORES, result.columns, result.rows)
    pictures = make_folder(folder / run_folder.FIGURES)
    plots.losses(pictures / "losses.png", fitted.history, fitted.best_epoch)
    result.draw(pictures)
    # Last: whoever finds it finds the rest.
    run_folder.write_metrics(folder / run_folder.METRICS, record)


def _described(device: torch.device, processes: int) -> str:
    if device.type == "cpu":
        one = f"{torch.get_num_threads()} CPU threads"
    else:
        one = torch.cuda.get_device_name(device)
    return one if processes == 1 else f"{processes} processes, each on {one}"


if __name__ == "__main__":
    sys.exit(main())
