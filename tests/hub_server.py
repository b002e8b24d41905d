"""A server on the loopback that speaks as much of the Hub's HTTP as a download needs.

Repositories are set in memory; large or binary files are LFS files, as on the Hub. Faults are laid on
requests in turn: a status, or a connection that is cut in the middle of a body.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_LFS = (".safetensors", ".bin", ".parquet")
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(.*))?"
)
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """A repository: the files of each commit, and what the branches and tags point to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit and move branches or tags to it."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        self.refs.update(dict.fromkeys(refs or ("main",), name))
        return name


@dataclass
class Fault:
    """What becomes of requests whose "METHOD path" matches, as long as `times` lasts.

    cut: bytes of the body after which the connection is closed.
    """

    pattern: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    times: int = 1_000_000
    body: bytes | None = None


@dataclass
class Request:
    """A request as it came."""

    line: str
    headers: dict[str, str]


def git_oid(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


class HubServer:
    """The server, in a thread of its own, as a context."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def netloc(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://{self.netloc}"

    def model(self, name: str) -> Repo:
        """The model's repository, made if missing."""
        return self.repos.setdefault(("models", name), Repo())

    def dataset(self, name: str) -> Repo:
        """The data set's repository, made if missing."""
        return self.repos.setdefault(("datasets", name), Repo())

    def lines(self, pattern: str) -> list[str]:
        """Request lines so far that match."""
        return [one.line for one in self.requests if re.search(pattern, one.line)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(Request(line, {k.lower(): v for k, v in self.headers.items()}))
        fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, line)), None)
        if fault is not None:
            fault.times -= 1
            if fault.status != 200:
                self._send(fault.status, fault.body or b"no", fault.headers)
                return
        cut = fault.cut if fault is not None else None
        if (match := _API.fullmatch(path)) is not None:
            self._api(*match.groups(), sent=sent)
        elif (match := _FILE.fullmatch(path)) is not None:
            self._file(*match.groups(), cut=cut)
        else:
            self._send(404, b"no such page")

    def _commit(self, kind: str, name: str, revision: str) -> str | None:
        """The commit of a revision; None after an answer that says what is not there."""
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            self._send(401, b"no", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._send(404, b"no", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def _api(
        self,
        kind: str,
        name: str,
        what: str | None,
        revision: str | None,
        below: str | None,
        sent: bytes,
    ) -> None:
        commit = self._commit(kind, name, revision or "main")
        if commit is None:
            return
        files = self.hub.repos[kind, name].commits[commit]
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            about = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self._json({**about, "_id": "0", "downloads": 0, "likes": 0, "gated": False})
        elif what == "paths-info":
            wanted = _form_paths(sent)
            self._json([one for one in _entries(files) if one["path"] in wanted])
        else:
            folder = (below or "").strip("/")
            start = f"{folder}/" if folder else ""
            entries = [one for one in _entries(files) if one["path"].startswith(start)]
            if "recursive=true" not in self.path.lower():
                entries = [one for one in entries if "/" not in one["path"].removeprefix(start)]
            self._json(entries)

    def _file(
        self, dataset: str | None, name: str, revision: str, path: str, cut: int | None
    ) -> None:
        kind = "datasets" if dataset else "models"
        commit = self._commit(kind, name, revision)
        if commit is None:
            return
        content = self.hub.repos[kind, name].commits[commit].get(path)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        # What the repository says that the file is; a commit may hold (oid, other bytes) pairs.
        truth, content = content if isinstance(content, tuple) else (content, content)
        etag = hashlib.sha256(truth).hexdigest() if path.endswith(_LFS) else git_oid(truth)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.endswith(_LFS):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, content, headers, cut=cut)
            return
        start, end = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(206, content[start:end], headers, cut=cut)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)


def _form_paths(sent: bytes) -> set[str]:
    from urllib.parse import parse_qs

    try:
        return set(json.loads(sent)["paths"])
    except ValueError:
        return set(parse_qs(sent.decode()).get("paths", []))


def _entries(files: dict[str, Any]) -> list[dict[str, Any]]:
    """A tree listing."""
    entries = []
    for path, content in files.items():
        truth = content[0] if isinstance(content, tuple) else content
        entry = {"type": "file", "path": path, "size": len(truth), "oid": git_oid(truth)}
        if path.endswith(_LFS):
            digest = hashlib.sha256(truth).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(truth), "pointerSize": 130}
        entries.append(entry)
    folders = {path.rpartition("/")[0] for path in files if "/" in path}
    return entries + [
        {"type": "directory", "path": one, "size": 0, "oid": "0" * 40} for one in folders
    ]
