"""The Triton kernels: one file an operator, its kernels first, then the plan that launches them.

A plan is data (`Launch`), made from shapes and strides alone, so that what is compiled ahead of
time on a machine without a GPU is what runs on one. Triton is imported here; `ops` comes here only
when a kernel is called.
"""
