"""Addresses on the Hugging Face Hub in the place of paths.

    hf://OWNER/NAME[@REVISION][/PATH]             a model repository, or a file or folder of it
    hf://datasets/OWNER/NAME[@REVISION][/PATH]    a dataset repository

`huggingface_hub` downloads into its cache (HF_HOME), shows progress, goes on where a connection
broke, and keeps a lock file for every file: where several processes or hosts share the cache, one
downloads a file and the others wait for it. It does not compare what came over plain HTTP with the
hash in the Hub's listing; this module does, once for every file. Its variables have their usual
meaning: HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT.
"""

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from evac_jax.errors import DataError

SCHEME = "hf://"
FORM = f"{SCHEME}OWNER/NAME[@REVISION][/PATH] or {SCHEME}datasets/OWNER/NAME[@REVISION][/PATH]"
_NAME = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(
    rf"{SCHEME}(?P<kind>datasets/)?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^/@]+))?"
    r"(?:/(?P<path>[^@]*))?"
)
_NO_OWNERS = ("datasets", "models", "spaces", "buckets", "kernels")
# Where the library keeps a commit of a repository, below its cache.
_IN_CACHE = re.compile(
    rf"(?P<cache>.*)/(?P<kind>model|dataset)s--(?P<owner>{_NAME}?)--(?P<name>{_NAME})"
    r"/snapshots/(?P<commit>[0-9a-f]{40})(?P<path>/.*)?"
)
SHOWN = 300  # characters of an error of the library
# Beside the snapshots of a repository: the hashes of files that were compared with the listing.
CHECKED_FILE = "checked_by_evac_jax.txt"


class Address(NamedTuple):
    """A repository, or a part of it.

    Attributes:
        kind: "model" or "dataset".
        repo: "OWNER/NAME".
        revision: branch, tag or commit; "" = the default branch.
        path: of a file or folder in it; "" = all of it.
    """

    kind: str
    repo: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        kind = "datasets/" if self.kind == "dataset" else ""
        revision = "@" + self.revision.replace("/", "%2F") if self.revision else ""
        return f"{SCHEME}{kind}{self.repo}{revision}" + f"/{self.path}" * bool(self.path)


def is_address(text: str) -> bool:
    """Whether a text is meant as an address rather than as a path."""
    return text.startswith(SCHEME)


def absolute(text: str) -> str:
    """Return an absolute path; an address stays as it is."""
    return text if is_address(text) else str(Path(text).absolute())


def parse(text: str) -> Address:
    """Return the parts of an address.

    Raises:
        DataError: it has not the form of one.
    """
    match = _ADDRESS.fullmatch(text)
    path = (match["path"] or "").strip("/") if match else ""
    if not match or match["repo"].split("/")[0] in _NO_OWNERS or ".." in path.split("/"):
        raise DataError(f"expected {FORM}, got {text!r}; write / in a revision as %2F")
    revision = (match["revision"] or "").replace("%2F", "/")
    return Address("dataset" if match["kind"] else "model", match["repo"], revision, path)


def address_of(path: str) -> str:
    """Return the address, with its commit, of a path in the library's cache; any other path as is.

    The inverse of `local`: it means the same on every host, whatever the cache's folder is there.
    """
    match = _IN_CACHE.fullmatch(path)
    if not match:
        return path
    from huggingface_hub import constants  # not needed where no path is in a cache

    if match["cache"] != str(Path(constants.HF_HUB_CACHE).expanduser().resolve()):
        return path
    repo = f"{match['owner']}/{match['name']}"
    return str(Address(match["kind"], repo, match["commit"], (match["path"] or "").strip("/")))


def home_of(path: Path) -> Path:
    """Return the folder that links within `path` may lead to: resolved `path` itself.

    In the library's cache it is the repository's, which keeps the content beside the snapshots.
    """
    folder = path.resolve()
    match = _IN_CACHE.fullmatch(str(folder))
    if match and is_address(address_of(str(folder))):
        return Path(str(folder)[: match.start("commit")]).parent
    return folder


def local(text: str) -> str:
    """Return the path of what an address names, downloaded if needed; any other text as it is.

    Raises:
        DataError: it has not the form of an address, cannot be had, or is damaged; says why.
    """
    if not is_address(text):
        return text
    address = parse(text)
    folder = _downloaded(address)
    path = folder / address.path
    if not path.exists():
        has = sorted({name.split("/")[0] for name in _names(address, folder)})
        raise DataError(
            f"{text}: the repository has no {address.path!r} at commit {folder.name}"
            + (f"; at its top it has {has}" if has else "")
        )
    _compare_hashes(address, folder)
    logging.info("%s -> %s", text, path)
    return str(path)


