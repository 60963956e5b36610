"""The table of rules, and the errors that name what is not in it."""

import ast
from collections.abc import Callable, Sequence

import onnx_ir as ir

from diffcam_export.emit import Emitter

Rule = Callable[
    [ir.Node, Sequence[ir.Value | None], Sequence[bool], Emitter], Sequence[ir.Value | None]
]
"""`(node, grads, wanted, emit)`: grads, the cotangent of each output, None where nothing reads it;
wanted, for each input, whether its cotangent is asked for. Returned: one cotangent for each input,
of its shape and element type, None where not wanted."""

FirstRule = Callable[[ir.Node, ir.Value, Emitter], ir.Value]
"""`(node, grad, emit)`: the cotangent of the first input, given that of the first output."""

RULES: dict[str, Rule] = {}

NO_GRADIENT = frozenset(
    {
        *("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "OneHot", "Range", "EyeLike"),
        *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsInf", "IsNaN"),
        *("And", "Or", "Xor", "Not", "ConstantOfShape", "Bernoulli", "RandomNormalLike"),
        *("RandomUniformLike", "Floor", "Ceil", "Round", "Sign"),
    }
)
"""Operators whose derivative is zero, or whose result is no number: paths end there."""


class MissingRuleError(ValueError):
    """The gradient has to pass a node that it cannot pass; the message names it."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Enters the decorated function as the rule of one or more operators."""

    def enter(function: Rule) -> Rule:
        for operator in operators:
            assert operator not in RULES, operator
            RULES[operator] = function
        return function

    return enter


def first_rule(*operators: str) -> Callable[[FirstRule], FirstRule]:
    """Enters a rule for operators through whose first input and first output alone gradients
    pass; the rest are parameters.
    """

    def enter(function: FirstRule) -> FirstRule:
        def whole(
            node: ir.Node,
            grads: Sequence[ir.Value | None],
            wanted: Sequence[bool],
            emit: Emitter,
        ) -> list[ir.Value | None]:
            refuse_beyond_first(node, grads, wanted)
            assert grads[0] is not None
            return [function(node, grads[0], emit), *[None] * (len(wanted) - 1)]

        rule(*operators)(whole)
        return function

    return enter


def refuse_beyond_first(
    node: ir.Node, grads: Sequence[ir.Value | None], wanted: Sequence[bool]
) -> None:
    """Raises where a gradient is asked for that only the first input and output are ready for."""
    for index, asked in enumerate(wanted):
        if index and asked:
            raise refusal(node, f"its input {index} depends on the layer too")
    for index, grad in enumerate(grads):
        if index and grad is not None:
            raise refusal(node, f"its output {index} is used too")


def refusal(node: ir.Node, reason: str) -> MissingRuleError:
    """The error for a node that a gradient cannot pass."""
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
    tensors = ", ".join(repr(value.name) for value in node.outputs if value.name)
    return MissingRuleError(
        f"no gradient through {domain}{node.op_type} (node {node.name!r}, tensor {tensors}"
        f"{_origin(node)}): {reason}. Choose a layer behind it."
    )


def _origin(node: ir.Node) -> str:
    """The PyTorch module that the node was exported from, in words, where the file says so."""
    scopes = _listed(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
    classes = _listed(node.metadata_props.get("pkg.torch.onnx.class_hierarchy"))
    # The last entry is the operator itself.
    if len(scopes) > 1 and scopes[-2]:
        kind = f" ({classes[-2].rpartition('.')[2]})" if len(classes) == len(scopes) else ""
        return f", from module {scopes[-2]!r}{kind}"
    namespace = node.metadata_props.get("namespace")
    return f", from {namespace!r}" if namespace else ""


def _listed(text: str | None) -> list[str]:
    try:
        found = ast.literal_eval(text or "[]")
    except (ValueError, SyntaxError):
        return []
    return [str(part) for part in found] if isinstance(found, list) else []
