"""Addresses on the Hugging Face Hub, against a hub on loopback and the library's own client."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants

from evac_jax.config import hub
from evac_jax.errors import DataError
from tests.unit.hub_server import COMMIT, HubServer, Repository, point_client_to

POLICY = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 64, "sub/a.txt": b"a"}


@pytest.fixture
def repositories():
    return {
        "me/policy": Repository(dict(POLICY)),
        "datasets/me/data": Repository({"starts/0.npy": b"frame"}),
    }


@pytest.fixture
def server(repositories, tmp_path, monkeypatch):
    server = HubServer(repositories)
    point_client_to(server.endpoint, tmp_path / "cache", monkeypatch)
    yield server
    server.close()


def told(text: str) -> str:
    with pytest.raises(DataError) as error:
        hub.local(text)
    return str(error.value)


def gets(server) -> list[str]:
    return [path for method, path, _ in server.requests if method == "GET"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://me/policy", ("model", "me/policy", "", "")),
        ("hf://me/policy@v1/sub/a.txt", ("model", "me/policy", "v1", "sub/a.txt")),
        ("hf://datasets/me/data@refs%2Fpr%2F1", ("dataset", "me/data", "refs/pr/1", "")),
        ("hf://datasets/me/data/starts", ("dataset", "me/data", "", "starts")),
    ],
)
def test_address_is_read_and_written(text, parts):
    assert hub.parse(text) == parts
    assert str(hub.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["hf://me", "hf://datasets/me", "hf://spaces/me/it", "hf://me/it/../../x", "hf://a/b@"]
)
def test_what_has_not_the_form_of_an_address_is_refused(text):
    with pytest.raises(DataError, match=r"expected hf://OWNER/NAME"):
        hub.parse(text)


def test_repository_is_downloaded_once_and_named_with_its_commit(server):
    path = hub.local("hf://me/policy@v1")
    assert path.endswith(f"snapshots/{COMMIT}")
    for name, data in POLICY.items():
        assert (hub.Path(path) / name).read_bytes() == data
    assert hub.address_of(path) == f"hf://me/policy@{COMMIT}"
    server.requests.clear()
    assert hub.local(f"hf://me/policy@{COMMIT}") == path
    assert not server.requests


def test_one_downloads_and_the_others_wait_when_they_share_the_cache(server):
    with ThreadPoolExecutor(4) as hosts:
        paths = set(hosts.map(hub.local, ["hf://me/policy/model.safetensors"] * 4))
    assert len(paths) == 1
    assert sum(path.endswith("model.safetensors") for path in gets(server)) == 1


def test_only_the_part_that_is_named_is_downloaded(server):
    path = hub.local("hf://me/policy/sub")
    assert path.endswith(f"{COMMIT}/sub")
    assert hub.address_of(path) == f"hf://me/policy@{COMMIT}/sub"
    assert not [path for path in gets(server) if path.endswith("model.safetensors")]
    assert hub.local("hf://datasets/me/data/starts/0.npy").endswith("starts/0.npy")


def test_paths_outside_of_the_cache_have_no_address(server, tmp_path):
    elsewhere = f"{tmp_path}/other/models--me--policy/snapshots/{COMMIT}/sub"
    for path in ("", "weights", elsewhere):
        assert hub.address_of(path) == path
        assert hub.local(path) == path


def test_download_goes_on_where_the_connection_broke(server, repositories, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept: whole chunks
    data = POLICY["model.safetensors"]
    repositories["me/policy"].cut["model.safetensors"] = 5000
    path = hub.local("hf://me/policy/model.safetensors")
    assert hub.Path(path).read_bytes() == data
    ranges = [r for method, path, r in server.requests if method == "GET" and "resolve" in path]
    assert ranges == ["", "bytes=5000-"]


def test_file_with_another_hash_is_refused_and_removed(server, repositories):
    repositories["me/policy"].corrupt.add("model.safetensors")
    message = told("hf://me/policy")
    assert "model.safetensors is damaged" in message
    assert "start again" in message
    repositories["me/policy"].corrupt.clear()
    path = hub.local("hf://me/policy")
    assert (hub.Path(path) / "model.safetensors").read_bytes() == POLICY["model.safetensors"]


def test_small_file_with_another_hash_is_refused(server, repositories):
    repositories["me/policy"].corrupt.add("config.json")
    assert "config.json is damaged" in told("hf://me/policy")


def test_file_is_hashed_once(server, monkeypatch):
    hub.local("hf://me/policy")
    monkeypatch.setattr(hub, "_digest", lambda *_, **__: pytest.fail("hashed again"))
    hub.local("hf://me/policy")


def test_each_failure_says_what_to_do(server, repositories):
    repositories["me/gated"] = Repository({"config.json": b"{}"}, gated=True)
    repositories["me/holes"] = Repository({"a.bin": b"a"}, missing={"a.bin"})
    told_of = {
        "hf://me/gated": ("accept its terms on http://127", "hf auth login"),
        "hf://me/none": ("no such model repository", "or it is private", "hf auth login"),
        "hf://datasets/me/policy": ("no such dataset repository",),
        "hf://me/policy@v9": ("no branch, tag or commit 'v9'",),
        "hf://me/policy/nothing": ("has no 'nothing' at commit", "'sub'"),
        "hf://me/holes": ("the download failed", "a.bin", "start again"),
    }
    for address, texts in told_of.items():
        message = told(address)
        for text in texts:
            assert text in message, message
        assert "\n" not in message


def test_variables_of_the_library_are_heeded(server, repository, tmp_path):
    code = "from evac_jax.config import hub; print(hub.local('hf://me/policy'))"
    more = {"HF_ENDPOINT": server.endpoint, "HF_HOME": f"{tmp_path}/home"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    snapshot = f"{tmp_path}/home/hub/models--me--policy/snapshots/{COMMIT}"
    assert done.stdout.strip() == snapshot, done.stderr
    assert "Fetching 3 files" in done.stderr  # how far it is


def test_cache_serves_alone_when_offline(server, monkeypatch):
    path = hub.local("hf://me/policy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.local("hf://me/policy") == path
    message = told("hf://datasets/me/data")
    for text in ("HF_HUB_OFFLINE", "hf download me/data --repo-type dataset", "cache"):
        assert text in message, message


def test_hub_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    point_client_to("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert "http://127.0.0.1:9 cannot be reached" in told("hf://me/policy")


def test_damaged_list_of_compared_files_is_passed_over(server):
    folder = Path(hub.local("hf://me/policy"))
    record = folder.parents[1] / hub.CHECKED_FILE
    record.write_bytes(b"\xff\n" + record.read_bytes())
    assert Path(hub.local("hf://me/policy")) == folder
