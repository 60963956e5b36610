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
        pooled: a gradient that is the same at every cell gives the sum of the channels weighted by
            it, so that a pooled linear head is explained in closed form.
        source: the paper.
    """

    name: str
    reduction: str
    contrast: str
    needs_contrast: bool
    pooled: bool
    source: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "diff_grad_cam",
            "grad_cam",
            "log_odds",
            needs_contrast=True,
            pooled=True,
            source="arXiv 2506.08514",
        ),
        Method(
            "grad_cam",
            "grad_cam",
            "none",
            needs_contrast=False,
            pooled=True,
            source="arXiv 1610.02391",
        ),
        Method(
            "hires_cam",
            "hires_cam",
            "none",
            needs_contrast=False,
            pooled=True,
            source="arXiv 2011.08891",
        ),
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
