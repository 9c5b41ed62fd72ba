"""Scoring by all processes that torchrun started: process 0 reads and writes, each of them scores.

It goes in rounds. Process 0 takes a piece of the input for every process, hands them out, scores
its own, and takes the scores in, in order. A piece is what a process alone would score at a time,
and brings its background along, so that the scores are the same to the last bit. When a process
fails, process 0 tells the error and lets all go; the others say nothing.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastalps import distributed
from fastalps.cli import command
from fastalps.errors import BackendUnavailable, UserError
from fastalps.frame_scores import FrameScores
from fastalps.gate import StreamingBackground
from fastalps.scoring import Scorer

# Bytes of images that a process gets at a time.
_PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class _Images:
    """Images for one process: uint8 (n, C, H, W)."""

    pixels: Tensor

    def scored_by(self, scorer: Scorer) -> Tensor:
        return scorer.score_images(self.pixels)


@dataclass(frozen=True)
class _Frames:
    """A chunk of frames for one process: uint8 (n, H, W); background: uint8 (H, W), of the gate."""

    pixels: Tensor
    background: Tensor | None

    def scored_by(self, scorer: Scorer) -> FrameScores:
        if scorer.gate is not None:
            scorer.gate = replace(scorer.gate, background=self.background)
        return scorer.score_frames(self.pixels)


@dataclass(frozen=True)
class _End:
    """There is nothing more to do."""

    failed: bool


@dataclass(frozen=True)
class _Failure:
    """What another process answers in place of scores."""

    text: str


def processes_text() -> str:
    """What stands behind a speed: how many processes, where there are several."""
    size = distributed.world_size()
    return f", {size} processes" if size > 1 else ""


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """For process 0, around all that it does: at its end, or its error, the others end, too."""
    failed = True
    try:
        yield
        failed = False
    finally:
        if distributed.world_size() > 1:
            # Where another process is gone, that is the error, and torchrun ends the rest.
            with contextlib.suppress(RuntimeError):
                distributed.scatter([_End(failed)] * distributed.world_size())


def follow(make: Callable[[], Scorer]) -> None:
    """For the other processes: scores what process 0 hands out, until it lets them go.

    Args:
        make: gives the scorer; called when there is something to score.

    Raises:
        command.Told: something failed, and process 0 has said what.
    """
    # Ctrl-C reaches all processes: process 0 ends the others when it has written what there is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable()
    scorer: Scorer | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            piece: Any = distributed.scatter(None)
            if isinstance(piece, _End):
                if piece.failed:
                    raise command.Told
                return
            answer: Any = None
            if piece is not None:
                try:
                    scorer = scorer or make()
                    answer = piece.scored_by(scorer)
                except Exception as error:
                    answer = _Failure(_explained(error))
            distributed.gather(answer)


def score_images(scorer: Scorer, images: Tensor) -> Tensor:
    """`Scorer.score_images`, by all processes; for process 0.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        (N,) float32.

    Raises:
        UserError: another process failed.
    """
    size = distributed.world_size()
    if size == 1:
        return scorer.score_images(images)
    # Layer by layer, the last digits depend on what is in a batch.
    unit = 1 if scorer.method == "engine" else scorer.batch_size
    most = max(1, _PIECE_BYTES // (images[:1].numel() * unit))
    step = unit * min(most, -(-len(images) // (unit * size)))
    pieces = [_Images(part.clone()) for part in images.split(step)]
    answers = [a for i in range(0, len(pieces), size) for a in _round(scorer, pieces[i : i + size])]
    return torch.cat(answers)


def score_frames(scorer: Scorer, chunks: Iterator[Tensor]) -> Iterator[FrameScores]:
    """`Scorer.score_frames` of a stream, by all processes, a chunk each; for process 0.

    Args:
        chunks: uint8 (n, H, W) each, as they come.

    Returns:
        the scores of each chunk, in order. Where `chunks` raises, those of the chunks before come
        first.

    Raises:
        UserError: another process failed.
    """
    size = distributed.world_size()
    if size == 1:
        yield from scorer.score_frames(chunks)
        return
    gate = scorer.gate
    background = None if gate is None else gate.background
    learned = StreamingBackground() if gate is not None and background is None else None
    problem: BaseException | None = None
    while problem is None:
        pieces: list[_Frames] = []
        try:
            while len(pieces) < size:
                chunk = next(chunks)
                if learned is not None:
                    background = learned.update(chunk)
                pieces.append(_Frames(chunk, background))
        except (StopIteration, UserError, KeyboardInterrupt) as end:
            problem = end
        if pieces:
            yield from _round(scorer, pieces)
    if not isinstance(problem, StopIteration):
        raise problem


def _round(scorer: Scorer, pieces: list[Any]) -> list[Any]:
    """What each of at most as many pieces as processes scores, in order."""
    idle = [None] * (distributed.world_size() - len(pieces))
    own: Any
    try:
        with _undisturbed():
            distributed.scatter([*pieces, *idle])
            try:
                own = pieces[0].scored_by(scorer)
            except Exception as error:
                own = error
            answers = distributed.gather(own)
    except RuntimeError as error:
        raise UserError(
            "another process is gone; look for its own message, or for the system's "
            "(too little memory?)"
        ) from error
    assert answers is not None
    if isinstance(own, Exception):
        raise own
    for number, answer in enumerate(answers):
        if isinstance(answer, _Failure):
            raise UserError(f"process {number}: {answer.text}")
    return answers[: len(pieces)]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts Ctrl-C off: the processes must not lose each other in the middle of a round."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _explained(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return command.OUT_OF_MEMORY
    if not isinstance(error, (ValueError, OSError, BackendUnavailable)):
        # A fault of the program: here alone it is known where.
        traceback.print_exc()
    return str(error) or type(error).__name__
