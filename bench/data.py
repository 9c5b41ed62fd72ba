"""Where the programs of bench/ look for the data sets."""

from __future__ import annotations

import os
from pathlib import Path

# Beside the checkout, unless the variable names another folder.
_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = Path(os.environ.get("FASTALPS_DATA") or _BESIDE)
HELP = "folder of the data sets (default: FASTALPS_DATA, else ../shared/data)"