def _downloaded(address: Address) -> Path:
    """Return the folder of the snapshot, whose name is the commit."""
    # Only here: the import takes a third of a second, and most runs name no address.
    import huggingface_hub

    escaped = glob.escape(address.path)
    with _told(address):
        folder = huggingface_hub.snapshot_download(
            address.repo,
            repo_type=address.kind,
            revision=address.revision or None,
            allow_patterns=[escaped, f"{escaped}/*"] if escaped else None,
        )
    return Path(folder)


@contextlib.contextmanager
def _told(address: Address) -> Iterator[None]:
    """Turn the library's errors into one message each, which says what to do."""
    from huggingface_hub import constants, errors

    # Of the library's HTTP client, which is another package in other versions.
    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    page = f"{constants.ENDPOINT}/{'datasets/' * (address.kind == 'dataset')}{address.repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        why = (
            f"the repository is gated: accept its terms on {page}, then log in with `hf auth "
            "login` or set HF_TOKEN"
        )
        raise DataError(f"{address}: {why}") from error
    except errors.RepositoryNotFoundError as error:
        why = (
            f"no such {address.kind} repository at {page}, or it is private and this account may "
            f"not read it; check the name ({FORM}), or log in with `hf auth login`"
        )
        raise DataError(f"{address}: {why}") from error
    except errors.RevisionNotFoundError as error:
        why = f"the repository has no branch, tag or commit {address.revision!r}; {page} lists them"
        raise DataError(f"{address}: {why}") from error
    except errors.LocalEntryNotFoundError as error:
        raise DataError(f"{address}: {_not_cached(address)}") from error
    except (http_error, errors.EntryNotFoundError, OSError, ValueError) as error:
        why = f"the download failed ({type(error).__name__}: {_in_one_line(error)})"
        raise DataError(f"{address}: {why}; whole files are kept, start again to go on") from error


def _not_cached(address: Address) -> str:
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    kind = " --repo-type dataset" if address.kind == "dataset" else ""
    if constants.is_offline_mode():
        return (
            f"not, or not completely, in the cache {cache}, and HF_HUB_OFFLINE forbids downloads; "
            f"unset it, or run `hf download {address.repo}{kind}` where there is a network and "
            "copy the cache here"
        )
    return (
        f"{constants.ENDPOINT} cannot be reached, and the cache {cache} has not all of it; look at "
        "the network, HF_ENDPOINT and proxies, and start again"
    )


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:SHOWN] or "without a message"


def _listing(address: Address, folder: Path) -> list[Any]:
    """Return the Hub's list of a snapshot's files; [] if the cache came without it."""
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return huggingface_hub.get_cached_repo_tree(
            address.repo, repo_type=address.kind, revision=folder.name
        )
    except CachedRepoTreeNotFoundError:
        return []


def _names(address: Address, folder: Path) -> list[str]:
    return [file.path for file in _listing(address, folder)]


def _compare_hashes(address: Address, folder: Path) -> None:
    """Compare every file that is there and was not compared before with the listing.

    Raises:
        DataError: one differs; it is removed, so that the next start downloads it again.
    """
    record = folder.parents[1] / CHECKED_FILE
    done = set(record.read_text(errors="replace").split()) if record.is_file() else set()
    listing = _listing(address, folder)
    if not listing:
        logging.warning("%s: the cache has no list of hashes, so nothing is compared", address)
    compared = []
    for file in listing:
        expected, path = file.lfs.sha256 if file.lfs else file.blob_id, folder / file.path
        if expected in done or not path.is_file():
            continue
        if (found := _digest(path, is_lfs=bool(file.lfs))) != expected:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise DataError(
                f"{address}: {file.path} is damaged: its hash is {found}, the Hub's list says "
                f"{expected}. It was removed; start again to download it once more. If it stays "
                "so, look at the proxy or mirror in between (HF_ENDPOINT)"
            )
        compared.append(expected)
    if compared:
        with contextlib.suppress(OSError), record.open("a") as stream:  # a cache may be read-only
            stream.write("".join(f"{name}\n" for name in compared))


def _digest(path: Path, *, is_lfs: bool) -> str:
    """Return the SHA-256 of a large file, or git's own hash of a small one."""
    if is_lfs:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
