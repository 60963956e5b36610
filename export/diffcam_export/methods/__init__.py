"""How each method of the CAM family is written into a graph, or why it is not."""

from collections.abc import Sequence

from diffcam_export.analysis import Found
from diffcam_export.methods.component import eigen_cam, no_gradient
from diffcam_export.methods.form import Explained, Form
from diffcam_export.methods.gradient import eigen_grad_cam, gradient_method
from diffcam_export.methods.pooled import ablation_cam, class_activation_map, recipro_cam
from diffcam_fast.explainer import wrong_head
from diffcam_fast.methods import METHODS, BroadCAM, EigenGradCAM, GradientMethod, Method, ReCAM
from diffcam_fast.methods.ablation import AblationCAM
from diffcam_fast.methods.activation import ClassActivationMap, EigenCAM
from diffcam_fast.methods.decom import DecomCAM
from diffcam_fast.methods.recipro import ReciproCAM
from diffcam_fast.methods.score import ScoreCAM

_FITTED = "its weights are fitted on labelled images, of which a graph has none"

FORMS: dict[type[Method], Form | str] = {
    GradientMethod: Form(gradient_method),
    EigenGradCAM: Form(eigen_grad_cam),
    ClassActivationMap: Form(class_activation_map),
    EigenCAM: Form(eigen_cam, no_gradient),
    ReciproCAM: Form(recipro_cam, elsewhere="a pass of the head for each cell", clipped=False),
    AblationCAM: Form(ablation_cam, elsewhere="a pass of the head for each channel"),
    ScoreCAM: "it takes a pass of the whole network for each channel of the layer",
    DecomCAM: "it takes ten passes of the whole network for each class",
    BroadCAM: _FITTED,
    ReCAM: _FITTED,
}
"""Of each kind of method what writes it, or the reason why a graph cannot have it."""


def form_of(method: Method) -> Form:
    """How a method is written.

    Raises:
        ValueError: it cannot be; the message says why, and what to do.
    """
    form = FORMS.get(type(method), "it is written for PyTorch alone")
    if isinstance(form, str):
        can = ", ".join(name for name, m in METHODS.items() if isinstance(FORMS[type(m)], Form))
        raise ValueError(
            f"{method.name} cannot be written into a graph: {form}. Take it in PyTorch, or export "
            f"another; there are {can}"
        )
    return form


def check_heads(method: Method, founds: Sequence[Found], layers: Sequence[str]) -> None:
    """Refuses a method where a head is none that it can be written for.

    Args:
        method: one that has a form.
        founds: of each layer.
        layers: their names, as the user knows them.

    Raises:
        ValueError: the message says why, and what to do.
    """
    elsewhere = form_of(method).elsewhere
    for found, layer in zip(founds, layers, strict=True):
        if found.weight is not None:
            continue
        if method.needs_pooled_head:
            raise wrong_head(method, layer, found.head, found.reason)
        if elsewhere:
            raise ValueError(
                f"{method.name} can be written into a graph for a pooled linear head only; behind "
                f"layer {layer!r} there is {found.head}: {found.reason}. It takes {elsewhere} "
                "there: take it in PyTorch, or export diff_grad_cam"
            )


__all__ = ["FORMS", "Explained", "Form", "check_heads", "form_of"]
