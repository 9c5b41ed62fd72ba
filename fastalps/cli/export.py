"""``fastalps-export``: a trained run in, a file that runs without fastalps out."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fastalps
from fastalps.cli import command, run_folder
from fastalps.cli.options import make_parser, parse, pick
from fastalps.errors import UserError

NAME = "fastalps-export"
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}

USAGE = """fastalps-export RUN --format onnx|pt2 --out FILE [options]

  fastalps-export runs/two --out two.onnx
  fastalps-export runs/ped2 --frame-size 240x360 --out ped2.onnx
  fastalps-export runs/two --format pt2 --pixels float32 --out two.pt2"""

DESCRIPTION = """Writes a run of fastalps-train as one file for ONNX Runtime or plain PyTorch.

RUN is the run's folder (or its model.safetensors, or pretrained:NAME). Without --frame-size the
file takes "images" (batch, channels, height, width) of the model's size and gives "scores"
(batch,). With it, the file takes whole "frames" (batch, height, width), cuts them into patches
itself, and gives "patch_scores" (batch, patches); a frame's score is their maximum, unless the run
says otherwise. The batch is any number. The threshold and what it means are in the file's
metadata. The file is compared with the model on random pixels before it gets its name; if the
scores differ, nothing is written."""


@dataclass(frozen=True)
class ExportOptions:
    """The file.

    Attributes:
        format: onnx (standard operators only; needs fastalps[onnx]) or pt2 (torch.export; read it
            with torch alone).
        frame_size: height x width of whole frames, such as 240x360; null = images of the model's
            size.
        stride: pixels from one patch to the next, such as 15 or 15x30; null = as the run was
            calibrated, else the patch size.
        edge: cover, drop or error, where patches do not divide a frame; null = as calibrated.
        score: normal, perturbed or average; null = the one that the run's threshold is for.
        pixels: uint8 (0 to 255) or float32 (0 to 1).
        gate: a second input "background" (height, width); patches that hardly differ from it score
            0, as in fastalps-score.
    """

    format: str = "onnx"
    frame_size: str | None = None
    stride: str | None = None
    edge: str | None = None
    score: str | None = None
    pixels: str = "uint8"
    gate: bool = False

    def __post_init__(self) -> None:
        if self.format not in SUFFIXES:
            raise UserError(f"format must be one of {', '.join(SUFFIXES)}, got {self.format!r}")
        for name in ("frame_size", "stride"):
            parse_size(name, getattr(self, name))


def parse_size(name: str, text: str | None) -> tuple[int, int] | None:
    """(height, width) of "240x360", or of "240" for both; None of None; UserError of others."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:\s*x\s*(\d+))?", text.strip().lower())
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if min(size) < 1:
        raise UserError(f"{name} must be pixels, such as 240x360 (height x width), got {text!r}")
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, see `fastalps.cli.command.run`."""
    return command.run(NAME, export, arguments)


def export(arguments: Sequence[str]) -> None:
    """Parses the arguments, writes the file, says what it takes and gives."""
    parser = make_parser(NAME, DESCRIPTION, USAGE, ExportOptions)
    parser.add_argument(
        "run", help="folder of a run of fastalps-train, a model.safetensors, or pretrained:NAME"
    )
    parser.add_argument("--out", required=True, help="the file to write")
    namespace = parse(parser, arguments)
    options = pick(namespace, ExportOptions)
    out = Path(namespace.out)
    for name, suffix in SUFFIXES.items():
        if name != options.format and out.suffix.lower() == suffix:
            raise UserError(
                f"{out} is named like the format {name}, but --format is {options.format}; "
                "change one of them"
            )
    model = fastalps.load(run_folder.model_path(namespace.run))
    # Slow to import, and no error above needs it.
    from fastalps.export import describe, export_onnx, export_program

    write = export_onnx if options.format == "onnx" else export_program
    exported = write(
        model,
        out,
        frame_size=parse_size("frame_size", options.frame_size),
        stride=parse_size("stride", options.stride),
        edge=options.edge,
        score=options.score,
        pixels=options.pixels,
        gate=options.gate,
    )
    for line in describe(exported):
        print(line)
    print(f"wrote {out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
