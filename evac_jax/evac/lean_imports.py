"""Imports diffusers and open_clip: beside any build of torch, and in a third of the time.

Both import torchvision, whose PyPI wheels are CUDA builds: beside a CPU torch their compiled part
does not load, and `import torchvision` dies for want of two operators that nothing here calls. And
both look for optional companions of features that are not used here, which took 3.6 of the 5.3 s
that a simulator spent on imports.
"""

import contextlib
import sys
from collections.abc import Iterator

import torch

COMPANIONS = ("scipy", "timm", "transformers", "wandb")


@contextlib.contextmanager
def lean_imports(library: str) -> Iterator[None]:
    """Let `library`, imported within for the first time, find COMPANIONS missing.

    It goes on without them for good; afterwards everyone else may import them. Nothing is hidden
    from a library that has looked before, nor where a companion is there already: it may be in
    the midst of needing the others, as transformers is.
    """
    ensure_torchvision()
    there = any(name in sys.modules for name in (library, *COMPANIONS))
    hidden = [] if there else COMPANIONS
    sys.modules |= dict.fromkeys(hidden)  # None: `import` says that there is no such module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def ensure_torchvision() -> None:
    """Make `import torchvision` work; a working one is left alone, repeated calls are safe.

    Declares the two missing operators without implementing them, so calling them still raises.

    Raises:
        RuntimeError: if torchvision is broken in another way.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    for op in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    import torchvision  # noqa: F401, F811
