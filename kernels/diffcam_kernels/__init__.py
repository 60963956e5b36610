"""The operators of diffcam-fast: definitions, custom ops, and the kernels behind them.

`reference` holds the normative definition of every operator in plain PyTorch, float64-capable.
`ops` registers each one as `torch.ops.diffcam.*` and dispatches by device. Symbols, everywhere in
the project:

    N images, T targets an image, K classes, C channels, h x w cells of the target layer, P = h w
    A (N, C, h, w) activations, G (N, T, C, h, w) gradient of the score S in A, z (N, K) logits
"""
