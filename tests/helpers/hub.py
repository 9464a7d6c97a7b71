"""A stub of the Hugging Face Hub on this machine: repositories in memory, behind the part of its HTTP API in use here.

Uploads go through the LFS protocol for weights and inline for other files; Xet is not offered.
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

TOKEN = "hf_of_alice"
ERRORS = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403}


def blob_id(content: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@dataclass
class Repository:
    """A repository: the files of each commit, and the commits of its branches and tags."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        return self.commits[self.resolve(revision)]

    def resolve(self, revision: str) -> str:
        """The commit of a branch, tag or commit."""
        return {**self.branches, **self.tags, **{commit: commit for commit in self.commits}}[revision]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "", url: str = ""):
        super().__init__(message or code)
        self.url = url
        self.status, self.code, self.message = status, code, message or code


class Hub:
    """Repositories and users, and the faults that a test asks for.

    Attributes:
        users: name by token. ``alice`` may write to her own repositories and those of the organisation ``lab``.
        gated: repositories that nobody has access to.
        faults: (part of "METHOD path", status): the first request that it fits fails, and so do later ones.
        requests: "METHOD path" of each request.
    """

    def __init__(self) -> None:
        self.users = {TOKEN: "alice", "hf_of_bob": "bob"}
        self.repositories: dict[str, Repository] = {}
        self.gated: set[str] = set()
        self.faults: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        self.url = ""
        self._count = itertools.count(1)

    def create(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repository:
        """A repository with one commit on ``main``."""
        repository = self.repositories[name] = Repository(private=private)
        self.commit(repository, "main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return repository

    def create_from(self, name: str, folder: Path, **options: Any) -> Repository:
        """A repository with the files of a folder."""
        return self.create(name, contents(folder), **options)

    def commit(self, repository: Repository, branch: str, files: dict[str, bytes]) -> str:
        """Set the files of a branch; returns the commit."""
        commit = hashlib.sha1(f"commit {next(self._count)}".encode()).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        headers: dict[str, str] = {}
        try:
            for part, status in self.hub.faults:
                if part in line:
                    raise Refused(status, message="made up by the test")
            content, headers = self.answer(path, parse_qs(parts.query), body)
            status = 200
        except Refused as error:
            status, content = error.status, json.dumps({"error": error.message, "url": error.url}).encode()
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    @property
    def user(self) -> str | None:
        """Who asks; None without a token."""
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def may_write(self, name: str) -> bool:
        owner = name.split("/")[0]
        return owner == self.user or (owner == "lab" and self.user == "alice")

    def repository(self, name: str, *, write: bool = False) -> Repository:
        """A repository that the user may read, or write."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.may_write(name)):
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and not self.may_write(name):
            raise Refused(403, message="you have no write access to this repository")
        return found

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit of a revision, and its files."""
        repository = self.repository(name)
        try:
            commit = repository.resolve(revision)
        except KeyError:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None
        return commit, repository.commits[commit]

    def answer(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[bytes, dict[str, str]]:
        """The content and the headers of the answer to a request."""
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+)", path):
            name, revision, file = match.groups()
            commit, files = self.files(name, revision)
            if name in self.hub.gated:
                raise Refused(403, "GatedRepo", "Access to this model is restricted")
            if file not in files:
                raise Refused(404, "EntryNotFound", "Entry not found")
            content = files[file]
            etag = hashlib.sha256(content).hexdigest() if file.endswith(".safetensors") else blob_id(content)
            return content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.large[match[1]] = body
            return b"", {}
        return json.dumps(self.api(path, json.loads(body) if body and "commit" not in path else body)).encode(), {}

    def api(self, path: str, given: Any) -> Any:
        """The JSON that answers a request."""
        hub = self.hub
        if path == "/api/whoami-v2":
            if self.user is None:
                raise Refused(401, message="no token")
            orgs = [{"name": "lab"}] if self.user == "alice" else []
            return {"type": "user", "name": self.user, "orgs": orgs, "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            text = given["content"].split("---")
            base = re.search(r"^base_model: (.*)$", text[1] if len(text) > 2 else "", flags=re.MULTILINE)
            if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1]):
                raise Refused(400, message=f'"base_model" with value "{base[1]}" is not valid')
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            name = f"{given.get('organization') or self.user}/{given['name']}"
            if self.user is None:
                raise Refused(401, message="no token")
            if name in hub.repositories:
                raise Refused(409, message="You already created this model repo", url=f"{hub.url}/{name}")
            if not self.may_write(name):
                raise Refused(403, message=f"You don't have the rights to create a model under {name.split('/')[0]}")
            hub.create(name, private=given.get("visibility") == "private" or given.get("private") is True)
            return {"url": f"{hub.url}/{name}"}
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self.repository(match[1], write=True)
            return {
                "transfer": "basic",
                "objects": [
                    {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}} for one in given["objects"]
                ],
            }
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(.*))?", path)
        if match is None:
            raise Refused(404, message=f"the stub has no {path}")
        name, (action, _, rest) = match[1], (match[2] or "").partition("/")
        if action in ("", "revision"):
            commit, files = self.files(name, rest or "main")
            siblings = [{"rfilename": file} for file in files]
            return {"id": name, "sha": commit, "private": hub.repositories[name].private, "siblings": siblings}
        if action == "tree":
            return [_entry(*item) for item in self.files(name, rest)[1].items()]
        if action == "refs":
            repository = self.repository(name)
            refs = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
            return {"converts": []} | {
                kind: [{"name": n, "ref": f"refs/{part}/{n}", "targetCommit": c} for n, c in found.items()]
                for kind, (part, found) in refs.items()
            }
        repository = self.repository(name, write=rest == "write" or action in ("branch", "preupload", "commit"))
        if action == "auth-check":
            return {}
        if action == "branch":
            if rest in repository.branches:
                raise Refused(409, message="Reference already exists")
            repository.branches[rest] = repository.branches["main"]
            return {}
        if action == "preupload":
            present = self.files(name, rest)[1]
            return {"files": [_upload_mode(one, present.get(one["path"])) for one in given["files"]]}
        assert action == "commit", path
        return self.commit(name, rest, [json.loads(line) for line in given.splitlines()])

    def commit(self, name: str, branch: str, operations: list[dict[str, Any]]) -> dict[str, Any]:
        """Apply the operations of a commit."""
        repository = self.repository(name)
        files = dict(self.files(name, branch)[1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                repository.messages.append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert operation["key"] == "deletedFile", operation
                del files[value["path"]]
        commit = self.hub.commit(repository, branch, files)
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if path.endswith(".safetensors"):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 127}
    return entry


def _upload_mode(file: dict[str, Any], present: bytes | None) -> dict[str, Any]:
    large = file["path"].endswith(".safetensors")
    oid = None
    if present is not None:
        oid = hashlib.sha256(present).hexdigest() if large else blob_id(present)
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve a hub at a free port of 127.0.0.1."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A `Hub` that huggingface_hub talks to in this process, as alice, with a cache of its own."""
    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running(Hub()) as found:
        for name, value in {
            "ENDPOINT": found.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        close_session()  # its client was made with other settings
        yield found
        close_session()
