"""Benchmarks of diffcam-fast, run by `diffcam bench`: cost, peers, and networks that it explains.

No speed is printed before a parity gate has passed in the same run, and every row that is written
carries the machine, the versions and the commit.
"""
