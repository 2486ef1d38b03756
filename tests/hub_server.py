"""A stand-in for the Hugging Face hub on loopback: its HTTP API, as huggingface_hub calls it.

Repositories live in memory: commits, branches, files in git and in large file storage (LFS). Large
files lie on a host of their own, as on the hub: the API redirects there, and whoever shows it a
token is refused.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import types
import urllib.parse

import yaml

LFS_SUFFIXES = (".safetensors", ".h5", ".bin")
KNOWN_LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "other"}
NO_REPO = ("RepoNotFound", "Repository not found")
LINES = "application/x-ndjson"


@dataclasses.dataclass(frozen=True)
class File:
    """A file in a commit."""

    data: bytes
    lfs: bool

    @property
    def oid(self):
        """git's hash of a regular file, sha256 of one in LFS: its ETag."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclasses.dataclass
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict = dataclasses.field(default_factory=dict)
    commits: dict = dataclasses.field(default_factory=dict)  # commit: {path: File}
    messages: list = dataclasses.field(default_factory=list)

    def commit(self, branch, files, message):
        parent = self.branches.get(branch)
        told = [parent, message, sorted((path, file.oid) for path, file in files.items())]
        commit = hashlib.sha1(json.dumps(told).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        self.messages.append(message)
        return commit

    def find(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


class Answer(Exception):
    """Ends a request: a status, headers, and a body."""

    def __init__(self, status, body=b"", **headers):
        super().__init__(status)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            self.headers["Content-Type"] = "application/json"
        self.body = body


def refused(status, code, message):
    return Answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)


class Hub:
    """The server, in a thread; its attributes are what it holds and what goes wrong."""

    def __init__(self):
        self.repositories = {}
        self.uploaded = {}  # LFS: sha256: bytes
        self.tokens = {"hf_me": "me", "hf_other": "other"}  # token: namespace it may write to
        self.seen = []  # of each request: method, path, authorization, body
        self.flip = None  # the byte of large files that is sent wrong
        self.cuts = []  # bytes after which the next large downloads break off
        self.down = None  # a status that everything is answered with
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.files_url = f"http://localhost:{self.server.server_port}"  # to clients another host
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def add(self, name, files, **fields):
        """Puts a repository there: its files by name, bytes."""
        repo = self.repositories.setdefault(name, Repository(**fields))
        made = {path: File(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        self.uploaded |= {file.oid: file.data for file in made.values() if file.lfs}
        return repo.commit("main", made, "by hand")

    def files(self, name, revision="main"):
        repo = self.repositories[name]
        return {path: file.data for path, file in repo.commits[repo.find(revision)].items()}

    def asked(self, method, part):
        return [r for r in self.seen if r.method == method and part in r.path]

    # What is answered: each method raises Answer.

    def answer(self, request):
        if self.down is not None:
            raise Answer(self.down, {"error": "down"})
        path = urllib.parse.unquote(request.path.partition("?")[0])
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == request.method:
                act(self, request, *found.groups())
        raise refused(404, "NotFound", f"no such endpoint: {request.method} {path}")

    def user(self, request, needed=True):
        token = request.authorization.removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise refused(401, "Unauthorized", "Invalid credentials in Authorization header")
        if needed and not token:
            raise refused(401, "Unauthorized", "Invalid username or password.")
        return self.tokens.get(token)

    def repository(self, request, name, write=False):
        user, repo = self.user(request, needed=False), self.repositories.get(name)
        mine = user == name.partition("/")[0]
        if repo is None or (repo.private and not mine):
            raise refused(404 if user else 401, *NO_REPO)
        if write and not mine:
            raise refused(403, "Forbidden", f"you may not write to {name}")
        return repo

    def create(self, request):
        user, asked = self.user(request), json.loads(request.body)
        owner = asked["organization"] or user
        if owner != user:
            raise refused(403, "Forbidden", f"you have no rights in the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        told = {"url": f"{self.url}/{name}", "id": name}
        if name in self.repositories:
            raise Answer(409, {**told, "error": "You already created this model repo"})
        private = asked.get("private") or asked.get("visibility") == "private"
        made = self.repositories[name] = Repository(private=bool(private))
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        made.commit("main", {".gitattributes": File(attributes, False)}, "initial commit")
        raise Answer(200, told)

    def validate(self, request):
        content = json.loads(request.body)["content"]
        about = yaml.safe_load(content.split("---\n")[1])
        errors = []
        if about.get("license") not in KNOWN_LICENSES:
            errors.append({"message": '"license" must be one of those that are known'})
        for model in about.get("model-index", []):
            for result in model["results"]:
                wanted = {"task": ["type"], "dataset": ["name", "type"]}
                for part, names in wanted.items():
                    errors += [{"message": f"{part}.{n}"} for n in names if n not in result[part]]
        raise Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, request, name, branch):
        repo = self.repository(request, name, write=True)
        if branch in repo.branches:
            raise Answer(409, {"error": f"Reference already exists: {branch}"})
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = repo.find(start)
        raise Answer(200, {})

    def info(self, request, name, revision=None):
        repo = self.repository(request, name)
        commit = self._commit(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        told = {"id": name, "modelId": name, "sha": commit, "private": repo.private}
        raise Answer(200, {**told, "tags": [], "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, request, name, revision):
        repo = self.repository(request, name)
        entries = []
        for path, file in repo.commits[self._commit(repo, revision)].items():
            entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 130}
            entries.append(entry)
        raise Answer(200, entries)

    def _commit(self, repo, revision):
        commit = repo.find(revision)
        if commit is None:
            raise refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def preupload(self, request, name, revision):
        repo = self.repository(request, name, write=True)
        there = repo.commits[self._commit(repo, revision)]
        told = []
        for asked in json.loads(request.body)["files"]:
            path = asked["path"]
            base64.b64decode(asked["sample"], validate=True)
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = there[path].oid if path in there else None
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": told})

    def batch(self, request, name):
        self.repository(request, name, write=True)
        asked = json.loads(request.body)
        assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
        objects = []
        for wanted in asked["objects"]:
            told = dict(wanted)
            if wanted["oid"] not in self.uploaded:
                told["actions"] = {
                    "upload": {"href": f"{self.files_url}/storage/{wanted['oid']}"},
                    "verify": {"href": f"{self.url}/{name}.git/info/lfs/verify"},
                }
            objects.append(told)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, request, oid):
        if request.authorization:
            raise Answer(400, b"a signed address takes no token")
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Answer(400, b"the content does not match its hash")
        self.uploaded[oid] = request.body
        raise Answer(200)

    def verify(self, request, name):
        self.repository(request, name, write=True)
        asked = json.loads(request.body)
        there = self.uploaded.get(asked["oid"])
        raise Answer(200 if there is not None and len(there) == asked["size"] else 404, {})

    def add_commit(self, request, name, branch):
        repo = self.repository(request, name, write=True)
        files = dict(repo.commits[self._commit(repo, branch)])
        lines = [json.loads(line) for line in request.body.splitlines()]
        assert (request.type, lines[0]["key"]) == (LINES, "header")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.uploaded:
                    raise refused(400, "BadRequest", f"{value['oid']} was not uploaded")
                files[value["path"]] = File(self.uploaded[value["oid"]], True)
            elif files.pop(value["path"], None) is None or line["key"] != "deletedFile":
                raise refused(404, "EntryNotFound", "A file with this name doesn't exist")
        commit = repo.commit(branch, files, lines[0]["value"]["summary"])
        url = f"{self.url}/{name}/commit/{commit}"
        raise Answer(
            200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}
        )

    def resolve(self, request, name, revision, path):
        repo = self.repository(request, name)
        if repo.gated:
            raise refused(403, "GatedRepo", f"Access to model {name} is restricted")
        commit = self._commit(repo, revision)
        file = repo.commits[commit].get(path)
        if file is None:
            missing = refused(404, "EntryNotFound", "Entry not found")
            missing.headers["X-Repo-Commit"] = commit
            raise missing
        if not file.lfs:  # to a copy that stays the same, on the same host
            raise Answer(307, Location=f"/api/resolve-cache/models/{name}/{commit}/{path}")
        linked = {"X_Linked_Etag": f'"{file.oid}"', "X_Linked_Size": str(len(file.data))}
        place = f"{self.files_url}/storage/{file.oid}"
        raise Answer(302, X_Repo_Commit=commit, Location=place, ETag=f'"{commit}"', **linked)

    def cached(self, request, name, commit, path):
        file = self.repository(request, name).commits[commit][path]
        raise Answer(200, file.data, X_Repo_Commit=commit, ETag=f'"{file.oid}"')

    def get(self, request, oid):
        if request.authorization:
            raise Answer(400, b"a signed address takes no token")
        data = bytearray(self.uploaded[oid])
        if self.flip is not None:
            data[self.flip] ^= 1
        found = re.fullmatch(r"bytes=(\d+)-", request.range)
        start = int(found[1]) if found else 0
        span = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        raise Answer(206 if start else 200, bytes(data[start:]), ETag=f'"{oid}"', **span)


NAME = "([^/]+/[^/]+)"
API = f"/api/models/{NAME}"
ROUTES = [
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.validate),
    ("POST", f"{API}/branch/(.+)", Hub.branch),
    ("GET", API, Hub.info),
    ("GET", f"{API}/revision/(.+)", Hub.info),
    ("GET", f"{API}/tree/([^/]+)", Hub.tree),
    ("POST", f"{API}/preupload/(.+)", Hub.preupload),
    ("POST", f"{API}/commit/(.+)", Hub.add_commit),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Hub.batch),
    ("POST", f"/{NAME}.git/info/lfs/verify", Hub.verify),
    ("PUT", "/storage/([0-9a-f]{64})", Hub.put),
    ("GET", "/storage/([0-9a-f]{64})", Hub.get),
    ("GET", f"/api/resolve-cache/models/{NAME}/([0-9a-f]{{40}})/(.+)", Hub.cached),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
]


def handler(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def handle_any(self):
            request = types.SimpleNamespace(
                method=self.command,
                path=self.path,
                authorization=self.headers.get("Authorization", ""),
                range=self.headers.get("Range", ""),
                type=self.headers.get("Content-Type", ""),
                body=self.body(),
                sent=0,
            )
            hub.seen.append(request)
            asked = types.SimpleNamespace(**vars(request))
            if request.method == "HEAD":
                asked.method = "GET"
            try:
                hub.answer(asked)
            except Answer as answer:
                with contextlib.suppress(OSError):
                    self.send(answer, request)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def body(self):
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def send(self, answer, request):
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if request.method == "HEAD":
                return
            body = answer.body
            if hub.cuts and "/storage/" in request.path and request.method == "GET":
                body = body[: hub.cuts.pop(0)]
            request.sent = self.wfile.write(body)

    return Handler
