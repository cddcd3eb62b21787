"""A Hugging Face Hub on the loopback interface: the HTTP API that uploads and downloads of models use.

The real `huggingface_hub` client talks to it when `HF_ENDPOINT` (read when the client is imported) names it and
`HF_HUB_DISABLE_XET=1` keeps its uploads on plain LFS. Everything is in memory. What the server does not speak (data
sets, pull requests, Xet) it answers with 501, which the client raises without retrying.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".pt", ".safetensors", ".zip")
LFS_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


class HubError(Exception):
    """Status, message and perhaps a code of an answer: the client has an exception for each code."""


class Blob(NamedTuple):
    """A committed file; the client compares its etag with what it holds."""

    data: bytes
    lfs: bool = False

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.oid

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Commit(NamedTuple):
    id: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes | None] = field(default_factory=dict)  # None: announced, not uploaded yet

    def find(self, revision: str) -> Commit:
        id = self.branches.get(revision) or self.tags.get(revision) or revision
        if id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[id]

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> str:
        state = (self.id, len(self.commits), title, sorted((path, blob.oid) for path, blob in files.items()))
        id = self.branches[branch] = hashlib.sha1(repr(state).encode()).hexdigest()
        self.commits[id] = Commit(id, title, files)
        return id


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for them
    request_queue_size = 64  # a snapshot download connects from many threads at once
    hub: "HubServer"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # cut on purpose, or the client died
            super().handle_error(request, client_address)


class HubServer:
    """`with HubServer() as hub:` serves an empty Hub at `hub.endpoint`; `token` reads and writes everything."""

    def __init__(self, token: str = "hf_test", user: str = "tester"):
        self.token, self.user = token, user
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # "METHOD path", without the query
        self.faults: list[tuple[str, str, int, bool]] = []
        self.events: list[tuple[str, str, Callable[[], object]]] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The committed files, with the `.gitattributes` of every new repository."""
        with self.lock:
            return {path: blob.data for path, blob in self.repos[repo_id].find(revision).files.items()}

    def fail(self, method: str, part: str, status: int = 500, late: bool = False) -> None:
        """Answer requests with `part` in their path with `status` until `heal()`; `late`: after carrying them out."""
        self.faults.append((method, part, status, late))

    def cut(self, method: str, part: str, late: bool = False) -> None:
        """As `fail`, but close the connection without an answer."""
        self.fail(method, part, 0, late)

    def before(self, method: str, part: str, event: Callable[[], object]) -> None:
        """Have something happen, once, before requests with `part` in their path are carried out."""
        self.events.append((method, part, event))

    def heal(self) -> None:
        self.faults.clear()


