"""The parts of tools/benchmark.py. What is measured runs as a process of its own: `python -m benchmarks.<name>`."""
