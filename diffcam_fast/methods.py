"""The methods: each a reduction of activations and gradients to a map, and the contrast it takes by
default.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A method of the CAM family.

    Attributes:
        name: the name in the API and on the command line.
        reduction: key of `diffcam_kernels.reference.REDUCTIONS`.
        contrast: name of the default contrast.
        needs_contrast: the method is defined by its contrast, and `none` is refused.
        source: the paper.
    """

    name: str
    reduction: str
    contrast: str
    needs_contrast: bool
    source: str


# On a pooled linear head the gradient is the same at every cell, so that both reductions are the
# one closed form.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("diff_grad_cam", "grad_cam", "log_odds", True, "arXiv 2506.08514"),
        Method("grad_cam", "grad_cam", "none", False, "arXiv 1610.02391"),
        Method("hires_cam", "hires_cam", "none", False, "arXiv 2011.08891"),
    )
}


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
