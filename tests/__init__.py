"""The tests, and modules that several of them share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