def route(method: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a method of `Handler` answer requests, once REPO and REV of `pattern` are in its `repo` and `commit`."""

    def register(answer: Callable[..., Any]) -> Callable[..., Any]:
        named = pattern.replace("REPO", r"(?P<repo>[^/]+(?:/[^/]+)?)").replace("REV", r"(?P<rev>[^/]+)")
        ROUTES.append((method, re.compile(named), answer))
        return answer

    return register


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60
    repo: Repo
    commit: Commit

    def handle_call(self) -> None:
        self.hub, url = self.server.hub, urlsplit(self.path)
        self.name, self.query = f"{self.command} {unquote(url.path)}", parse_qs(url.query)
        self.hub.requests.append(self.name)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            raise ConnectionAbortedError("The client died")
        self.status = 200
        self.reply: dict[str, str] = {}  # headers
        try:
            with self.hub.lock:
                self.strike(late=False)
                result = self.answer("GET" if self.command == "HEAD" else self.command, url.path)
                self.strike(late=True)
        except HubError as error:
            self.status, message, *code = error.args
            result = {"error": message}
            self.reply |= {"X-Error-Message": ascii(message)[1:-1], **({"X-Error-Code": code[0]} if code else {})}
        data = result if isinstance(result, bytes) else json.dumps(result).encode()
        self.send_response(self.status)
        for key, value in {"Content-Length": str(len(data)), **self.reply}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_call

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def strike(self, late: bool) -> None:
        for event in [event for event in self.hub.events if event[0] == self.command and event[1] in self.name]:
            self.hub.events.remove(event)
            event[2]()
        for method, part, status, after in self.hub.faults:
            if after == late and method == self.command and part in self.name:
                if not status:
                    raise ConnectionAbortedError("Cut on purpose")
                self.reply["Retry-After"] = "0"  # the client waits for 1 s before each retry, not for up to 8 s
                raise HubError(status, "Failed on purpose")

    def answer(self, method: str, path: str) -> Any:
        """Check the token, find the repository and the commit, and hand over to the method of the route."""
        sent = self.headers.get("Authorization")
        if sent and sent != f"Bearer {self.hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        for verb, pattern, answer in ROUTES:
            if verb != method or not (match := pattern.fullmatch(path)):
                continue
            names = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            in_repo, repo = "repo" in names, self.hub.repos.get(names.pop("repo", ""))
            readable = method == "GET" and repo is not None and not repo.private
            if not (sent or readable or path.startswith(("/lfs/", "/api/validate-yaml"))):
                # Without the code the client takes 401 for a missing repository from https endpoints only.
                raise HubError(401, "Invalid username or password.", *(["RepoNotFound"] if in_repo else []))
            if in_repo and repo is None:
                raise HubError(404, "Repository not found", "RepoNotFound")
            if repo is not None:
                self.repo, self.rev = repo, names.pop("rev", "main")
                self.commit = repo.find(self.rev)
                self.reply["X-Repo-Commit"] = self.commit.id
            return answer(self, **names)
        raise HubError(501, f"The test Hub does not speak {self.name} (is HF_HUB_DISABLE_XET=1 set?)")

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Any:
        return {"type": "user", "name": self.hub.user, "orgs": []}

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Any:
        asked = json.loads(self.body)
        if asked.get("type", "model") != "model":
            raise HubError(501, "The test Hub holds models only")
        id = f"{asked['organization'] or self.hub.user}/{asked['name']}"
        url = f"{self.hub.endpoint}/{id}"
        if id in self.hub.repos:
            self.status = 409
            return {"error": "You already created this model repo", "url": url}
        self.hub.repos[id] = Repo(id, asked.get("visibility") == "private")
        self.hub.repos[id].commit("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES.encode())})
        return {"url": url, "name": id}

    @route("GET", "/api/models/REPO(?:/revision/REV)?")
    def info(self) -> Any:
        siblings = [{"rfilename": path} for path in sorted(self.commit.files)]
        state = {"sha": self.commit.id, "private": self.repo.private, "gated": self.repo.gated, "tags": []}
        return {"id": self.repo.id, "modelId": self.repo.id, "siblings": siblings, **state}

    @route("GET", "/api/models/REPO/tree/REV(?:/(?P<folder>.+))?")
    def tree(self, folder: str = "") -> Any:
        top = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(self.commit.files.items()):
            if path.startswith(top):
                for slash in re.finditer("/", path[len(top) :]):
                    parent = path[: len(top) + slash.start()]
                    entries[parent] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": parent}
                entries[path] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
                if blob.lfs:
                    entries[path]["lfs"] = {"oid": blob.etag, "size": len(blob.data), "pointerSize": 130}
        if top and not entries:
            raise HubError(404, f"{folder} does not exist on {self.rev}", "EntryNotFound")
        deep = self.query.get("recursive") in (["true"], ["True"])
        return [entry for path, entry in entries.items() if deep or "/" not in path.removeprefix(top)]

    @route("POST", "/api/models/REPO/branch/(?P<branch>[^/]+)")
    def create_branch(self, branch: str) -> Any:
        start = self.repo.find(json.loads(self.body).get("startingPoint", "main"))
        if branch in self.repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        self.repo.branches[branch] = start.id
        return {}

    @route("DELETE", "/api/models/REPO/branch/(?P<branch>[^/]+)")
    def delete_branch(self, branch: str) -> Any:
        if branch == "main" or branch not in self.repo.branches:
            raise HubError(404, f"No branch {branch} to delete")
        del self.repo.branches[branch]
        return {}

    @route("POST", "/api/models/REPO/tag/REV")
    def create_tag(self) -> Any:
        tag = json.loads(self.body)["tag"]
        if tag in self.repo.tags:
            raise HubError(409, f"Tag reference exists already: refs/tags/{tag}")
        self.repo.tags[tag] = self.commit.id
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Any:
        """Checks only that a README.md has metadata: the client warns otherwise."""
        found = re.match(r"---\r?\n.*?\w.*?\n---\s", json.loads(self.body)["content"] + "\n", re.DOTALL)
        return {"errors": [], "warnings": [] if found else [{"message": "empty or missing yaml metadata"}]}

    @route("POST", "/api/models/REPO/preupload/REV")
    def preupload(self) -> Any:
        answers = []
        for file in json.loads(self.body)["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or binary or file["size"] > LFS_SIZE else "regular"
            oid = self.commit.files[path].etag if path in self.commit.files else None  # has the client skip the same
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    @route("POST", r"/REPO\.git/info/lfs/objects/batch")
    def lfs_batch(self) -> Any:
        objects = []
        for file in json.loads(self.body)["objects"]:
            objects.append({"oid": file["oid"], "size": file["size"]})
            if self.repo.lfs.setdefault(file["oid"]) is None:
                href = f"{self.hub.endpoint}/lfs/{self.repo.id}/{file['oid']}"
                objects[-1]["actions"] = {"upload": {"href": href}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<id>[^/]+/[^/]+)/(?P<oid>[^/]+)")
    def lfs_upload(self, id: str, oid: str) -> Any:
        """Like a presigned URL: without the token, for objects that a batch request announced."""
        if oid not in self.hub.repos[id].lfs or Blob(self.body, lfs=True).etag != oid:
            raise HubError(403, "Not an announced object")
        self.hub.repos[id].lfs[oid] = self.body
        return b""

    @route("POST", "/api/models/REPO/commit/REV")
    def create_commit(self) -> Any:
        if "create_pr" in self.query or self.rev not in self.repo.branches:
            raise HubError(501, "The test Hub commits to branches only")
        title, files = "", dict(self.commit.files)
        for line in self.body.splitlines():
            kind, value = (item := json.loads(line))["key"], item["value"]
            if kind == "header":
                title = value["summary"]
                if value.get("parentCommit", self.commit.id) != self.commit.id:
                    raise HubError(412, "A commit has happened since.")
            elif kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif kind == "lfsFile" and (data := self.repo.lfs.get(value["oid"])) is not None:
                files[value["path"]] = Blob(data, lfs=True)
            elif kind == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise HubError(404, f"A file with this name doesn't exist: {value['path']} ({kind})", "EntryNotFound")
        id = self.repo.commit(self.rev, title, files)
        return {"commitOid": id, "commitUrl": f"{self.hub.endpoint}/{self.repo.id}/commit/{id}"}

    @route("GET", "/REPO/resolve/REV/(?P<path>.+)")
    def resolve(self, path: str) -> Any:
        if self.repo.gated and "Authorization" not in self.headers:
            raise HubError(401, f"Access to model {self.repo.id} is restricted.", "GatedRepo")
        if path not in self.commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = self.commit.files[path]
        self.reply["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            self.reply |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        return blob.data
