"""A small Hub on 127.0.0.1, for huggingface_hub as it is: nothing in the client is patched.

It answers what the client asks for: a repository's info at a revision, its tree, its files (the
weights by way of another server, as the Hub's, which sends parts of them), new repositories and
branches, uploads by Git LFS (which the client falls back to where xet is switched off), commits.
It keeps a log of all of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(kw_only=True)
class Repository:
    """A folder for every branch; the commit of a branch is a hash of its name and files."""

    branches: dict[str, Path]
    gated: bool = False
    private: bool = False

    def resolve(self, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a branch or a commit."""
        for branch, folder in self.branches.items():
            commit = hashlib.sha1(f"{branch} {files(folder)}".encode()).hexdigest()
            if revision in (branch, commit):
                return commit, folder
        return None


@dataclass(kw_only=True)
class Hub:
    """What is there to read: `repositories`, by their id. What was pushed: the others.

    `created` says of a new repository whether it is private; `branches` are the files that were
    committed, by "repository@branch" and path. Who is not in `writers` may not write. `failures`
    are statuses that the next requests get whose line in the log has the pattern; -1 breaks the
    connection in the middle of the answer. `log` has every request as "METHOD path", with the
    range if one was asked for; `sent` the bytes of every file, by its path in the repository.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    writers: set[str] = field(default_factory=lambda: {"hf_writer"})
    readers: set[str] = field(default_factory=lambda: {"hf_reader"})
    created: dict[str, bool] = field(default_factory=dict)
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    failures: list[tuple[str, int]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""
    cdn: str = ""

    @property
    def downloads(self) -> list[str]:
        """The files that were sent whole."""
        whole = re.compile(r"(?:CDN|GET) \S+/resolve/[^/]+/(\S+?)( bytes=0-)?")
        found = (whole.fullmatch(line) for line in self.log)
        return sorted(each[1] for each in found if each)

    def enter(self, line: str) -> int:
        """Log a request; the status that it is to get, 0 if the right one."""
        self.log.append(line)
        for failure in self.failures:
            if re.search(failure[0], line):
                self.failures.remove(failure)
                return failure[1]
        return 0


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub without repositories, that knows two tokens."""
    hub = Hub()
    with ExitStack() as stack:
        hub.url = stack.enter_context(_running(_Handler, hub))
        hub.cdn = stack.enter_context(_running(_Cdn, hub)).replace("127.0.0.1", "localhost")
        yield hub


