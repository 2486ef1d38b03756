"""A stand-in for the Hugging Face hub on loopback: what one push and one pull ask of its HTTP API.

Large files lie on a host of their own (localhost, to clients another than 127.0.0.1), as on the
hub: the API redirects there, and a request that shows that host a token is refused. Its /files
also serve what torchvision's host does.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import types
import urllib.parse

import yaml

LARGE = (".safetensors", ".bin")
ME = "Bearer hf_me"


def oid(name, data):
    """The sha256 of a large file, git's hash of another one."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Answer(Exception):
    def __init__(self, status, body=b"", **headers):
        super().__init__(status)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def refused(status, code):
    return Answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)


class Hub:
    """The server, in a thread; its attributes are what it holds and what goes wrong."""

    def __init__(self):
        self.branches = {}  # (repository, branch): commit
        self.commits = {}  # commit: {path: bytes}
        self.private = set()  # repositories that "me" alone may see, and only its own
        self.uploaded = {}  # path on the host of large files: bytes
        self.seen = []  # of each request: method, path, authorization, range, sent
        self.flip = None  # index of the byte of large files that is sent wrong
        self.cuts = []  # bytes after which the next large downloads break off
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.files_url = f"http://localhost:{self.server.server_port}/files"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def add(self, name, files, branch="main"):
        """Makes a commit of files {name: bytes}; returns its id."""
        told = [name, branch, *sorted((path, oid(path, data)) for path, data in files.items())]
        commit = hashlib.sha1(repr(told).encode()).hexdigest()
        self.commits[commit], self.branches[name, branch] = dict(files), commit
        self.uploaded |= {oid(k, v): v for k, v in files.items() if k.endswith(LARGE)}
        return commit

    def files(self, name, branch="main"):
        return self.commits[self.branches[name, branch]]

    def answer(self, request):
        path = urllib.parse.unquote(request.path.partition("?")[0])
        for method, pattern, act in ROUTES:
            parts = re.fullmatch(pattern, path)
            if parts and method == request.method.replace("HEAD", "GET"):
                act(self, request, *parts.groups())
        raise refused(404, f"no such endpoint: {request.method} {path}")

    def find(self, request, name, revision="main", write=False):
        """The commit, to who may see it."""
        mine = request.authorization == ME and name.startswith("me/")
        if (name, "main") not in self.branches or (name in self.private and not mine):
            raise refused(404, "RepoNotFound")
        if write and not mine:
            raise refused(403, "Forbidden")
        commit = self.branches.get((name, revision), revision)
        if commit not in self.commits:
            raise refused(404, "RevisionNotFound")
        return commit

    def create(self, request):
        asked = json.loads(request.body)
        if request.authorization != ME or asked["organization"] not in (None, "me"):
            raise refused(403, "Unauthorized")
        name = f"me/{asked['name']}"
        if (name, "main") not in self.branches:
            self.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
        raise Answer(200, {"url": f"{self.url}/{name}", "id": name})

    def validate(self, request):
        about = yaml.safe_load(json.loads(request.body)["content"].split("---\n")[1])
        known = about["license"] in ("apache-2.0", "mit")
        wrong = [] if known else [{"message": '"license" must be known'}]
        raise Answer(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def branch(self, request, name, branch):
        self.branches.setdefault((name, branch), self.find(request, name, write=True))
        raise Answer(200, {})

    def info(self, request, name, revision="main"):
        commit = self.find(request, name, revision)
        siblings = [{"rfilename": path} for path in self.commits[commit]]
        raise Answer(200, {"id": name, "sha": commit, "siblings": siblings})

    def tree(self, request, name, revision):
        entries = []
        for path, data in self.commits[self.find(request, name, revision)].items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": oid(path, data)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": oid(path, data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        raise Answer(200, entries)

    def preupload(self, request, name, revision):
        paths = [asked["path"] for asked in json.loads(request.body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        told = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
        raise Answer(200, {"files": told})

    def batch(self, request, name):
        told = [
            {**wanted, "actions": {"upload": {"href": f"{self.files_url}/{wanted['oid']}"}}}
            for wanted in json.loads(request.body)["objects"]
        ]
        raise Answer(200, {"transfer": "basic", "objects": told})

    def commit(self, request, name, branch):
        files = dict(self.commits[self.find(request, name, branch, write=True)])
        for line in map(json.loads, request.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.add(name, files, branch)
        url = f"{self.url}/{name}/commit/{commit}"
        raise Answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def resolve(self, request, name, revision, path):
        commit = self.find(request, name, revision)
        data = self.commits[commit].get(path)
        if data is None:
            raise refused(404, "EntryNotFound")
        headers = {"X_Repo_Commit": commit, "ETag": f'"{oid(path, data)}"'}
        if not path.endswith(LARGE):
            raise Answer(200, data, **headers)
        headers |= {"X_Linked_Etag": headers["ETag"], "X_Linked_Size": str(len(data))}
        raise Answer(302, Location=f"{self.files_url}/{oid(path, data)}", **headers)

    def large(self, request, path):
        if request.authorization:
            raise Answer(400, b"a signed address takes no token")
        if request.method == "PUT":
            self.uploaded[path] = request.body
            raise Answer(200)
        if path not in self.uploaded:
            raise Answer(404)
        data = bytearray(self.uploaded[path])
        if self.flip is not None:
            data[self.flip] ^= 1
        start = int(request.range.removeprefix("bytes=").rstrip("-") or 0)
        if start >= len(data):
            raise Answer(416)
        span = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        raise Answer(206 if start else 200, bytes(data[start:]), **span)


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
    ("POST", f"{API}/commit/(.+)", Hub.commit),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Hub.batch),
    ("GET", "/files/(.+)", Hub.large),
    ("PUT", "/files/(.+)", Hub.large),
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
                body=self.rfile.read(int(self.headers.get("Content-Length", 0))),
                sent=0,
            )
            hub.seen.append(request)
            try:
                hub.answer(request)
            except Answer as answer:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                body = b"" if request.method == "HEAD" else answer.body
                if hub.cuts and request.method == "GET" and request.path.startswith("/files/"):
                    body = body[: hub.cuts.pop(0)]
                request.sent = self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

    return Handler
