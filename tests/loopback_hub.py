"""A small hub on loopback, for the real clients: models, datasets, private repositories, cut connections, uploads.

It answers the routes that huggingface_hub 2 and datasets 5 ask for. Every file is a regular one: no LFS, no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+).*)?"
)
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class LoopbackHub:
    """What the hub holds and what it was asked.

    Attributes:
        repositories: (kind, id) -> path -> content; kind is "models" or "datasets".
        private: ids that need `token`.
        cut: paths whose first download ends after half of the file.
        asked: (method, path, Range header) of every request.
        made: what the repositories were created with.
    """

    def __init__(self, token: str) -> None:
        self.token, self.url = token, ""
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.cut: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        self.made: list[dict[str, Any]] = []

    def add(self, repo: str, directory: Path, kind: str = "models") -> None:
        """Take every file below a directory."""
        files = (path for path in directory.rglob("*") if path.is_file())
        self.repositories[kind, repo] = {str(file.relative_to(directory)): file.read_bytes() for file in files}

    def commit_of(self, kind: str, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[kind, repo].items())).encode()).hexdigest()

    @contextmanager
    def running(self) -> Iterator[LoopbackHub]:
        hub = self

        class Handler(_Handler):
            store = hub

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield self
            finally:
                server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    store: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.store.asked.append((self.command, path, self.headers.get("Range")))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":  # of a model card, before it is uploaded
            return self._answer(200, {"errors": [], "warnings": []})
        if match := API.fullmatch(path):
            return self._api(match[1], match[2], match[3] or "revision", body)
        if match := FILE.fullmatch(path):
            return self._file("datasets" if match[1] else "models", match[2], match[4])
        return self._answer(404, {"error": f"no route {path}"})

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        sent = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    def _is_open(self, kind: str, repo: str) -> bool:
        """Whether this caller may see the repository; answers otherwise, as the hub does."""
        allowed = (
            repo not in self.store.private or self.headers.get("Authorization") == f"Bearer {self.store.token}"
        )
        if (kind, repo) in self.store.repositories and allowed:
            return True
        self._answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return False

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.store.token}":
            return self._answer(401, {"error": f"Invalid token {self.headers.get('Authorization')}"})
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        self.store.made.append({**wanted, "repo": repo})
        self.store.repositories.setdefault(("models", repo), {})
        return self._answer(200, {"url": f"{self.store.url}/{repo}", "name": repo})

    def _api(self, kind: str, repo: str, what: str, body: bytes) -> None:
        if not self._is_open(kind, repo):
            return None
        files = self.store.repositories[kind, repo]
        if what == "preupload":
            wanted = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]
            return self._answer(200, {"files": modes})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.store.commit_of(kind, repo)
            address = f"{self.store.url}/{repo}/commit/{commit}"
            return self._answer(200, {"success": True, "commitOid": commit, "commitUrl": address})
        if what in ("tree", "paths-info"):
            entries = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self._answer(200, entries)
        info = {"id": repo, "sha": self.store.commit_of(kind, repo), "private": repo in self.store.private}
        return self._answer(200, {**info, "siblings": [{"rfilename": path} for path in files], "tags": []})

    def _file(self, kind: str, repo: str, path: str) -> None:
        if not self._is_open(kind, repo):
            return
        content = self.store.repositories[kind, repo].get(path)
        if content is None:
            commit = self.store.commit_of(kind, repo)
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.store.commit_of(kind, repo))
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.store.cut:
            self.store.cut.remove(path)
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self.wfile.write(part)
