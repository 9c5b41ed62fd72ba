"""Benchmarks of a checkout; see `python bench/run.py --help`. Not installed with the package."""
