"""Side-by-side benchmarks of waggle: `python -m bench`. README.md in this folder says how the figures are obtained."""
