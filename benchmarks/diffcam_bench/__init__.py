"""Benchmarks of diffcam-fast, run by `diffcam bench`: what it costs, against whom, and which networks it explains.

A benchmark prints no speed before its parity gate has passed in the same run, and every row that it writes carries the
machine, the versions and the commit.
"""
