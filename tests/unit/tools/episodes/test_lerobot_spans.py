import pytest

from evac_jax.errors import DataError
from evac_jax.tools.episodes.lerobot_spans import Span, separate


def separated(folder, videos, *places):
    """The files of episodes that are told as (file, begin, end), where `videos` files are."""
    for n in range(videos):
        (folder / f"{n}.mp4").touch()
    spans = [
        Span(n, {"chunk_index": 0, "file_index": file}, begin, end)
        for n, (file, begin, end) in enumerate(places)
    ]
    separate(spans, folder, "{file_index}.mp4".format_map)
    return [span.file["file_index"] for span in spans]


@pytest.mark.parametrize(
    ("places", "files"),
    [
        ([(0, 0, 5), (0, 5, 12), (1, 0, 9)], [0, 0, 1]),
        ([(0, 0, 5), (0, 4, 12)], [0, 0]),  # times that are rounded
        ([(0, 0, 5), (0, 5, 12), (0, 0, 9)], [0, 0, 1]),
        ([(0, 0, 5), (0, 5, 12), (0, 0, 9), (0, 9, 13)], [0, 0, 1, 1]),
        ([(0, 0, 5), (0, 0, 9), (1, 9, 13)], [0, 1, 1]),
        ([(0, 0, 5), (1, 5, 12), (1, 0, 9), (1, 9, 13)], [0, 0, 1, 1]),
    ],
)
def test_only_episodes_in_the_frames_of_another_one_move_to_the_file_beside_it(
    tmp_path, places, files
):
    assert separated(tmp_path, 2, *places) == files


@pytest.mark.parametrize(
    ("videos", "places", "ways"),
    [
        (1, [(0, 0, 5), (0, 0, 7)], "[]"),  # there is no other file
        (2, [(0, 0, 5), (0, 0, 7), (1, 0, 9)], "[]"),  # the other file's frames are taken
        (3, [(1, 0, 5), (1, 0, 7)], "['0.mp4', '2.mp4']"),
    ],
)
def test_episodes_in_the_same_frames_are_refused_when_not_one_of_them_must_move(
    tmp_path, videos, places, ways
):
    with pytest.raises(DataError) as error:
        separated(tmp_path, videos, *places)
    file = places[0][0]
    assert f"episode 0 into frames 0..4 of {file}.mp4, episode 1 into 0..6" in str(error.value)
    assert str(error.value).endswith(f"could hold one are {ways}")
