"""A small Hub on the loopback interface that speaks the HTTP that huggingface_hub uses for model repositories: what a
test pushes or loads goes through real sockets, headers and status codes. (No package on PyPI serves these endpoints.)

All files are part of their commit: neither Git LFS nor Xet storage is there, so clients need `HF_HUB_DISABLE_XET=1`."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


def metadata(card: str) -> dict:
    """The YAML at the top of a model card."""
    match = re.match(r"^---\r?\n(.*?)\r?\n---(\r?\n|$)", card, re.DOTALL)
    return (yaml.safe_load(match.group(1)) or {}) if match else {}


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a model card, of what the Hub checks."""
    try:
        data = metadata(card)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = []
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", str(value)):
                errors.append(f'"{name}" with value "{value}" is not valid: use a repository id')
    if not isinstance(data.get("tags", []), list):
        errors.append('"tags" must be a list of strings')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required when the license is "other"')
    return errors


@dataclass
class Commit:
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit]
    branches: dict[str, str]


class HubServer:
    """
    The server and what it stores.

    Attributes:
        endpoint (`str`): address, for `HF_ENDPOINT`.
        token (`str`): the only token it accepts; it belongs to the user `user`.
        repositories (`dict[str, Repository]`): by id.
        requests (`list[str]`): `METHOD path` of every request so far.
    """

    token = "hf_LocalHubTokenForTests0123456789"
    user = "me"

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make a new process use this server."""
        flags = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, **flags}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a revision."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches.get(revision, revision)].files


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.body = self._read_body()
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {parts.path}")
            return self._route(parts.path)

    do_HEAD = do_POST = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str):
        repo, revision = r"(?P<repo_id>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
        for method, pattern, answer in (
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("POST", r"/api/repos/create", self._create),
            ("GET|HEAD", rf"/{repo}/resolve/{revision}/(?P<file>.+)", self._resolve),
            ("POST", rf"/api/models/{repo}/preupload/{revision}", self._preupload),
            ("POST", rf"/api/models/{repo}/commit/{revision}", self._commit),
            ("POST", rf"/api/models/{repo}/branch/(?P<branch>[^/]+)", self._branch),
            ("GET", rf"/api/models/{repo}/tree/{revision}(?:/(?P<folder>.+))?", self._tree),
            ("GET", rf"/api/models/{repo}(?:/revision/{revision})?", self._info),
        ):
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                if "repo_id" in arguments:
                    return self._open(answer, **arguments)
                return answer(**arguments)
        return self._error(404, "no such page")

    def _open(self, answer, repo_id: str, revision: str | None = None, **arguments):
        """Finds the repository and the commit, or answers with the Hub's own errors."""
        repository = self.hub.repositories.get(repo_id)
        if not self._authorised and (self.command == "POST" or repository is None or repository.private):
            return self._error(401, "Invalid username or password.", X_Error_Code="RepoNotFound")
        if repository is None:
            return self._error(404, "Repository not found", X_Error_Code="RepoNotFound")
        revision = revision or "main"
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            return self._error(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        self.repo_id, self.repository, self.revision, self.oid = repo_id, repository, revision, oid
        self.files = repository.commits[oid].files
        return answer(**arguments)

    def _send(self, status: int, body: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data, status: int = 200, **headers: str):
        self._send(status, json.dumps(data).encode(), Content_Type="application/json", **headers)

    def _error(self, status: int, message: str, **headers: str):
        self._json({"error": message}, status, X_Error_Message=message, **headers)

    @property
    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    # -- endpoints

    def _validate_yaml(self):
        errors = [{"message": message} for message in metadata_errors(json.loads(self.body)["content"])]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self):
        request = json.loads(self.body)
        if not self._authorised:
            return self._error(401, "Invalid username or password.")
        repo_id = f"{request.get('organization') or self.hub.user}/{request['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return self._json({"error": "You already created this model repo", **url}, 409)
        first = git_oid(repo_id.encode())
        private = request.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(private, {first: Commit("initial commit", {})}, {"main": first})
        return self._json(url)

    def _preupload(self):
        files = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            files.append({"path": path, "uploadMode": "regular", "shouldIgnore": False})
            if path in self.files:
                files[-1]["oid"] = git_oid(self.files[path])
        self._json({"files": files})

    def _commit(self):
        files, title = dict(self.files), ""
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                return self._error(400, f"{key} {value['path']} is not supported")
        oid = git_oid(self.oid.encode() + self.body)
        url = f"{self.hub.endpoint}/{self.repo_id}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        branches = self.repository.branches
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in branches)
            self.revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        self.repository.commits[oid], branches[self.revision] = Commit(title, files), oid
        return self._json(answer)

    def _branch(self, branch):
        if branch in self.repository.branches:
            return self._error(409, "Reference already exists")
        self.repository.branches[branch] = self.oid
        return self._json({"ref": f"refs/heads/{branch}"})

    def _tree(self, folder):
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path, content in self.files.items():
            name, slash, _ = path.removeprefix(prefix).partition("/")
            if not path.startswith(prefix):
                continue
            if slash:
                entries[name] = {"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0}
            if recursive or not slash:
                entries[path] = {"type": "file", "path": path, "oid": git_oid(content), "size": len(content)}
        if folder and not entries:
            return self._error(404, f"{folder} does not exist", X_Error_Code="EntryNotFound")
        return self._json(list(entries.values()))

    def _info(self):
        data = metadata(self.files.get("README.md", b"").decode())
        about = {name: data.get(name) for name in ("pipeline_tag", "library_name")}
        about |= {"id": self.repo_id, "modelId": self.repo_id, "sha": self.oid, "private": self.repository.private}
        about |= {"tags": data.get("tags", []), "cardData": data, "gated": False, "disabled": False}
        self._json({**about, "siblings": [{"rfilename": path} for path in self.files]})

    def _resolve(self, file):
        headers = {"X_Repo_Commit": self.oid}
        if file not in self.files:
            return self._error(404, "Entry not found", X_Error_Code="EntryNotFound", **headers)
        return self._send(200, self.files[file], ETag=f'"{git_oid(self.files[file])}"', **headers)
