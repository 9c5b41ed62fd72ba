"""Results as text: a table of one case, and of an old run against a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = """\
time: median of a call (10th to 90th percentile); rate: what a call does, by its median time; \
share: of the bandwidth of `torch copy_`, measured between the others.
ratio: this row's time over the first row's, above 1x = the first row is faster; \
error: the largest against float64, relative (ops: to 1 + |value|; int8: 1 - rank correlation)."""

_HEADER = f"{'':<26} {'time':>9} {'spread':>19} {'rate':>29} {'share':>6} {'ratio':>7} {'error':>8}"
RATES = {"frames": "frames/s", "patches": "patches/s", "images": "images/s"}


def seconds_text(seconds: float) -> str:
    """A time with three digits and its unit."""
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def rate_text(amounts: Mapping[str, float], seconds: float) -> str:
    """What is done a second: GB/s, or frames and patches, or images."""
    if "bytes" in amounts:
        return f"{amounts['bytes'] / seconds / 1e9:.2f} GB/s"
    parts = [
        f"{amounts[key] / seconds:,.0f} {unit}" for key, unit in RATES.items() if key in amounts
    ]
    return ", ".join(parts)


def case_lines(name: str, record: Mapping[str, Any]) -> Iterator[str]:
    """The lines that a case is printed as."""
    yield f"{name}: {record['about']}"
    if "candidates" not in record:
        yield from _figure_lines(record)
        return
    yield _HEADER
    rows = record["candidates"]
    copy = rows.get("torch copy_", {}).get("seconds")
    for candidate, row in rows.items():
        label = f"  {candidate:<24}"
        if "absent" in row:
            yield f"{label} absent: {row['absent']}"
        elif "failed" in row:
            yield f"{label} FAILED: {row['failed']}; no speed"
        elif "seconds" not in row:
            yield f"{label} not timed, since ours failed"
        else:
            time = row["seconds"]
            spread = f"{seconds_text(time['p10'])} - {seconds_text(time['p90'])}"
            share = f"{copy['median'] / time['median']:.0%}" if copy else ""
            ratio = f"{row['ratio']['median']:.2f}x"
            error = f"{row['error']:.0e}" if row.get("error") is not None else ""
            rate = rate_text(record["amounts"], time["median"])
            yield (
                f"{label} {seconds_text(time['median']):>9} {spread:>19} {rate:>29} {share:>6} "
                f"{ratio:>7} {error:>8}"
            )


def _figure_lines(record: Mapping[str, Any]) -> Iterator[str]:
    if "absent" in record:
        yield f"  absent: {record['absent']}"
    if "failed" in record:
        yield f"  FAILED: {record['failed']}"
    for name, figure in record["figures"].items():
        yield f"  {name:<24} {figure['value']:>9.4g} {figure['unit']}"


def _medians(cases: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, str]]:
    """(value, unit) by (case, row); seconds for times."""
    found = {}
    for case, record in cases.items():
        for name, row in record.get("candidates", {}).items():
            if "seconds" in row:
                found[case, name] = (row["seconds"]["median"], "s")
        for name, figure in record.get("figures", {}).items():
            found[case, name] = (figure["value"], figure["unit"])
    return found


def comparison_lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Old and new side by side, for whatever both have."""
    before, after = _medians(old), _medians(new)
    yield f"{'new / old (below 1x = better now)':<66} {'old':>10} {'new':>10} {'ratio':>7}"
    for key, (value, unit) in after.items():
        if key not in before or before[key][1] != unit:
            continue
        previous = before[key][0]
        texts = [seconds_text(v) if unit == "s" else f"{v:.4g} {unit}" for v in (previous, value)]
        ratio = f"{value / previous:.2f}x" if previous > 0 else "-"
        yield f"{' '.join(key):<66} {texts[0]:>10} {texts[1]:>10} {ratio:>7}"
    missing = len(after.keys() - before.keys()), len(before.keys() - after.keys())
    if any(missing):
        yield f"only in the new run: {missing[0]}; only in the old one: {missing[1]}"
