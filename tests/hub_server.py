"""A small Hub on the loopback interface that speaks the HTTP that huggingface_hub uses for model repositories: what a
test pushes or loads goes through real sockets, headers and status codes. (No package on PyPI serves these endpoints.)

Large files go through Git LFS as on the Hub; Xet storage is not there, so clients need `HF_HUB_DISABLE_XET=1`."""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
LFS_SIZE = 10_000_000

# Fields of a model card's metadata whose type the Hub checks.
TEXT_OR_TEXTS = (str, list)
METADATA_TYPES = {
    "library_name": str,
    "pipeline_tag": str,
    "license": TEXT_OR_TEXTS,
    "license_name": str,
    "license_link": str,
    "base_model": TEXT_OR_TEXTS,
    "base_model_relation": str,
    "datasets": TEXT_OR_TEXTS,
    "language": TEXT_OR_TEXTS,
    "tags": list,
    "model-index": list,
}
BASE_MODEL_RELATIONS = ("adapter", "merge", "quantized", "finetune")
PIPELINE_TAGS = ("image-text-to-text", "feature-extraction", "text-generation", "image-feature-extraction")


def metadata_errors(content: str) -> list[str]:
    """What is wrong with the YAML at the top of a model card."""
    match = re.match(r"^---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is not a mapping"]
    errors = []
    for name, value in data.items():
        wanted = METADATA_TYPES.get(name)
        if wanted is not None and not isinstance(value, wanted):
            errors.append(f'"{name}" is of type {type(value).__name__}')
        elif isinstance(value, list) and wanted in (TEXT_OR_TEXTS, list) and name != "model-index":
            errors += [f'"{name}[{i}]" must be a string' for i, item in enumerate(value) if not isinstance(item, str)]
    if data.get("base_model_relation", "adapter") not in BASE_MODEL_RELATIONS:
        errors.append('"base_model_relation" must be one of ' + ", ".join(BASE_MODEL_RELATIONS))
    if data.get("pipeline_tag", PIPELINE_TAGS[0]) not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" {data["pipeline_tag"]} is not known')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required when the license is "other"')
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if isinstance(value, str) and not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", value):
                errors.append(f'"{key}" with value "{value}" is not valid: use a repository id')
    for index, model in enumerate(data.get("model-index") or []):
        if not isinstance(model, dict) or "name" not in model or not isinstance(model.get("results"), list):
            errors.append(f'"model-index[{index}]" needs "name" and "results"')
            continue
        for result in model["results"]:
            if "type" not in result.get("task", {}):
                errors.append(f'"model-index[{index}].results.task.type" is required')
            if not {"type", "name"} <= set(result.get("dataset", {})):
                errors.append(f'"model-index[{index}].results.dataset" needs "type" and "name"')
            for metric in result.get("metrics", []):
                if "type" not in metric or not isinstance(metric.get("value"), int | float | str):
                    errors.append(f'"model-index[{index}].results.metrics" needs "type" and a "value"')
    return errors


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]
    parent: "Commit | None" = None


