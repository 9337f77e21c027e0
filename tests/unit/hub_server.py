"""A Hugging Face Hub on loopback with tiny repositories, for the library's own client.

It has the three things that a download asks for: the commit of a revision, the list of its files
with their hashes, and the files, by ranges too. Faults can be set for single files.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants, file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".ckpt", ".pth", ".bin", ".npy", ".safetensors")  # kept by Git LFS


@dataclass
class Repository:
    """Files of a repository, and what goes wrong with them.

    Attributes:
        gated: its files are refused until the user accepts its terms.
        cut: name -> bytes after which the connection breaks, once.
        missing: names that are listed, but not there.
        corrupt: names whose content is not what the list says.
    """

    files: dict[str, bytes]
    gated: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path) -> "Repository":
        files = [path for path in folder.rglob("*") if path.is_file()]
        return cls({str(path.relative_to(folder)): path.read_bytes() for path in files})

    def listing(self) -> list[dict]:
        entries = []
        for name, data in sorted(self.files.items()):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"type": "file", "path": name, "size": len(data), "oid": blob}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": etag(name, data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries


def etag(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def point_client_to(endpoint: str, cache: Path, monkeypatch) -> None:
    """Let the library of this process use a hub, as HF_ENDPOINT and HF_HOME do at its import."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    form = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", form)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


class HubServer:
    """Serves `repositories`: {"OWNER/NAME" or "datasets/OWNER/NAME": Repository}.

    Attributes:
        requests: "METHOD path" and the range asked for, in order.
    """

    def __init__(self, repositories: dict[str, Repository]):
        self.repositories, self.requests = repositories, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(hub):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):  # noqa: N802
                self._answer(body=False)

            def do_GET(self):  # noqa: N802
                self._answer(body=True)

            def _answer(self, *, body):
                path = unquote(self.path.partition("?")[0])
                hub.requests.append((self.command, path, self.headers.get("Range", "")))
                api = re.fullmatch(
                    r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path
                )
                file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                name = (api[1] or "") + api[2] if api else file[1] if file else ""
                repository = hub.repositories.get(name)
                if repository is None:
                    self._refuse(404, "RepoNotFound")
                elif api and api[4] not in (None, "main", "v1", COMMIT):
                    self._refuse(404, "RevisionNotFound")
                elif api and api[3] == "tree":
                    self._json(repository.listing())
                elif api:
                    siblings = [{"rfilename": name} for name in repository.files]
                    self._json({"id": api[2], "sha": COMMIT, "siblings": siblings})
                elif repository.gated:
                    self._refuse(403, "GatedRepo")
                elif file[3] in repository.missing or file[3] not in repository.files:
                    self._refuse(404, "EntryNotFound")
                else:
                    self._file(repository, file[3], body)

            def _refuse(self, status, code):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _json(self, value):
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _file(self, repository, name, body):
                data = repository.files[name]
                tag = etag(name, data)
                if name in repository.corrupt:
                    data = bytes(255 - byte for byte in data)
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                first = int(asked[1]) if asked else 0
                self.send_response(206 if asked else 200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{tag}"')
                self.send_header("Accept-Ranges", "bytes")
                if asked:
                    span = f"bytes {first}-{len(data) - 1}/{len(data)}"
                    self.send_header("Content-Range", span)
                self.send_header("Content-Length", str(len(data) - first))
                self.end_headers()
                if not body:
                    return
                cut = repository.cut.pop(name, None)
                self.wfile.write(data[first:] if cut is None else data[first:cut])
                if cut is not None:
                    self.close_connection = True

        return Handler
