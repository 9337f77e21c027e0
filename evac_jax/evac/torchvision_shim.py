"""Lets diffusers and open_clip import beside a CPU build of torch.

Both import torchvision, whose PyPI wheels are CUDA builds: beside a CPU torch their compiled part
does not load, and `import torchvision` dies for want of two operators that nothing here calls.
"""

import sys

import torch


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
