"""Imports diffusers and open_clip with any build of torch, and in less time.

Both import torchvision, whose PyPI wheels are CUDA builds. With a CPU build of torch their compiled
part does not load, and `import torchvision` fails because two operators are missing, which nothing
here calls. Both libraries also import optional packages for features that are not used here:
`python -m benchmarks.startup --imports` times what that costs (docs/performance.md).
"""

import contextlib
import sys
from collections.abc import Iterator

import torch

COMPANIONS = ("scipy", "timm", "transformers", "wandb")


@contextlib.contextmanager
def lean_imports(library: str) -> Iterator[None]:
    """Hide the packages COMPANIONS while `library` is imported for the first time in the block.

    `library` then works without them; other code can import them after the block. Nothing is hidden
    if `library` was imported before, or if one of the packages was: a package that is just being
    imported, such as transformers, may need the others.
    """
    ensure_torchvision()
    there = any(name in sys.modules for name in (library, *COMPANIONS))
    hidden = [] if there else COMPANIONS
    sys.modules |= dict.fromkeys(hidden)  # None makes `import` report that there is no such module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def ensure_torchvision() -> None:
    """Make `import torchvision` work. A working one is not changed; repeated calls are safe.

    The two missing operators are declared but not implemented, so calling them still raises.

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
