"""Benchmarks, one command per topic. Competitors run in turn, and results are committed in results/."""
