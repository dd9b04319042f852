"""A Hub on this machine: the part of its protocol that `huggingface_hub` speaks to push and to load a model.

The client in the tests is the real one: what it sends (how many commits, which files, which token) and what
it makes of refusals and broken connections is tested, and not a mock's idea of it. There are accounts,
repositories, pre-upload, Git LFS ("basic" transfer to a store without tokens), commits as NDJSON, downloads
with ranges, and the Hub's errors. There is no Xet, which the client alone chooses: uploads want
HF_HUB_DISABLE_XET=1, or `HubServer(lfs=False)`, where every file travels in the commit.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_repository import LFS_SUFFIXES, Commit, Refusal, Repository, metadata

LFS_SIZE = 10 << 20
ROUTES = []


@dataclass
class Request:
    """What a client asks; `user` is None without a token that the server knows."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    user: str | None
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Reply:
    """What the server answers: bytes, or an object as JSON."""

    body: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def route(method: str, path: str):
    """Register an answer; {x} in `path` is a part without a slash, {x*} may have some, {id} is user/model."""
    pattern = path.replace("{id}", "([^/]+/[^/]+?)")
    pattern = re.sub(r"{\w+\*}", "(.+)", re.sub(r"{\w+}", "([^/]+)", pattern))

    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubServer:
    """The server in a thread; a context manager.

    Attributes:
        url: what HF_ENDPOINT or `HfApi(endpoint=...)` is set to.
        requests: (method, path) of every request so far.
    """

    def __init__(self, tokens: dict[str, str], lfs: bool = True):
        self.tokens, self.lfs = tokens, lfs
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._cuts = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path and content of every file; `.gitattributes` is the server's own, as on the Hub."""
        repository = self.repositories[repo_id]
        return {path: repository.objects[name] for path, name in repository.at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The history, newest first; it ends with the "initial commit" that creates a repository."""
        history = [self.repositories[repo_id].at(revision)]
        while history[-1].parent:
            history.append(history[-1].parent)
        return history

    def cut_after(self, size: int, times: int = 1, method: str = "PUT"):
        """Break the next connections that carry a larger LFS upload (or, with "GET", a larger download)."""
        self._cuts[method] = [size, times]

    def cut(self, method: str, path: str, length: int) -> int | None:
        """How many bytes this connection lives; None if it is not to be cut."""
        with self.lock:
            size, times = self._cuts.get(method, (0, 0))
            kind = "/resolve/" if method == "GET" else "/storage/"
            if not times or length <= size or kind not in path:
                return None
            self._cuts[method][1] -= 1
            return size

    def answer(self, request: Request) -> Reply:
        """The reply of the route that matches; one request at a time."""
        with self.lock:
            for method, pattern, function in ROUTES:
                if method == request.method and (found := pattern.fullmatch(request.path)):
                    reply = function(self, request, *map(unquote, found.groups()))
                    return reply if isinstance(reply, Reply) else Reply(reply)
        raise Refusal(404, f"Not implemented by the tests: {request.method} {request.path}")

    def repository(self, request: Request, repo_id: str, write: bool = False) -> Repository:
        """What the user may see, or write to; the Hub does not tell a private repository from none."""
        found, owner = self.repositories.get(repo_id), request.user == repo_id.split("/")[0]
        if found is None or (found.private and not owner):
            raise Refusal(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user(request) and not owner:
            raise Refusal(403, "You may not write here")
        return found

    def user(self, request: Request) -> str:
        if request.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return request.user

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        name = self.user(request)
        auth = {"type": "access_token", "accessToken": {"role": "write"}}
        return {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": auth}

    @route("POST", "/api/repos/create")
    def create_repo(self, request):
        options, user = request.json(), self.user(request)
        owner = options.get("organization") or user
        if owner != user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{options['name']}"
        known = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            return Reply(known | {"error": "You already created this model repo"}, 409)
        private = options.get("visibility") == "private" or bool(options.get("private"))
        self.repositories[repo_id] = Repository(private)
        return known

    @route("PUT", "/api/models/{id}/settings")
    def settings(self, request, repo_id):
        repository = self.repository(request, repo_id, write=True)
        if "visibility" in request.json():
            repository.private = request.json()["visibility"] == "private"
        return {"private": repository.private}

    @route("GET", "/api/models/{id}")
    @route("GET", "/api/models/{id}/revision/{revision}")
    def model_info(self, request, repo_id, revision="main"):
        known = self.repository(request, repo_id).info(revision, "blobs" in request.query)
        return {"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]} | known

    @route("GET", "/api/models/{id}/tree/{revision}")
    @route("GET", "/api/models/{id}/tree/{revision}/{folder*}")
    def tree(self, request, repo_id, revision, folder=""):
        recursive = request.query.get("recursive") == ["true"]
        return self.repository(request, repo_id).tree(revision, folder, recursive)

    @route("GET", "/api/models/{id}/refs")
    def refs(self, request, repo_id):
        repository = self.repository(request, repo_id)

        def told(kind, known):
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c.id} for n, c in known.items()]

        own = {"branches": told("heads", repository.branches), "tags": told("tags", repository.tags)}
        return own | {"converts": [], "pullRequests": []}

    @route("POST", "/api/models/{id}/branch/{branch}")
    def create_branch(self, request, repo_id, branch):
        repository = self.repository(request, repo_id, write=True)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.at(request.json().get("startingPoint", "main"))
        return {}

    @route("POST", "/api/models/{id}/tag/{revision}")
    def create_tag(self, request, repo_id, revision):
        repository, tag = self.repository(request, repo_id, write=True), request.json()["tag"]
        if tag in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = repository.at(revision)
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        try:
            known = metadata(request.json()["content"])
        except ValueError as error:
            return Reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
        missing = "empty or missing yaml metadata in repo card"
        return {"errors": [], "warnings": [] if known else [{"message": missing}]}

    @route("POST", "/api/models/{id}/preupload/{revision}")
    def preupload(self, request, repo_id, revision):
        files, told = self.repository(request, repo_id, write=True).at(revision).files, []
        for file in request.json()["files"]:
            path = file["path"]
            large = self.lfs and (path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE)
            told.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            told[-1]["oid"] = files.get(path)
        return {"files": told}

    @route("POST", "/{id}.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo_id):
        repository, objects = self.repository(request, repo_id, write=True), []
        verify = {"href": f"{self.url}/{repo_id}.git/info/lfs/verify"}
        for item in request.json()["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if item["oid"] not in repository.objects:
                upload = {"href": f"{self.url}/storage/{repo_id}/{item['oid']}"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/storage/{id}/{oid}")
    def lfs_upload(self, request, repo_id, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "The content does not have this SHA-256")
        self.repositories[repo_id].objects[oid] = request.body
        return b""

    @route("POST", "/{id}.git/info/lfs/verify")
    def lfs_verify(self, request, repo_id):
        if request.json()["oid"] not in self.repository(request, repo_id, write=True).objects:
            raise Refusal(404, "Object not found")
        return {}

    @route("POST", "/api/models/{id}/commit/{branch}")
    def commit(self, request, repo_id, branch):
        header, *lines = map(json.loads, request.body.splitlines())
        done = self.repository(request, repo_id, write=True).push(branch, header["value"], lines)
        return {"success": True, "commitOid": done.id, "commitUrl": f"{self.url}/{repo_id}/commit/{done.id}"}

    @route("HEAD", "/{id}/resolve/{revision}/{path*}")
    @route("GET", "/{id}/resolve/{revision}/{path*}")
    def resolve(self, request, repo_id, revision, path):
        commit = (repository := self.repository(request, repo_id)).at(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        content = repository.objects[name := commit.files[path]]
        headers |= {"ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        if len(name) == 64:
            headers |= {"X-Linked-Etag": f'"{name}"', "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not wanted:
            return Reply(content, 200, headers)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if begin > end:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        return Reply(content[begin : end + 1], 206, headers)


class Handler(BaseHTTPRequestHandler):
    """HTTP for `HubServer.answer`; one request a connection, so that a stopped server is one at once."""

    def handle_request(self):
        hub, url = self.server.hub, urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        cut = hub.cut(self.command, url.path, length) if self.command == "PUT" else None
        body = self.rfile.read(length if cut is None else cut)
        user = hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        hub.requests.append((self.command, unquote(url.path)))
        if cut is not None:
            return  # the connection closes, without an answer and with a body half read
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, user, body)
        try:
            self.send(hub.answer(request))
        except Refusal as refusal:
            self.send(Reply(refusal.body, refusal.status, refusal.headers))

    def send(self, reply: Reply):
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            body = body[: self.server.hub.cut("GET", self.path, len(body))]
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass

    do_GET = do_HEAD = do_POST = do_PUT = handle_request
