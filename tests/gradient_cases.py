"""One node each: operator, what PyTorch calls it, inputs, attributes."""

import numpy as np
import torch
import torch.nn.functional as F

from gradient_checks import Case, ints, number

POSITIVE = np.random.default_rng(3).uniform(0.2, 3.0, size=(3, 4, 5)).astype(np.float32)
# Exactly at the kinks, and where exp would overflow.
KINKS = np.array([[-100.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 7.0, 100.0]], np.float32)
WEIGHT = np.random.default_rng(4).normal(size=(5, 7)).astype(np.float32)
WEIGHT64 = torch.from_numpy(WEIGHT).double()
VECTOR = np.random.default_rng(5).uniform(0.5, 2.0, size=4).astype(np.float32)
VECTOR64 = torch.from_numpy(VECTOR).double()
X = (3, 4, 5)

ELEMENTWISE = [
    Case("Identity", lambda x: x * 1, [X]),
    Case("Add", torch.add, [X, X], (0, 1)),
    Case("Add", torch.add, [X, (4, 1)], (0, 1)),
    Case("Sub", torch.sub, [(5,), X], (0, 1)),
    Case("Sub", torch.sub, [(3, 1, 5), (1, 4, 1)], (0, 1)),
    Case("Mul", torch.mul, [X, (1, 1, 5)], (0, 1)),
    Case("Mul", lambda x: x * VECTOR64[:, None], [X, VECTOR[:, None]]),
    Case("Div", torch.div, [X, POSITIVE[:1]], (0, 1)),
    Case("Div", lambda x: 2 / x, [number(2.0), POSITIVE], (1,)),
    Case("Sum", lambda a, b, c: a + b + c, [X, (5,), (4, 1)], (0, 1, 2)),
    Case("Mean", lambda a, b: (a + b) / 2, [X, (5,)], (0, 1)),
    Case("Pow", lambda x: x**2, [X, number(2.0)]),
    Case("Pow", lambda x: x**3, [X, ints(3)]),
    Case("Pow", lambda x: x**-0.5, [POSITIVE, number(-0.5)]),
    Case("Pow", torch.pow, [POSITIVE, (5,)], (0, 1)),
    Case("Max", torch.maximum, [X, (5,)], (0, 1)),
    Case("Max", lambda x: torch.maximum(x, x.new_zeros(())), [KINKS, number(0.0)]),
    Case("Min", torch.minimum, [KINKS, KINKS[:, ::-1].copy()], (0, 1)),
    Case("Where", lambda a, b: torch.where(torch.tensor(POSITIVE > 1), a, b),
         [POSITIVE > 1, X, (5,)], (1, 2)),
    Case("Neg", torch.neg, [X]),
    Case("Sqrt", torch.sqrt, [POSITIVE]),
    Case("Reciprocal", torch.reciprocal, [POSITIVE]),
    Case("Exp", torch.exp, [X]),
    Case("Log", torch.log, [POSITIVE]),
    Case("Abs", torch.abs, [KINKS]),
    Case("Sin", torch.sin, [X]),
    Case("Cos", torch.cos, [X]),
    Case("Erf", torch.erf, [X]),
    Case("Relu", F.relu, [KINKS]),
    Case("LeakyRelu", lambda x: F.leaky_relu(x, 0.2), [KINKS], attributes={"alpha": 0.2}),
    Case("ThresholdedRelu", lambda x: F.threshold(x, 0.5, 0.0), [KINKS],
         attributes={"alpha": 0.5}),
    Case("PRelu", lambda x: F.prelu(x, VECTOR64), [X, VECTOR[:, None]]),
    Case("Elu", lambda x: F.elu(x, 0.7), [KINKS], attributes={"alpha": 0.7}),
    Case("Selu", F.selu, [KINKS]),
    Case("Celu", lambda x: F.celu(x, 0.7), [KINKS], attributes={"alpha": 0.7}),
    Case("Clip", F.relu6, [KINKS, number(0.0), number(6.0)]),
    Case("Clip", lambda x: x.clamp(-1, 3), [KINKS, number(-1.0), number(3.0)]),
    Case("Clip", lambda x: x.clamp(max=3), [KINKS, None, number(3.0)]),
    Case("Clip", lambda x: x.clamp(min=-1), [KINKS, number(-1.0)]),
    Case("Sigmoid", torch.sigmoid, [KINKS]),
    Case("HardSigmoid", F.hardsigmoid, [KINKS], attributes={"alpha": 1 / 6}),
    Case("HardSwish", F.hardswish, [KINKS]),
    Case("Tanh", torch.tanh, [X]),
    Case("Softplus", F.softplus, [X]),
    Case("Softsign", F.softsign, [KINKS]),
    Case("Mish", F.mish, [KINKS]),
    Case("Gelu", F.gelu, [X], opset=20),
    Case("Gelu", lambda x: F.gelu(x, approximate="tanh"), [X],
         attributes={"approximate": "tanh"}, opset=20),
    Case("Swish", lambda x: x * torch.sigmoid(0.7 * x), [X], attributes={"alpha": 0.7}, opset=24),
    Case("Softmax", lambda x: x.softmax(1), [X], attributes={"axis": 1}),
    Case("Softmax", lambda x: x.softmax(-1), [X]),
    Case("LogSoftmax", lambda x: x.log_softmax(1), [X], attributes={"axis": 1}),
]  # fmt: skip

