import dataclasses

import numpy as np
import pytest

from evac_jax.errors import DataError
from evac_jax.evac import model_folders
from evac_jax.files import libero_facts, recordings
from evac_jax.tools.world_model import imagine_dataset
from tests.unit.tools import tiny_recording


@pytest.fixture(scope="module")
def imagined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagined")
    real = recordings.load(tiny_recording.write(folder / "real", count=6))
    model = model_folders.load_model(tiny_recording.write_model(folder / "model"), kind="EvacModel")
    data = imagine_dataset.write(model, real, folder / "out", steps=1, eta=0.0, seed=0)
    return folder, model, real, data


def test_imagined_episodes_keep_all_but_the_pictures(imagined):
    _, _, real, data = imagined
    assert sorted(data.start) == sorted(real.start)
    assert data.sources == ("imagined:expert",)
    for n, start in enumerate(data.start):
        other = int(np.flatnonzero(real.start == start)[0])
        steps = np.arange(real.length[other] + 1)
        mine, theirs = data.rows(n, steps), real.rows(other, steps)
        for name in ("actions", "poses", "success"):
            np.testing.assert_array_equal(getattr(data, name)[mine], getattr(real, name)[theirs])
        np.testing.assert_array_equal(data.frames[mine[0]], real.frames[theirs[0]])
        assert (data.frames[mine[1:]] != real.frames[theirs[1:]]).any()


def test_imagined_episodes_are_held_out_with_the_real_ones(imagined, tmp_path):
    _, model, real, _ = imagined
    real = dataclasses.replace(real, held_out=real.start % 2 == 1)  # as a recorder may say
    data = imagine_dataset.write(model, real, tmp_path / "out", steps=1, eta=0.0, seed=0)
    assert set(data.start[data.held_out]) == set(real.start[real.held_out])


def test_card_tells_how_it_was_sampled_and_from_which_libero(imagined, tmp_path):
    _, model, real, data = imagined
    assert data.card["sampling"] == {"steps": 1, "eta": 0.0}
    played = {"image_size": 32, "crop": [0.0, 1.0, 0.0, 1.0], "oversample": 2, "action_repeat": 2}
    libero = dataclasses.replace(real, card=real.card | {"libero": played})
    told = imagine_dataset.write(model, libero, tmp_path / "out", steps=1, eta=0.0, seed=0).card
    assert libero_facts.common([libero.card, told]) == played  # the two can be joined


def test_an_existing_folder_is_kept(imagined):
    folder, model, real, _ = imagined
    with pytest.raises(DataError, match="exists"):
        imagine_dataset.write(model, real, folder / "out", steps=1, eta=0.0, seed=0)
