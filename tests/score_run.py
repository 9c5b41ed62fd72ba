"""What tests/test_shared_scoring.py runs in several processes: commands one after the other.

Arguments: a JSON list of the arguments of each `fastalps-score`; "FAIL" among them makes scoring
fail in process 1 alone. Prints the exit codes of each process.
"""

from __future__ import annotations

import json
import os
import sys

from fastalps import distributed
from fastalps.cli import score
from fastalps.errors import UserError
from fastalps.scoring import Scorer


def fail(*_: object) -> None:
    raise UserError("the roof leaks")


if __name__ == "__main__":
    codes = []
    # Processes can join only once.
    with distributed.launched("cpu", "gloo"):
        for arguments in json.loads(sys.argv[1]):
            if "FAIL" in arguments and os.environ.get("RANK") == "1":
                Scorer.score_frames = fail
            codes.append(score.main([a for a in arguments if a != "FAIL"]))
    # In one write: lines of several processes must not mix.
    os.write(1, f"codes {os.environ.get('RANK', '0')} {codes}\n".encode())
