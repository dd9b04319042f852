"""A Hub on this machine: the part of its protocol that `huggingface_hub` speaks to push and to load a model.

The client in the tests is the real one: what it sends (how many commits, which files, which token) and what
it makes of refusals and broken connections is tested, and not a mock's idea of it. There are accounts,
repositories, pre-upload, Git LFS ("basic" transfer to a store without tokens), commits as NDJSON, downloads,
and the Hub's errors. There is no Xet: uploads want HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".png")
DATE = "2026-01-01T00:00:00.000Z"
ROUTES = []


class Refusal(Exception):
    """A request that the server does not grant, with the code that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, **headers} | ({"X-Error-Code": code} if code else {})


@dataclass
class Request:
    """A client's request; `user` is None without a token that the server knows.

    The path of a Space's is that of a model's.
    """

    method: str
    path: str
    user: str | None
    body: bytes
    is_space: bool = False

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Reply:
    """The server's answer: bytes, or an object as JSON."""

    body: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """A state of a repository: the files' ids, a git blob's SHA-1 or an LFS object's SHA-256."""

    id: str
    title: str
    parent: "Commit | None"
    files: dict[str, str]


class Repository:
    """Branches, tags, commits and content of one model."""

    def __init__(self, private: bool):
        self.private, self.objects, self.commits = private, {}, []
        self.branches, self.tags = {}, {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", "initial commit", {".gitattributes": self.store(attributes.encode())})

    def store(self, content: bytes) -> str:
        """Keep the content of a file; returns what git calls it."""
        name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.objects[name] = content
        return name

    def commit(self, branch: str, title: str, files: dict[str, str]) -> Commit:
        parent = self.branches.get(branch)
        content = [len(self.commits), parent and parent.id, title, sorted(files.items())]
        name = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.branches[branch] = Commit(name, title, parent, files)
        self.commits.append(self.branches[branch])
        return self.branches[branch]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an id."""
        known = {commit.id: commit for commit in self.commits} | self.tags | self.branches
        if revision not in known:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[revision]

    def push(self, branch: str, title: str, lines: list[dict]) -> Commit:
        """One commit of all lines, or none."""
        files = dict(self.at(branch).files)
        for line in lines:
            path, value = line["value"]["path"], line["value"]
            if line["key"] == "file":
                files[path] = self.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile" and value["oid"] in self.objects:
                files[path] = value["oid"]
            elif line["key"] == "deletedFile" and path in files:
                del files[path]
            else:
                raise Refusal(400, f"No such object or file: {line}")
        return self.commit(branch, title, files)

    def tree(self, revision: str) -> list[dict]:
        """Every file as the tree API tells it."""
        entries = []
        for path, name in sorted(self.at(revision).files.items()):
            entries.append({"type": "file", "path": path, "oid": name, "size": len(self.objects[name])})
            if len(name) == 64:
                entries[-1]["lfs"] = {"oid": name, "size": entries[-1]["size"], "pointerSize": 130}
        return entries


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

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.spaces: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._cut = [0, 0]
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
        return self.content(self.repositories[repo_id], revision)

    def content(self, repository: Repository, revision: str = "main") -> dict[str, bytes]:
        """The same of a repository, such as one of `spaces`."""
        return {path: repository.objects[name] for path, name in repository.at(revision).files.items()}

    def commits(self, repo_id: str) -> list[Commit]:
        """The history of main, newest first; it ends with the "initial commit" that creates a repository."""
        history = [self.repositories[repo_id].at("main")]
        while history[-1].parent:
            history.append(history[-1].parent)
        return history

    def cut_after(self, size: int, times: int = 1):
        """Break the next connections that carry a larger LFS upload."""
        self._cut = [size, times]

    def cut(self, length: int) -> int | None:
        """How many bytes of an upload this connection lives; None if it is not to be cut."""
        with self.lock:
            size, times = self._cut
            if not times or length <= size:
                return None
            self._cut[1] -= 1
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
        known = self.spaces if request.is_space else self.repositories
        found, owner = known.get(repo_id), request.user == repo_id.split("/")[0]
        if found is None or (found.private and not owner):
            raise Refusal(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write and not owner:
            raise Refusal(403 if request.user else 401, "You may not write here")
        return found

    @route("POST", "/api/repos/create")
    def create_repo(self, request):
        options = request.json()
        owner = options.get("organization") or request.user
        if request.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if owner != request.user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{options['name']}"
        known = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        is_space = options.get("type") == "space"
        repositories = self.spaces if is_space else self.repositories
        if repo_id in repositories:
            return Reply(known | {"error": "You already created this repo"}, 409)
        if is_space and options.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, f"{options.get('sdk')} is no SDK of a Space")
        private = options.get("visibility") == "private" or bool(options.get("private"))
        repositories[repo_id] = Repository(private)
        return known

    @route("GET", "/api/models/{id}")
    @route("GET", "/api/models/{id}/revision/{revision}")
    def model_info(self, request, repo_id, revision="main"):
        repository = self.repository(request, repo_id)
        siblings = [{"rfilename": path} for path in sorted(repository.at(revision).files)]
        state = {"sha": repository.at(revision).id, "private": repository.private, "siblings": siblings}
        names = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]}
        return names | state | {"tags": [], "createdAt": DATE, "lastModified": DATE}

    @route("GET", "/api/models/{id}/tree/{revision}")
    def tree(self, request, repo_id, revision):
        return self.repository(request, repo_id).tree(revision)

    @route("POST", "/api/models/{id}/branch/{branch}")
    def create_branch(self, request, repo_id, branch):
        repository = self.repository(request, repo_id, write=True)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.at("main")
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
        front = re.match(r"---\n(.*?\n)---\n", request.json()["content"], re.DOTALL)
        said = yaml.safe_load(front[1]) if front else None
        valid = isinstance(said, dict)
        if valid and request.json()["repoType"] == "space":
            valid = said.get("sdk") == "gradio" and "sdk_version" in said and "app_file" in said
        return (
            {"errors": [], "warnings": []} if valid else Reply({"errors": [{"message": "no mapping"}]}, 400)
        )

    @route("POST", "/api/models/{id}/preupload/{revision}")
    def preupload(self, request, repo_id, revision):
        files, told = self.repository(request, repo_id, write=True).at(revision).files, []
        for file in request.json()["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            told[-1]["oid"] = files.get(file["path"])
        return {"files": told}

    @route("POST", "/{id}.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo_id):
        repository, objects = self.repository(request, repo_id, write=True), []
        for item in request.json()["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if item["oid"] not in repository.objects:
                upload = {"href": f"{self.url}/storage/{repo_id}/{item['oid']}"}
                objects[-1]["actions"] = {"upload": upload}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/storage/{id}/{oid}")
    def lfs_upload(self, request, repo_id, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "The content does not have this SHA-256")
        self.repositories[repo_id].objects[oid] = request.body
        return b""

    @route("POST", "/api/models/{id}/commit/{branch}")
    def commit(self, request, repo_id, branch):
        header, *lines = map(json.loads, request.body.splitlines())
        done = self.repository(request, repo_id, write=True).push(branch, header["value"]["summary"], lines)
        return {"success": True, "commitOid": done.id, "commitUrl": f"{self.url}/{repo_id}/commit/{done.id}"}

    @route("HEAD", "/{id}/resolve/{revision}/{path*}")
    @route("GET", "/{id}/resolve/{revision}/{path*}")
    def resolve(self, request, repo_id, revision, path):
        commit = (repository := self.repository(request, repo_id)).at(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        content = repository.objects[name := commit.files[path]]
        headers |= {"ETag": f'"{name}"'}
        if len(name) == 64:
            headers |= {"X-Linked-Etag": f'"{name}"', "X-Linked-Size": str(len(content))}
        return Reply(content, 200, headers)


class Handler(BaseHTTPRequestHandler):
    """HTTP for `HubServer.answer`; one request per connection, so that a stopped server is one at once."""

    def handle_request(self):
        hub, url = self.server.hub, urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        cut = hub.cut(length) if self.command == "PUT" else None
        body = self.rfile.read(length if cut is None else cut)
        user = hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        hub.requests.append((self.command, unquote(url.path)))
        if cut is not None:
            return  # the connection closes, without an answer and with a body half read
        path = re.sub(r"^/spaces/", "/", url.path.replace("/api/spaces/", "/api/models/"))
        request = Request(self.command, path, user, body, path != url.path)
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
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass

    do_GET = do_HEAD = do_POST = do_PUT = handle_request
