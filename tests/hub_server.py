"""A small Hub on 127.0.0.1, for huggingface_hub as it is: nothing in the client is patched.

It answers what `model_info` and `snapshot_download` ask: a repository's info at a revision, its
tree, and its files with the headers that name commit and content. It keeps a log of all of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass(kw_only=True)
class Repository:
    """A folder for every branch; the commit of a branch is a hash of its name and files."""

    branches: dict[str, Path]
    gated: bool = False

    def resolve(self, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a branch or a commit."""
        for branch, folder in self.branches.items():
            commit = hashlib.sha1(f"{branch} {files(folder)}".encode()).hexdigest()
            if revision in (branch, commit):
                return commit, folder
        return None


@dataclass(kw_only=True)
class Hub:
    """The repositories by their id, and every request so far as "METHOD path"."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def downloads(self) -> list[str]:
        """The files whose content was sent."""
        sent = [line for line in self.log if line.startswith("GET ") and "/resolve/" in line]
        return sorted(line.split("/resolve/")[1].partition("/")[2] for line in sent)


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files(folder: Path) -> list[str]:
    """Every file under `folder`, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """The hub's own log is the one that tests read."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.log.append(f"{self.command} {unquote(path)}")
        if path.startswith("/api/models/"):
            parts = path.removeprefix("/api/models/").split("/")
            name, rest = "/".join(parts[:2]), [unquote(part) for part in parts[2:]]
            action, revision = (rest[0], rest[1]) if len(rest) > 1 else ("info", "main")
            file = ""
        else:
            name, _, rest_of_path = path.strip("/").partition("/resolve/")
            action = "resolve"
            revision, _, file = unquote(rest_of_path).partition("/")
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        found = repository.resolve(revision)
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        commit, folder = found
        if repository.gated and action != "info":  # as on the Hub: the info itself is public
            return self._refuse(401, "GatedRepo")
        if action == "resolve":
            return self._send_file(commit, folder / file)
        if action == "tree":
            return self._send_json([_tree_entry(folder, name) for name in files(folder)])
        siblings = [{"rfilename": name} for name in files(folder)]
        return self._send_json({"id": name, "sha": commit, "siblings": siblings})

    def _send_file(self, commit: str, path: Path) -> None:
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _send_json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _tree_entry(folder: Path, name: str) -> dict[str, object]:
    content = (folder / name).read_bytes()
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}
