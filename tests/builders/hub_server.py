"""A Hugging Face Hub on this machine: the routes that the library calls for models, as it calls them; nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@lru_cache(maxsize=256)
def blob_id(content: bytes) -> str:
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str = "", branch: str = "main") -> str:
        """All files of the branch and these."""
        files = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        self.messages.append(message)
        listing = "".join(f"{path} {blob_id(content)}" for path, content in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class HubServer(ThreadingHTTPServer):
    """A hub.

    Attributes:
        repositories: by owner/name.
        requests: as (method, path).
        tokens: that were sent.
        readers: tokens that may read private repositories; None for all.
        instead: (method, part of path) -> what is answered instead.
        ranges: whether parts of files are given.
        sent: of files, as (path, first byte, byte after the last one).
        statuses: of the next answers to requests for a range, instead.
        breaks: how many bytes the next answers with a range have, before they break off.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.readers: set[str] | None = None
        self.instead: dict[tuple[str, str], tuple[int, dict[str, str], str]] = {}
        self.ranges = True
        self.sent: list[tuple[str, int, int]] = []
        self.statuses: list[int] = []
        self.breaks: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def repository(self, name: str, files: dict[str, bytes], **settings: Any) -> str:
        """Add one with these files; returns the commit."""
        self.repositories[name] = Repository(**settings)
        return self.repositories[name].commit({".gitattributes": b"", **files})


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def empty_cache(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Another cache of the library's, and a user who is not logged in."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(name, raising=False)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache.with_name("token")))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@contextmanager
def served_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine in place of the library's, with an empty cache."""
    from huggingface_hub import constants

    empty_cache(cache, patch)
    with running_hub() as server:
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits 40 ms for its header to be acknowledged
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_POST = do_HEAD = do_GET  # noqa: N815

    def _route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.token:
            self.server.tokens.add(self.token)
        for (method, part), answer in self.server.instead.items():
            if method == self.command and part in path:
                return self._answer(*answer)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(self.body))
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._of(f"{parts[2]}/{parts[3]}", parts[4:] or ["revision", "main"])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._of(f"{parts[0]}/{parts[1]}", parts[2:])
        return self._answer(404, {}, f"the stand-in has no route {self.command} {path}")

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        private = wanted.get("private") or wanted.get("visibility") == "private"
        if name in self.server.repositories:
            return self._json({"url": f"{self.server.url}/{name}", "error": "You already created this repo"}, 409)
        self.server.repository(name, {}, private=bool(private))
        return self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _of(self, name: str, rest: list[str]) -> None:
        found = self.server.repositories.get(name)
        may_read = self.server.readers is None or self.token in self.server.readers
        if found is None or (found.private and not may_read):
            return self._answer(
                401 if not self.token else 404, {"X-Error-Code": "RepoNotFound"}, "Repository not found"
            )
        if found.gated:
            return self._answer(403, {"X-Error-Code": "GatedRepo"}, f"Access to model {name} is restricted")
        what, revision, *path = rest
        oid = found.branches.get(revision, revision)
        if oid not in found.commits:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"}, f"Invalid rev id: {revision}")
        files = found.commits[oid]
        if what == "revision":
            siblings = [{"rfilename": one} for one in sorted(files)]
            return self._json({"id": name, "sha": oid, "private": found.private, "siblings": siblings})
        if what == "tree":
            entries = [
                {"type": "file", "path": one, "size": len(content), "oid": blob_id(content)}
                for one, content in sorted(files.items())
            ]
            return self._json(entries)
        if what == "resolve":
            return self._resolve(oid, files, "/".join(path))
        if what == "preupload":
            answers = [
                {
                    "path": one["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": blob_id(files[one["path"]]) if one["path"] in files else None,
                }
                for one in json.loads(self.body)["files"]
            ]
            return self._json({"files": answers})
        if what == "commit":
            return self._commit(name, found, revision, oid)
        return self._answer(404, {}, f"the stand-in has no route {what}")

    def _resolve(self, oid: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}, "Entry not found")
        content, partial = files[path], self._range(len(files[path]))
        if self.server.statuses and "Range" in self.headers:
            return self._answer(self.server.statuses.pop(0), {}, "busy")
        start, stop = partial or (0, len(content))
        self.send_response(206 if partial else 200)
        for key, value in (
            ("X-Repo-Commit", oid),
            ("ETag", f'"{blob_id(content)}"'),
            ("Content-Length", str(stop - start)),
            *([("Accept-Ranges", "bytes")] if self.server.ranges else []),
            *([("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")] if partial else []),
        ):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            if self.server.breaks and partial:
                stop, self.close_connection = min(stop, start + self.server.breaks.pop(0)), True
            self.server.sent.append((path, start, stop))
            with suppress(ConnectionError):  # whoever asked has seen enough
                self.wfile.write(content[start:stop])

    def _range(self, size: int) -> tuple[int, int] | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not self.server.ranges or found is None or int(found[1]) >= size:
            return None
        return int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)

    def _commit(self, name: str, found: Repository, branch: str, head: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            return self._answer(412, {}, "A commit has happened since. Please refresh and try again.")
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        oid = found.commit(added, header["summary"], branch)
        return self._json({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, {"Content-Type": "application/json"}, json.dumps(content))

    def _answer(self, status: int, headers: dict[str, str], text: str) -> None:
        body = text.encode()
        self.send_response(status)
        if status >= 400:
            headers = {"X-Error-Message": text.replace("\n", " ")[:900], **headers}
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
