import json

import numpy as np
import pytest


@pytest.fixture
def camera(tmp_path):
    path = tmp_path / "camera.json"
    intrinsic = [[[32, 0, 16], [0, 32, 16], [0, 0, 1]]]
    path.write_text(
        json.dumps({"intrinsic": intrinsic, "c2w": [np.eye(4).tolist()], "size": [32, 32]})
    )
    return path