@dataclass
class Repository:
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    pull_requests: int = 0

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision]
        for commit in self.branches.values():
            while commit is not None:
                if commit.oid == revision:
                    return commit
                commit = commit.parent
        return None


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
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[int, str]] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        # large files are served from another host, as on the Hub
        self.storage = f"http://localhost:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make a new process use this server."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def fail(self, status: int, pattern: str):
        """Answer the next request whose `METHOD path` matches `pattern` with an error status."""
        self.faults.append((status, pattern))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a revision, large files included."""
        commit = self.repositories[repo_id].find(revision)
        return {path: self.content(blob) for path, blob in commit.files.items()}

    def content(self, blob: bytes) -> bytes:
        oid = lfs_oid(blob)
        return blob if oid is None else self.lfs[oid]


def lfs_pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def lfs_oid(blob: bytes) -> str | None:
    match = re.match(rb"version https://git-lfs\S+\noid sha256:(\w{64})\n", blob)
    return match and match.group(1).decode()


def git_oid(blob: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    # -- plumbing

    def _dispatch(self):
        self.body = self._read_body()
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = parts.path
        line = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = next((fault for fault in self.hub.faults if fnmatch.fnmatch(line, fault[1])), None)
            if fault is None:
                return self._route(path)
            self.hub.faults.remove(fault)
        return self._error(fault[0], "injected by the test")

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
        repository = r"(?P<repo>[\w.-]+/[\w.-]+)"
        api = rf"/api/models/{repository}"
        for method, pattern, answer in (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("POST", r"/api/repos/create", self._create),
            ("POST", rf"/{repository}\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/lfs/(?P<oid>\w{64})", self._lfs_put),
            ("GET", r"/lfs/(?P<oid>\w{64})", self._lfs_get),
            ("GET|HEAD", rf"/{repository}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
            ("POST", rf"{api}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("POST", rf"{api}/commit/(?P<revision>[^/]+)", self._commit),
            ("POST", rf"{api}/branch/(?P<branch>[^/]+)", self._branch),
            ("GET", rf"{api}/refs", self._refs),
            ("GET", rf"{api}/commits/(?P<revision>[^/]+)", self._commits),
            ("GET", rf"{api}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", self._tree),
            ("POST", rf"{api}/paths-info/(?P<revision>[^/]+)", self._paths_info),
            ("GET", rf"{api}(?:/revision/(?P<revision>[^/]+))?", self._info),
        ):
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                if "repo" in arguments:
                    writes = answer in (self._preupload, self._commit, self._branch, self._lfs_batch)
                    arguments["repo"] = self._open(arguments["repo"], writes)
                    if arguments["repo"] is None:
                        return None
                return answer(**arguments)
        return self._error(404, "no such page")

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

    def _open(self, repo_id: str, writes: bool) -> Repository | None:
        """The repository, or an answer with the Hub's own errors."""
        repository = self.hub.repositories.get(repo_id)
        if not self._authorised and (writes or repository is None or repository.private):
            return self._error(401, "Invalid username or password.", X_Error_Code="RepoNotFound")
        if repository is None:
            return self._error(404, "Repository not found", X_Error_Code="RepoNotFound")
        self.repo_id = repo_id
        return repository

    def _find(self, repo: Repository, revision: str | None) -> Commit | None:
        commit = repo.find(revision or "main")
        if commit is None:
            self._error(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        return commit

    # -- endpoints

    def _whoami(self):
        if not self._authorised:
            return self._error(401, "Invalid credentials in Authorization header")
        return self._json({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def _validate_yaml(self):
        request = json.loads(self.body)
        errors = [{"message": message} for message in metadata_errors(request["content"])]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self):
        request = json.loads(self.body)
        if not self._authorised:
            return self._error(401, "Invalid username or password.")
        repo_id = f"{request.get('organization') or self.hub.user}/{request['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return self._json({"error": "You already created this model repo", **url}, 409)
        first = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", {})
        self.hub.repositories[repo_id] = Repository(request.get("visibility") == "private", {"main": first})
        return self._json(url)

    def _preupload(self, repo, revision):
        commit = self._find(repo, revision)
        if commit is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] > LFS_SIZE or any(fnmatch.fnmatch(file["path"], p) for p in LFS_PATTERNS)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            blob = commit.files.get(file["path"])
            if blob is not None:
                answer["oid"] = lfs_oid(blob) or git_oid(blob)
            files.append(answer)
        self._json({"files": files})

    def _lfs_batch(self, repo):
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs:
                answer["actions"] = {"upload": {"href": f"{self.hub.storage}/lfs/{item['oid']}", "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the content does not have this digest")
        self.hub.lfs[oid] = self.body
        return self._send(200)

    def _commit(self, repo, revision):
        create_pr = self.query.get("create_pr") == ["1"]
        parent = self._find(repo, revision)
        if parent is None:
            return
        files = dict(parent.files)
        title = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self._error(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = lfs_pointer(value["oid"], len(self.hub.lfs[value["oid"]]))
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                return self._error(400, f"{item['key']} is not supported here")
        oid = hashlib.sha1(parent.oid.encode() + self.body).hexdigest()
        branch = revision
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{self.repo_id}/commit/{oid}"}
        if create_pr:
            repo.pull_requests += 1
            branch = f"refs/pr/{repo.pull_requests}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{self.repo_id}/discussions/{repo.pull_requests}"
        repo.branches[branch] = Commit(oid, title, files, parent)
        self._json(answer)

    def _branch(self, repo, branch):
        if branch in repo.branches:
            return self._error(409, "Reference already exists")
        commit = self._find(repo, json.loads(self.body or b"{}").get("startingPoint"))
        if commit is None:
            return
        repo.branches[branch] = commit
        self._json({"ref": f"refs/heads/{branch}"})

    def _refs(self, repo):
        refs = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, commit in repo.branches.items():
            kind, ref = ("pullRequests", name) if name.startswith("refs/pr/") else ("branches", f"refs/heads/{name}")
            refs[kind].append({"name": name, "ref": ref, "targetCommit": commit.oid})
        self._json(refs)

    def _commits(self, repo, revision):
        commit = self._find(repo, revision)
        if commit is None:
            return
        history = []
        while commit is not None:
            history.append(
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": "",
                    "authors": [{"user": self.hub.user}],
                    "date": "2025-01-01T00:00:00.000Z",
                }
            )
            commit = commit.parent
        self._json(history)

    def _entry(self, path: str, blob: bytes) -> dict:
        entry = {"type": "file", "path": path, "oid": git_oid(blob), "size": len(self.hub.content(blob))}
        if oid := lfs_oid(blob):
            entry["lfs"] = {"oid": oid, "size": entry["size"], "pointerSize": len(blob)}
        return entry

    def _tree(self, repo, revision, folder):
        commit = self._find(repo, revision)
        if commit is None:
            return
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            return self._error(404, f"{folder} does not exist", X_Error_Code="EntryNotFound")
        folders = {path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path.removeprefix(prefix)}
        entries = [{"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in folders]
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries += [
            self._entry(path, blob)
            for path, blob in inside.items()
            if recursive or "/" not in path.removeprefix(prefix)
        ]
        self._json(entries)

    def _paths_info(self, repo, revision):
        commit = self._find(repo, revision)
        if commit is None:
            return
        paths = parse_qs(self.body.decode()).get("paths", [])
        self._json([self._entry(path, commit.files[path]) for path in paths if path in commit.files])

    def _info(self, repo, revision):
        commit = self._find(repo, revision)
        if commit is None:
            return
        card = commit.files.get("README.md", b"").decode()
        match = re.match(r"^---\n(.*?)\n---", card, re.DOTALL)
        data = yaml.safe_load(match.group(1)) if match else {}
        self._json(
            {
                "id": self.repo_id,
                "modelId": self.repo_id,
                "sha": commit.oid,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "tags": data.get("tags", []),
                "pipeline_tag": data.get("pipeline_tag"),
                "library_name": data.get("library_name"),
                "cardData": data,
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    def _resolve(self, repo, revision, file):
        commit = self._find(repo, revision)
        if commit is None:
            return
        blob = commit.files.get(file)
        if blob is None:
            return self._error(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X_Repo_Commit": commit.oid}
        oid = lfs_oid(blob)
        if oid is None:
            return self._send(200, blob, ETag=f'"{git_oid(blob)}"', **headers)
        return self._send(
            302,
            Location=f"{self.hub.storage}/lfs/{oid}",
            X_Linked_Size=str(len(self.hub.lfs[oid])),
            X_Linked_Etag=f'"{oid}"',
            **headers,
        )

    def _lfs_get(self, oid):
        if oid not in self.hub.lfs:
            return self._error(404, "no such object")
        return self._send(200, self.hub.lfs[oid], ETag=f'"{oid}"')
