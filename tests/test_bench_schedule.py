"""`bench/schedule.py`: what it reads from a disassembly."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import schedule
from bench.cuda_compile import CannotCompile, disassembly
from bench.schedule import Stretch, instructions, spacing, stretches, with_products


def _line(place: int, text: str, cycles: int) -> list[str]:
    """As cuobjdump prints an instruction, whose upper word has the cycles at bits 41 to 44."""
    upper = cycles << 41 | 0x000FC00000000000 | 0x1234
    return [
        f"        /*{place:04x}*/                   {text} ;      /* 0x0123456789abcdef */",
        f"                                                   /* 0x{upper:016x} */",
    ]


CODE = [
    ("LDSM.16.M88.4 R12, [R94]", 4),
    ("@!P3 HMMA.16816.F32.BF16 R4, R12, R20, R4", 6),
    ("HMMA.16816.F32.BF16 R8, R12, R22, R8", 15),
    ("NOP", 9),
    ("@P1 BRA 0x0010", 5),
    ("HMMA.16816.F32.BF16 R8, R12, R22, R8", 6),
    ("BAR.SYNC.DEFER_BLOCKING 0x0", 5),
    ("STS [R2], R3", 1),
    ("EXIT", 5),
    ("NOP", 0),
]


def test_stretches_end_at_branches_their_targets_and_barriers() -> None:
    lines = [line for i, (text, cycles) in enumerate(CODE) for line in _line(16 * i, text, cycles)]
    code = list(instructions(["\t\tFunction : other", *lines, "\t\t........"]))
    assert [(each.text, each.cycles) for each in code] == CODE
    assert [each.name for each in code[:5]] == ["LDSM", "HMMA", "HMMA", "NOP", "BRA"]
    found = list(stretches(code))
    assert found == [
        Stretch(0x00, 0x00, 1, 0, 4, 0),  # The branch's target begins behind it.
        Stretch(0x10, 0x40, 4, 2, 35, 1),
        Stretch(0x50, 0x60, 2, 1, 11, 0),
        Stretch(0x70, 0x80, 2, 0, 6, 0),
        Stretch(0x90, 0x90, 1, 0, 0, 0),
    ]
    products = with_products(code)
    assert products == found[1:3]
    assert spacing(products) == 46 / 3
    assert spacing([]) == 0


def test_files_without_such_code_end_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "disassembly", lambda file: {("kernel", "sm_90"): []})
    assert schedule.main(["fused.o", "--kernel", "decode"]) == 2
    assert capsys.readouterr().err == (
        "error: fused.o: expected code for sm_90 with tensor-core products in a kernel named "
        "decode, found none\n"
    )

    with pytest.raises(CannotCompile) as reason:
        disassembly(Path(__file__))
    assert "\n" not in str(reason.value)
