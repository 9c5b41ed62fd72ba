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
from dataclasses import replace

import torch
from torch import Tensor

from fastalps import distributed
from fastalps.cli import command
from fastalps.distributed import Message
from fastalps.errors import BackendUnavailable, UserError
from fastalps.frame_scores import FrameScores
from fastalps.gate import StreamingBackground
from fastalps.memory import memory_text
from fastalps.scoring import Scorer

# Bytes of images that a process gets at a time.
_PIECE_BYTES = 1 << 26


# Messages of process 0: "images", or "frames" and the gate's "background", to score; "end", whether
# something failed; empty for a process that has nothing to do in this round. Answers: "scores", or
# "patches", "frames" and what the gate "kept"; "failure", a text; empty.
END, FAILURE = "end", "failure"


def _scored(scorer: Scorer, piece: Message) -> Message:
    if "images" in piece:
        return {"scores": scorer.score_images(piece["images"])}
    if scorer.gate is not None:
        scorer.gate = replace(scorer.gate, background=piece.get("background"))
    found = scorer.score_frames(piece["frames"])
    kept = {} if found.kept is None else {"kept": found.kept}
    return {"patches": found.patches, "frames": found.frames, **kept}


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
                end = {END: torch.tensor(failed)}
                distributed.scatter([end] * distributed.world_size())


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
            piece = distributed.scatter(None)
            if END in piece:
                if piece[END]:
                    raise command.Told
                return
            answer: Message = {}
            if piece:
                try:
                    scorer = scorer or make()
                    answer = _scored(scorer, piece)
                except Exception as error:
                    text = _explained(error).encode()
                    answer = {FAILURE: torch.tensor(list(text), dtype=torch.uint8)}
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
    pieces = [{"images": part} for part in images.split(step)]
    rounds = (_round(scorer, pieces[i : i + size]) for i in range(0, len(pieces), size))
    return torch.cat([answer["scores"] for answers in rounds for answer in answers])


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
        pieces: list[Message] = []
        try:
            while len(pieces) < size:
                chunk = next(chunks)
                if learned is not None:
                    background = learned.update(chunk)
                gated = {} if background is None else {"background": background}
                pieces.append({"frames": chunk, **gated})
        except (StopIteration, UserError, KeyboardInterrupt) as end:
            problem = end
        for piece, answer in zip(pieces, _round(scorer, pieces) if pieces else (), strict=True):
            height, width = piece["frames"].shape[-2:]
            cut = ((height, width), scorer.patch_size, scorer.stride, scorer.edge)
            yield FrameScores(answer["patches"], answer["frames"], answer.get("kept"), *cut)
    if not isinstance(problem, StopIteration):
        raise problem


def _round(scorer: Scorer, pieces: list[Message]) -> list[Message]:
    """What each of at most as many pieces as processes scores, in order."""
    idle: list[Message] = [{}] * (distributed.world_size() - len(pieces))
    problem: Exception | None = None
    own: Message = {}
    try:
        with _undisturbed():
            distributed.scatter([*pieces, *idle])
            try:
                own = _scored(scorer, pieces[0])
            except Exception as error:
                problem = error
            answers = distributed.gather(own)
    except RuntimeError as error:
        raise UserError(
            "another process is gone; look for its own message, or for the system's "
            "(too little memory?)"
        ) from error
    assert answers is not None
    if problem is not None:
        raise problem
    for number, answer in enumerate(answers):
        if FAILURE in answer:
            raise UserError(f"process {number}: {bytes(answer[FAILURE].tolist()).decode()}")
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
    if text := memory_text(error):
        return text
    if not isinstance(error, (ValueError, OSError, BackendUnavailable)):
        # A fault of the program: here alone it is known where.
        traceback.print_exc()
    return str(error) or type(error).__name__
