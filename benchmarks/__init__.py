"""What is timed, against what, and how: `pytest benchmarks/ --benchmark`."""