LINEAR = [
    Case("Gemm", lambda x: 0.5 * x @ WEIGHT64, [(3, 5), WEIGHT], attributes={"alpha": 0.5}),
    Case("Gemm", lambda x: x @ WEIGHT64.T, [(3, 7), WEIGHT], attributes={"transB": 1}),
    *(
        Case("Gemm", lambda a, b, c, ta=ta, tb=tb: 0.3 * (a.T if ta else a) @ (b.T if tb else b)
             + 2 * c, [(5, 3) if ta else (3, 5), (4, 5) if tb else (5, 4), (4,)], (0, 1, 2),
             {"transA": ta, "transB": tb, "alpha": 0.3, "beta": 2.0})
        for ta in (0, 1) for tb in (0, 1)
    ),
    Case("MatMul", torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 2)], (0, 1)),
    Case("MatMul", torch.matmul, [(2, 1, 4, 5), (3, 5, 2)], (0, 1)),
    Case("MatMul", torch.matmul, [(4, 3, 5), (5, 2)], (0, 1)),
    Case("MatMul", lambda x: x @ WEIGHT64, [(2, 3, 5), WEIGHT]),
    Case("MatMul", torch.matmul, [(5,), (3, 5, 2)], (0, 1)),
    Case("MatMul", torch.matmul, [(3, 4, 5), (5,)], (0, 1)),
    Case("MatMul", torch.matmul, [(5,), (5,)], (0, 1)),
    Case("Einsum", lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b),
         [(2, 3, 4, 5), (2, 3, 2, 5)], (0, 1), {"equation": "bhid, bhjd -> bhij"}),
    Case("Einsum", lambda a: torch.einsum("abc->cab", a), [X], (0,), {"equation": "abc->cab"}),
]  # fmt: skip

NORMALISATION = [
    Case("BatchNormalization",
         lambda x: F.batch_norm(x, -VECTOR64, VECTOR64, VECTOR64, VECTOR64, eps=1e-3),
         [(3, 4, 2, 3), VECTOR, VECTOR, -VECTOR, VECTOR], attributes={"epsilon": 1e-3}),
    Case("LayerNormalization", lambda x: F.layer_norm(x, (4,), VECTOR64, VECTOR64),
         [(3, 5, 4), VECTOR, VECTOR]),
    Case("LayerNormalization", lambda x: F.layer_norm(x, (2, 4), VECTOR64.expand(2, 4)),
         [(3, 2, 4), np.tile(VECTOR, (2, 1))], attributes={"axis": 1}),
    Case("InstanceNormalization", lambda x: F.instance_norm(x, None, None, VECTOR64, VECTOR64),
         [(3, 4, 2, 5), VECTOR, VECTOR]),
    Case("GroupNormalization", lambda x: F.group_norm(x, 2, VECTOR64, VECTOR64),
         [(3, 4, 2, 5), VECTOR, VECTOR], attributes={"num_groups": 2}, opset=21),
    Case("LpNormalization", lambda x: F.normalize(x, dim=1), [X], attributes={"axis": 1}),
    Case("LpNormalization", lambda x: F.normalize(x, p=1, dim=-1), [X], attributes={"p": 1}),
    Case("RMSNormalization", lambda x: F.rms_norm(x, (4,), VECTOR64, 1e-5),
         [(3, 5, 4), VECTOR], opset=23),
    *(
        Case("LRN", lambda x, n=n: F.local_response_norm(x, n, 0.3, 0.8, 1.5), [(2, 7, 3, 2)],
             attributes={"size": n, "alpha": 0.3, "beta": 0.8, "bias": 1.5})
        for n in (3, 5)
    ),
]  # fmt: skip

TIED = np.array([[[1, 3, 3], [2, 0, 2]], [[5, 5, 5], [0, 1, 0]]], np.float32)
REDUCTION = [
    Case("ReduceMean", lambda x: x.mean((1, 2)), [X, ints(1, -1)], attributes={"keepdims": 0}),
    Case("ReduceMean", lambda x: x.mean(0, keepdim=True), [X, ints(0)]),
    Case("ReduceMean", lambda x: x.mean(), [X], attributes={"keepdims": 0}),
    Case("ReduceMean", lambda x: x * 1, [X], attributes={"noop_with_empty_axes": 1}),
    Case("ReduceSum", lambda x: x.sum(1), [X, ints(1)], attributes={"keepdims": 0}),
    Case("ReduceMax", lambda x: x.amax(2), [TIED, ints(2)], attributes={"keepdims": 0}),
    Case("ReduceMin", lambda x: x.amin((1, 2), keepdim=True), [TIED, ints(1, 2)]),
    Case("ReduceL1", lambda x: x.abs().sum(1), [TIED, ints(1)], attributes={"keepdims": 0}),
    Case("ReduceL2", lambda x: x.norm(dim=1), [TIED, ints(1)], attributes={"keepdims": 0}),
    Case("ReduceSumSquare", lambda x: (x * x).sum((0, 1)), [X, ints(0, 1)],
         attributes={"keepdims": 0}),
    Case("ReduceLogSumExp", lambda x: x.logsumexp(1), [X, ints(1)], attributes={"keepdims": 0}),
    Case("ReduceLogSum", lambda x: x.sum(1).log(), [POSITIVE, ints(1)],
         attributes={"keepdims": 0}),
]  # fmt: skip

