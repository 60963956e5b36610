"""Whether maps can be fooled: networks trained to show a hoax while they decide as before.

SHAM-style, after the idea of Salience-Hoax Activation Maps (arXiv 2506.08514) and the passive
fooling of Heo et al. (NeurIPS 2019). It is this project's study: not the authors' benchmark, and
none of its numbers are the paper's.
"""
