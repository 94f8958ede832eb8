"""Benchmarks, run by hand: `bash launch/bench.sh`, or `python -m tests.benchmarks --help`."""
