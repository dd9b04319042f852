"""What the tests' Hub keeps of a model: content, commits, branches and tags."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime

import yaml

LFS_SUFFIXES = (".safetensors", ".png")


class Refusal(Exception):
    """A request that the server does not grant, with the code that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, **headers} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class Commit:
    """A state of a repository: the files' ids, a git blob's SHA-1 or an LFS object's SHA-256."""

    id: str
    title: str
    message: str
    parent: "Commit | None"
    files: dict[str, str]
    date: str


def blob_id(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Branches, tags, commits and content of one model."""

    def __init__(self, private: bool):
        self.private, self.objects, self.commits = private, {}, []
        self.branches, self.tags = {}, {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", "initial commit", "", {".gitattributes": self.store(attributes.encode())})

    def store(self, content: bytes) -> str:
        self.objects[blob_id(content)] = content
        return blob_id(content)

    def commit(self, branch: str, title: str, message: str, files: dict[str, str]) -> Commit:
        parent = self.branches.get(branch)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        content = [len(self.commits), parent and parent.id, title, message, sorted(files.items()), date]
        name = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.branches[branch] = Commit(name, title, message, parent, files, date)
        self.commits.append(self.branches[branch])
        return self.branches[branch]

    def push(self, branch: str, header: dict, lines: list[dict]) -> Commit:
        """One commit of all lines, or none."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.branches[branch]
        if not head.id.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = head.files
        for line in lines:
            files = self.changed(files, line["key"], line["value"])
        return self.commit(branch, header["summary"], header["description"], files)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an id."""
        known = {commit.id: commit for commit in self.commits} | self.tags | self.branches
        if revision not in known:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[revision]

    def file(self, path: str, name: str) -> dict:
        """A file as the tree API tells it."""
        size = len(self.objects[name])
        if len(name) == 40:
            return {"type": "file", "path": path, "oid": name, "size": size}
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            name.encode(),
            size,
        )
        lfs = {"oid": name, "size": size, "pointerSize": len(pointer)}
        return {"type": "file", "path": path, "oid": blob_id(pointer), "size": size, "lfs": lfs}

    def info(self, revision: str, metadata_of_files: bool) -> dict:
        """What the Hub tells of the model at a revision, `README.md`'s metadata among it."""
        commit, siblings = self.at(revision), []
        for path, name in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if metadata_of_files:
                known = self.file(path, name)
                siblings[-1] |= {"size": known["size"], "blobId": known["oid"]}
                if lfs := known.get("lfs"):
                    siblings[-1]["lfs"] = lfs | {"sha256": lfs["oid"]}
        card = metadata(self.objects.get(commit.files.get("README.md"), b"").decode()) or {}
        told = {key: card[key] for key in ("tags", "library_name", "pipeline_tag") if key in card}
        dates = {"createdAt": self.commits[0].date, "lastModified": commit.date}
        state = {"sha": commit.id, "private": self.private, "gated": False, "disabled": False}
        return {"tags": [], "siblings": siblings, "cardData": card} | state | dates | told

    def tree(self, revision: str, folder: str, recursive: bool) -> list[dict]:
        """Files and folders below `folder`, "" for all."""
        prefix = f"{folder}/" if folder else ""
        inside = {path: name for path, name in self.at(revision).files.items() if path.startswith(prefix)}
        if not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        parents = {path[: slash.start()] for path in inside for slash in re.finditer("/", path)}
        entries = [self.file(path, name) for path, name in inside.items()]
        entries += [
            {"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0}
            for path in parents
            if path.startswith(prefix)
        ]
        direct = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        return sorted(entries if recursive else direct, key=lambda entry: entry["path"])

    def changed(self, files: dict[str, str], key: str, value: dict) -> dict[str, str]:
        """The files after one line of a commit."""
        path = value["path"]
        if key == "file":
            return files | {path: self.store(base64.b64decode(value["content"]))}
        if key == "lfsFile":
            if value["oid"] not in self.objects:
                raise Refusal(400, f"LFS pointer of {path} points to an object that was not uploaded")
            return files | {path: value["oid"]}
        left = {
            name: content
            for name, content in files.items()
            if name != path and not (key == "deletedFolder" and name.startswith(path.rstrip("/") + "/"))
        }
        if left == files:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return left


def metadata(card: str) -> dict | None:
    """The YAML front matter of a model card, None if there is none; ValueError unless it is a mapping."""
    found = re.match(r"---\s*\n(.*?\n)?---\s*(\n|$)", card, re.DOTALL)
    if not found:
        return None
    try:
        values = yaml.safe_load(found[1] or "")
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(values, dict):
        raise ValueError(f'"metadata" must be a mapping, not {values!r}')
    return values