class _Server(ThreadingHTTPServer):
    def handle_error(self, *request: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client has left
            super().handle_error(*request)


@contextmanager
def _running(handler: type[_Base], hub: Hub) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), type("_Bound", (handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files(folder: Path) -> list[str]:
    """Every file under `folder`, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class _Base(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """The hub's own log is the one that tests read."""

    def _send_part(self, path: Path, name: str, headers: dict[str, str]) -> None:
        """The file, or what was asked for of it."""
        content, status = path.read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)?", self.headers.get("Range") or "")
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            content, status = content[start:stop], 206
        if self.command == "GET":
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(content)
        self._send(status, content, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        broken = status == -1
        self.send_response(200 if broken else status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if broken:
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)


class _Cdn(_Base):
    """Where the Hub keeps large files: another server, which must not see the user's token."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        assert "Authorization" not in self.headers
        name, _, place = path.strip("/").partition("/resolve/")
        revision, _, file = place.partition("/")
        line = f"CDN {path} {self.headers.get('Range') or ''}"
        if status := self.hub.enter(line.strip()):
            return self._send(status, b"as asked", {})
        found = self.hub.repositories[name].resolve(revision)
        assert found is not None
        return self._send_part(found[1] / file, file, {})


class _Handler(_Base):
    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        body = self._body()
        if status := self.hub.enter(f"PUT {self.path}"):
            return self._send_json({"error": "as asked"}, status)
        self.hub.blobs[self.path.removeprefix("/upload/")] = body
        return self._send_json({})

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path} {self.headers.get('Range') or ''}"
        if status := self.hub.enter(line.strip()):
            return self._send_json({"error": "as asked"}, status)
        if path.startswith("/api/models/"):
            parts = urlsplit(self.path).path.removeprefix("/api/models/").split("/")
            name, rest = "/".join(parts[:2]), [unquote(part) for part in parts[2:]]
            action, revision = (rest[0], rest[1]) if len(rest) > 1 else ("info", "main")
            file = ""
        else:
            raw = urlsplit(self.path).path.strip("/")
            name, _, rest_of_path = raw.partition("/resolve/")
            action = "resolve"
            revision, _, file = (unquote(part) for part in rest_of_path.partition("/"))
        if name in self.hub.created and action == "tree":
            pushed = self.hub.branches.get(f"{name}@{revision}", {}).items()
            return self._send_json([_tree_entry(path, data) for path, data in pushed])
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() not in self.hub.readers):
            return self._refuse(404 if self._token() else 401, "RepoNotFound")
        found = repository.resolve(revision)
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        commit, folder = found
        if repository.gated and action != "info":  # as on the Hub: the info itself is public
            return self._refuse(401, "GatedRepo")
        if action == "resolve":
            return self._resolve(commit, folder, file)
        if action == "tree":
            entries = ((name, (folder / name).read_bytes()) for name in files(folder))
            return self._send_json([_tree_entry(*entry) for entry in entries])
        siblings = [{"rfilename": name} for name in files(folder)]
        return self._send_json({"id": name, "sha": commit, "siblings": siblings})

    def _resolve(self, commit: str, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit}
        if path.suffix != ".safetensors":
            etag = hashlib.sha1(path.read_bytes()).hexdigest()
            return self._send_part(path, name, headers | {"ETag": f'"{etag}"'})
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{etag}"'}
        location = {"Location": f"{self.hub.cdn}{urlsplit(self.path).path}"}
        return self._send(302, b"", headers | location)

    def do_POST(self) -> None:
        split, body = urlsplit(self.path), self._body()
        path = unquote(split.path)
        if status := self.hub.enter(f"POST {path}"):
            return self._send_json({"error": "as asked"}, status)
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if self._token() in self.hub.readers:
            return self._send_json({"error": "Forbidden"}, 403)
        if self._token() not in self.hub.writers:
            return self._send_json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        parts = path.removeprefix("/api/models/").split("/", 3)
        name, action, revision = "/".join(parts[:2]), parts[2], parts[3]
        if name not in self.hub.created:
            return self._refuse(404, "RepoNotFound")
        if action == "branch":
            self._branch(name, revision)
            return self._send_json({})
        if action == "preupload":
            return self._send_json({"files": [_mode(each) for each in json.loads(body)["files"]]})
        wants_pr = parse_qs(split.query).get("create_pr") == ["1"]
        return self._commit(name, "refs/pr/1" if wants_pr else revision, body, wants_pr)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.created:
            known = {"error": "You already created this model repo", "url": url}
            return self._send_json(known, 409)
        self.hub.created[name] = wanted.get("visibility") == "private"
        return self._send_json({"url": url})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for each in wanted["objects"]:
            known = each["oid"] in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}"}}
            objects.append({**each, **({} if known else {"actions": upload})})
        self._send_json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, branch: str, body: bytes, wants_pr: bool) -> None:
        there = self._branch(name, branch)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    self.hub.messages.append(value["summary"])
                case "file":
                    there[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    there[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del there[value["path"]]
        url = f"{self.hub.url}/{name}"
        answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/commit/0"}
        pr = {"pullRequestUrl": f"{url}/discussions/1"} if wants_pr else {}
        self._send_json(answer | pr)

    def _branch(self, name: str, branch: str) -> dict[str, bytes]:
        """The files of a branch; a new one begins as main is."""
        main = self.hub.branches.get(f"{name}@main", {})
        return self.hub.branches.setdefault(f"{name}@{branch}", dict(main))

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send_json(self, document: object, status: int = 200) -> None:
        headers = {"Content-Type": "application/json"}
        self._send(status, json.dumps(document).encode(), headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    lfs = file["path"].endswith(".safetensors")
    mode = "lfs" if lfs else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
