"""What precisions do to the scores of the pretrained networks on real data: errors and AUROC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastalps
from bench.harness import Case, Settings
from bench.precision import PRETRAINED, SCORES, compare_pretrained
from fastalps.errors import UserError

# Points of AUROC that a precision may move a score's.
MOVED = {"fp32": 0.0, "bf16": 0.05, "int8": 0.1}


def _measure(name: str) -> Callable[[Settings], dict[str, Any]]:
    def measure(settings: Settings) -> dict[str, Any]:
        try:
            images, labels = PRETRAINED[name](settings.data.parent)
        except UserError as absent:
            return {"ok": True, "absent": str(absent), "figures": {}}
        order = torch.randperm(len(images), generator=settings.generator())
        order = order[: settings.pick(200, 2000, len(images))]
        model = fastalps.load_pretrained(name)
        rows = compare_pretrained(settings.device, model, images[order], labels[order])
        figures: dict[str, dict[str, Any]] = {}
        failed = []
        for precision, row in rows.items():
            for quantile, value in row["relative_error"].items():
                label = f"{precision}: error, {float(quantile):.0%}"
                figures[label] = {"value": value, "unit": "of float64"}
            areas = [100 * row["auroc"][kind] for kind in SCORES]
            figures[f"{precision}: AUROC, average"] = {"value": areas[-1], "unit": "%"}
            if "moved" in row:
                moved = max((100 * row["moved"][kind] for kind in SCORES), key=abs)
                figures[f"{precision}: AUROC moved"] = {"value": moved, "unit": "points at most"}
                if abs(moved) > MOVED[precision]:
                    failed.append(f"{precision} moves AUROC by more than {MOVED[precision]} points")
        record: dict[str, Any] = {"ok": not failed, "figures": figures}
        return record | {"failed": "; ".join(failed)} if failed else record

    return measure


def cases(settings: Settings) -> list[Case]:
    """Each pretrained network, in every precision of the device."""
    return [
        Case(
            f"scoring/accuracy/{name}",
            f'pretrained "{name}" on its test data: relative errors of both scores (half, 99% and '
            "all of them are below), AUROC and how far it is from that of fp32",
            measure=_measure(name),
        )
        for name in PRETRAINED
    ]
