import subprocess
import sys

import pytest

from evac_jax.evac.lean_imports import ensure_torchvision


def test_torchvision_imports_when_asked_for_twice():
    ensure_torchvision()
    first = sys.modules["torchvision"]
    ensure_torchvision()
    assert sys.modules["torchvision"] is first  # its operators cannot be declared twice
    assert callable(first.transforms.Compose)


@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_companions_are_left_out_only_when_nobody_imported_the_libraries_before(eager):
    code = "import sys; from evac_jax.evac import lean_imports; lean_imports.ensure_torchvision(); "
    code += "import diffusers, open_clip; " if eager else ""
    code += "import evac_jax.evac.model; print('timm' in sys.modules); import timm, scipy"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(eager)
