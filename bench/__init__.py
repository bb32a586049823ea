"""Benchmarks: `pytest bench/` measures, `python -m bench` reports and compares. docs/performance.md says how."""
