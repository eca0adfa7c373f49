"""A small Hugging Face hub on this machine, for huggingface_hub itself to talk to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<verb>branch|preupload|commit)/(?P<branch>.+)"
)


@dataclass
class Hub:
    """Repositories: branch or commit -> file -> bytes. `asked` are the requests so far."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    token: str | None = None  # that may write; None: any
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)  # that came

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; the commit."""
        branches = self.repos.setdefault(repo, {"main": {}})
        whole = branches.get(branch, branches["main"]) | files
        digest = hashlib.sha1(repr(sorted(whole.items())).encode()).hexdigest()
        branches[branch] = branches[digest] = whole
        return digest

    def commit_of(self, repo: str, revision: str) -> str | None:
        """The commit that a branch points to, or that a commit is."""
        branches = self.repos[repo]
        whole = branches.get(revision)
        same = (name for name, each in branches.items() if each is whole and len(name) == 40)
        return None if whole is None else next(same, None)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self._note()
        self._file()

    def do_GET(self) -> None:
        self._note()
        self._file()

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._chunks()
        self._api(body)

    def _note(self) -> None:
        self.hub.asked.append((self.command, self.path))
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, code: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, data) -> None:
        self._answer(200, json.dumps(data).encode(), Content_Type="application/json")

    def _file(self) -> None:
        found = FILE.fullmatch(self.path.split("?")[0])
        if found is None:
            return self._answer(404)
        repo, revision, file = found["repo"], found["revision"].replace("%2F", "/"), found["file"]
        if repo in self.hub.gated:
            return self._answer(403, X_Error_Code="GatedRepo")
        if repo not in self.hub.repos:
            return self._answer(404, X_Error_Code="RepoNotFound")
        commit = self.hub.commit_of(repo, revision)
        if commit is None:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        data = self.hub.repos[repo][commit].get(file)
        if data is None:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self._answer(200, data, ETag=etag, X_Repo_Commit=commit)

    def _api(self, body: bytes) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.hub.token not in (None, token):
            return self._answer(401, b'{"error": "Invalid username or password."}')
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.repos:
                return self._answer(409, json.dumps({"url": self._page(repo)}).encode())
            self.hub.repos[repo] = {"main": {}}
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
            return self._json({"url": self._page(repo)})
        found = API.fullmatch(self.path)
        if found is None:
            return self._answer(404)
        if found["verb"] == "branch":
            branches = self.hub.repos[found["repo"]]
            branches[found["branch"]] = dict(branches["main"])
            return self._json({})
        if found["verb"] == "preupload":
            paths = [each["path"] for each in json.loads(body)["files"]]
            return self._json(
                {
                    "files": [
                        {"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths
                    ]
                }
            )
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        digest = self.hub.commit(found["repo"], files, found["branch"])
        page = f"{self._page(found['repo'])}/commit/{digest}"
        return self._json({"commitUrl": page, "commitOid": digest, "success": True})

    def _page(self, repo: str) -> str:
        return f"http://{self.headers['Host']}/{repo}"


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """The hub's address while it is up."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