SHAPES = [
    Case("Reshape", lambda x: x.reshape(3, -1), [X, ints(0, -1)]),
    Case("Flatten", lambda x: x.reshape(12, 5), [X], attributes={"axis": 2}),
    Case("Squeeze", lambda x: x[:, 0], [(3, 1, 5), ints(1)]),
    Case("Unsqueeze", lambda x: x[:, None, ..., None], [X, ints(1, -1)]),
    Case("Transpose", lambda x: x.permute(2, 0, 1), [X], attributes={"perm": [2, 0, 1]}),
    Case("Transpose", lambda x: x.permute(2, 1, 0), [X]),
    Case("Expand", lambda x: x.expand(2, 3, 4, 5), [(3, 1, 5), ints(2, 1, 4, 1)]),
    Case("Tile", lambda x: x.tile(2, 1, 3), [X, ints(2, 1, 3)]),
    Case("Concat", lambda a, b: torch.cat([a, b], 1), [X, (3, 2, 5)], (0, 1), {"axis": 1}),
    Case("Concat", lambda b: torch.cat([VECTOR64[None], b]), [VECTOR[None], (2, 4)], (1,),
         {"axis": 0}),
    Case("Split", lambda x: x.split((1, 3), 1)[0], [X, ints(1, 3)], (0,), {"axis": 1}, 2),
    Case("Trilu", torch.tril, [X], attributes={"upper": 0}),
    Case("SpaceToDepth", lambda x: F.pixel_unshuffle(x, 2), [(2, 1, 4, 6)],
         attributes={"blocksize": 2}),
    Case("DepthToSpace", lambda x: F.pixel_shuffle(x, 2), [(2, 12, 3, 2)],
         attributes={"blocksize": 2, "mode": "CRD"}),
    Case("DepthToSpace",
         lambda x: x.reshape(2, 2, 2, 3, 3, 2).permute(0, 3, 4, 1, 5, 2).reshape(2, 3, 6, 4),
         [(2, 12, 3, 2)], attributes={"blocksize": 2}),
    Case("Pad", lambda x: F.pad(x, (1, 2, 0, 3)), [X, ints(0, 0, 1, 0, 3, 2)]),
    Case("Pad", lambda x: F.pad(x, (-1, 2), value=7.0), [X, ints(-1, 2), number(7.0), ints(-1)]),
    Case("Gather", lambda x: x[:, 2], [X, np.array(2)], attributes={"axis": 1}),
    Case("Gather", lambda x: x[..., [0]], [X, ints(0)], attributes={"axis": -1}),
    Case("Gather", lambda x: x[:, [3, 0]], [X, ints(-1, 0)], attributes={"axis": 1}),
    Case("Gather", lambda x: x[:, [[3, 0], [3, 1]]], [X, ints(3, 0, 3, 1).reshape(2, 2)],
         attributes={"axis": 1}),
    Case("GatherElements", lambda x: x.gather(1, torch.ones(3, 2, 5, dtype=torch.long)),
         [X, np.ones((3, 2, 5), np.int64)], attributes={"axis": 1}),
    Case("GatherND", lambda x: x[[0, 2, 0], [1, 1, 1]], [X, ints(0, 1, 2, 1, 0, 1).reshape(3, 2)]),
]  # fmt: skip

POOLING = [
    Case("GlobalAveragePool", lambda x: x.mean((2, 3), keepdim=True), [(3, 4, 5, 2)]),
    Case("GlobalMaxPool", lambda x: F.adaptive_max_pool2d(x, 1), [(3, 4, 5, 2)]),
    Case("AveragePool", lambda x: F.avg_pool2d(x, (5, 2)), [(3, 4, 5, 2)],
         attributes={"kernel_shape": [5, 2], "strides": [5, 2]}),
    Case("AveragePool", lambda x: F.avg_pool2d(x, 2), [(3, 4, 6, 4)],
         attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("AveragePool", lambda x: F.avg_pool1d(x, 3, 2, 1), [(3, 4, 6)],
         attributes={"kernel_shape": [3], "strides": [2], "pads": [1, 1], "count_include_pad": 1}),
    Case("MaxPool", lambda x: F.max_pool1d(x, 3, 2), [(3, 4, 6)],
         attributes={"kernel_shape": [3], "strides": [2]}),
    Case("MaxPool", lambda x: F.max_pool2d(x, 2, 1), [np.ones((2, 2, 3, 4), np.float32)],
         attributes={"kernel_shape": [2, 2]}),
]  # fmt: skip

CASES = [*ELEMENTWISE, *LINEAR, *NORMALISATION, *REDUCTION, *SHAPES, *POOLING]
