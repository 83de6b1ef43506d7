"""A Hub on 127.0.0.1 that takes commits, for huggingface_hub as it is: nothing is patched.

Files above a few bytes go by Git LFS, which the client falls back to where xet is switched off.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(kw_only=True)
class Hub:
    """Files by "repository@branch" and path; what is not in `writers` may not write.

    `failures` are statuses that the next requests get whose path ends as said.
    """

    writers: set[str]
    readers: set[str]
    repositories: dict[str, bool] = field(default_factory=dict)
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    failures: list[tuple[str, int]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub without repositories, that knows two tokens."""
    hub = Hub(writers={"hf_writer"}, readers={"hf_reader"})
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


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """The hub's own log is the one that tests read."""

    def do_PUT(self) -> None:
        self.hub.blobs[self.path.removeprefix("/upload/")] = self._body()
        self._send(200, {})

    def do_POST(self) -> None:
        split, body = urlsplit(self.path), self._body()
        path = unquote(split.path)
        self.hub.log.append(f"POST {path}")
        for failure in self.hub.failures:
            if path.endswith(failure[0]):
                self.hub.failures.remove(failure)
                return self._send(failure[1], {"error": "as asked"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if token in self.hub.readers:
            return self._send(403, {"error": "Forbidden"})
        if token not in self.hub.writers:
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        name, action, revision = self._parts(path)
        if name not in self.hub.repositories:
            return self._send(404, {"error": "Repository not found"}, "RepoNotFound")
        if action == "branch":
            self.hub.branches.setdefault(f"{name}@{revision}", {})
            return self._send(200, {})
        if action == "preupload":
            files = json.loads(body)["files"]
            return self._send(200, {"files": [_mode(each) for each in files]})
        wants_pr = parse_qs(split.query).get("create_pr") == ["1"]
        return self._commit(name, "refs/pr/1" if wants_pr else revision, body, wants_pr)

    def _parts(self, path: str) -> tuple[str, str, str]:
        parts = path.removeprefix("/api/models/").split("/", 3)
        return "/".join(parts[:2]), parts[2], parts[3]

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repositories:
            known = {
                "error": "You already created this model repo",
                "url": f"{self.hub.url}/{name}",
            }
            return self._send(409, known)
        self.hub.repositories[name] = wanted.get("visibility") == "private"
        return self._send(200, {"url": f"{self.hub.url}/{name}"})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for each in wanted["objects"]:
            known = each["oid"] in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}"}}
            objects.append({**each, **({} if known else {"actions": upload})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, branch: str, body: bytes, wants_pr: bool) -> None:
        files = self.hub.branches.setdefault(f"{name}@{branch}", {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    self.hub.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
        answer = {
            "success": True,
            "commitOid": "0" * 40,
            "commitUrl": f"{self.hub.url}/{name}/commit/0",
        }
        pr = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if wants_pr else {}
        self._send(200, answer | pr)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, document: object, code: str = "") -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for key, value in (headers | ({"X-Error-Code": code} if code else {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    lfs = file["path"].endswith(".safetensors")
    return {
        "path": file["path"],
        "uploadMode": "lfs" if lfs else "regular",
        "shouldIgnore": False,
    }
