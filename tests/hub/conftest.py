"""A Hub on loopback: what the real `huggingface_hub` client needs of huggingface.co, in one process and in memory.

Git is reduced to what the client can see: a branch is a list of commits, a commit is a table of files, and a file is
its bytes, under the name that git (SHA-1 of a blob) or LFS (SHA-256) would give them. An endpoint that is not here
answers 501, so that a test notices.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKEN = "dummy"
USER = "user"
DATE = "2025-01-01T00:00:00.000Z"
LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".model"}
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """What the client compares with its own file."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict:
        size = len(self.content)
        info = {"type": "file", "path": path, "size": size, "oid": self.oid}
        if self.lfs:
            pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.oid.encode(),
                size,
            )
            info |= {"oid": File(pointer).oid, "lfs": {"oid": self.oid, "size": size, "pointerSize": len(pointer)}}
        return info


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        history = self.branches.setdefault(branch, [])
        state = json.dumps([branch, len(history), title, {path: file.oid for path, file in sorted(files.items())}])
        history.append(Commit(hashlib.sha1(state.encode()).hexdigest(), title, files))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for history in self.branches.values() for commit in history)
        return next((commit for commit in commits if commit.oid == revision), None)


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: Commit | None = None, **body):
        self.status, self.body = status, {"error": message or code, **body}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message or code}
        if commit:
            self.headers["X-Repo-Commit"] = commit.oid


class Hub(ThreadingHTTPServer):
    """Repositories by id, uploaded LFS objects by SHA-256, and what came in."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        """Method and path of every request."""
        self.fails_at: str | None = None
        """`upload`, in whose middle the connection breaks, or `commit`, which is refused."""
        self.lock = threading.RLock()

    def clear(self) -> None:
        with self.lock:
            self.fails_at = None
            for kept in (self.repositories, self.objects, self.requests):
                kept.clear()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of the files at a revision, by path."""
        return {path: file.content for path, file in self.repositories[repo_id].find(revision).files.items()}

    def commits(self, repo_id: str, branch: str = "main") -> list[str]:
        """The titles of a branch's commits, oldest first."""
        return [commit.title for commit in self.repositories[repo_id].branches[branch]]

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave, as the killed ones of the tests do
            super().handle_error(request, client_address)


ROUTES = []


def route(method: str, pattern: str):
    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


REPO = r"(?P<repo_id>[^/]+/[^/]+)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def _dispatch(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {url.path}")
        # HEAD is answered as GET, without the body.
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for known, pattern, function in ROUTES:
                if known == method and (match := pattern.fullmatch(url.path)):
                    groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    return function(self, **groups)
            raise Refused(501, "NotImplemented", f"{self.command} {url.path}")
        except Refused as refused:
            self._body()
            self.answer(refused.body, refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        del self.headers["Content-Length"], self.headers["Transfer-Encoding"]  # it has been read
        return body

    def answer(self, body=b"", status: int = 200, headers: dict[str, str] | None = None):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def authorize(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, message="Invalid username or password.")

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.server.repositories.get(repo_id)
        if write or (repository and repository.private):
            self.authorize()
        if repository is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repository

    def commit(self, repo_id: str, revision: str, write: bool = False) -> Commit:
        commit = self.repository(repo_id, write).find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        self.authorize()
        self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    @route("POST", "/api/repos/create")
    def create_repository(self):
        request = json.loads(self._body())
        self.authorize()
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        with self.server.lock:
            if repo_id in self.server.repositories:
                raise Refused(409, message="You already created this model repo", url=f"{self.server.url}/{repo_id}")
            # 1.x says it in a boolean, 2.x in a word.
            repository = Repository(private=bool(request.get("private")) or request.get("visibility") == "private")
            repository.commit("main", "initial commit", {".gitattributes": File(ATTRIBUTES)})
            self.server.repositories[repo_id] = repository
        self.answer({"url": f"{self.server.url}/{repo_id}"})

    @route("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
    def repository_info(self, repo_id, revision="main"):
        commit = self.commit(repo_id, revision)
        self.answer(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit.oid,
                "lastModified": DATE,
                "private": self.server.repositories[repo_id].private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    @route("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
    def create_branch(self, repo_id, branch):
        request = json.loads(self._body() or "{}")
        repository = self.repository(repo_id, write=True)
        start = self.commit(repo_id, request.get("startingPoint", "main"))
        with self.server.lock:
            if branch in repository.branches:
                raise Refused(409, message=f"Reference already exists: refs/heads/{branch}")
            history = next(commits for commits in repository.branches.values() if start in commits)
            repository.branches[branch] = history[: history.index(start) + 1]
        self.answer({})

    @route("GET", f"/api/models/{REPO}/refs")
    def references(self, repo_id):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": history[-1].oid}
            for name, history in self.repository(repo_id).branches.items()
        ]
        self.answer({"branches": branches, "converts": [], "tags": []})

    @route("GET", f"/api/models/{REPO}/commits/(?P<revision>[^/]+)")
    def history(self, repo_id, revision):
        self.commit(repo_id, revision)
        commits = reversed(self.repository(repo_id).branches[revision])
        authors = [{"user": USER}]
        self.answer([{"id": c.oid, "title": c.title, "message": "", "date": DATE, "authors": authors} for c in commits])

    # Reading

    @route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, repo_id, revision, folder=""):
        files = self.commit(repo_id, revision).files
        if not folder or folder in {str(parent) for path in files for parent in PurePosixPath(path).parents}:
            recursive = self.query.get("recursive") in (["true"], ["True"])
            entries = {}
            for path, file in files.items():
                below = PurePosixPath(path)
                if folder and PurePosixPath(folder) not in below.parents:
                    continue
                depth = len(PurePosixPath(folder).parts)
                for parent in below.parents:
                    if len(parent.parts) > depth and (recursive or len(parent.parts) == depth + 1):
                        oid = hashlib.sha1(str(parent).encode()).hexdigest()
                        entries[str(parent)] = {"type": "directory", "path": str(parent), "oid": oid, "size": 0}
                if recursive or len(below.parts) == depth + 1:
                    entries[path] = file.describe(path)
            return self.answer(list(entries.values()))
        raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")

    @route("POST", f"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, repo_id, revision):
        paths = parse_qs(self._body().decode())["paths"]
        files = self.commit(repo_id, revision).files
        self.answer([files[path].describe(path) for path in paths if path in files])

    @route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo_id, revision, path):
        commit = self.commit(repo_id, revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found", commit)
        file = commit.files[path]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        self.answer(file.content, headers=headers)

    # Writing

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        """The checks of the Hub that a card of ours could fail."""
        content = json.loads(self._body())["content"]
        match = re.match(r"---\n(.*?)\n---(\n|$)", content, flags=re.DOTALL)
        if match is None:
            return self.answer({"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []})
        try:
            data = yaml.safe_load(match[1])
            errors = find_metadata_errors(data) if isinstance(data, dict) else ["metadata must be a mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        body = {"warnings": [], "errors": [{"message": message} for message in errors]}
        self.answer(body, 400 if errors else 200)

    @route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo_id, revision):
        request = json.loads(self._body())
        present = self.commit(repo_id, revision, write=True).files
        answers = []
        for file in request["files"]:
            path = file["path"]
            sample = base64.b64decode(file["sample"])
            lfs = PurePosixPath(path).suffix in LFS_SUFFIXES or file["size"] > 10_000_000 or not is_text(sample)
            oid = present[path].oid if path in present else None
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def batch(self, repo_id):
        request = json.loads(self._body())
        self.repository(repo_id, write=True)
        objects = []
        for wanted in request["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self.server.objects:
                actions = {"upload": f"{self.server.url}/lfs/{wanted['oid']}"}
                actions["verify"] = f"{self.server.url}/{repo_id}.git/info/lfs/objects/verify"
                objects[-1]["actions"] = {name: {"href": href} for name, href in actions.items()}
        self.answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def upload(self, oid):
        if self.server.fails_at == "upload":
            self.rfile.read(100)
            self.close_connection = True
            # With data unread the kernel resets the connection, as a network that breaks does.
            return self.connection.close()
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(422, message="The content is not that of its name")
        self.server.objects[oid] = content
        self.answer()

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
    def verify(self, repo_id):
        request = json.loads(self._body())
        self.repository(repo_id, write=True)
        if len(self.server.objects.get(request["oid"], b"")) != request["size"]:
            raise Refused(404, message="Object not found")
        self.answer()

    @route("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
    def create_commit(self, repo_id, revision):
        lines = [json.loads(line) for line in self._body().splitlines()]
        if self.server.fails_at == "commit":
            raise Refused(403, message="You may not write here.")
        with self.server.lock:
            head = self.commit(repo_id, revision, write=True)
            files = dict(head.files)
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit", head.oid) != head.oid:
                        raise Refused(412, message="A commit has happened since.")
                elif key == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if value["oid"] not in self.server.objects:
                        raise Refused(422, message=f"LFS object {value['oid']} was not uploaded")
                    files[value["path"]] = File(self.server.objects[value["oid"]], lfs=True)
                elif key == "deletedFile":
                    del files[value["path"]]
                else:
                    raise Refused(501, "NotImplemented", key)
            commit = self.repository(repo_id).commit(revision, title, files)
        url = f"{self.server.url}/{repo_id}/commit/{commit.oid}"
        self.answer({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})


def is_text(sample: bytes) -> bool:
    # The sample may end inside a character.
    with suppress(UnicodeDecodeError):
        sample.decode()
        return True
    return b"\0" not in sample


def find_metadata_errors(data: dict) -> list[str]:
    errors = []
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be a list of strings')
    languages = data.get("language", [])
    for language in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", str(language)):
            errors.append(f'"language" must only contain ISO codes, not {language!r}')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            for name, required in {"task": {"type"}, "dataset": {"type", "name"}}.items():
                if missing := required - result.get(name, {}).keys():
                    errors.append(f'"model-index[0].results[0].{name}.{missing.pop()}" is required')
            for metric in result.get("metrics", [{}]):
                if missing := {"type", "value"} - metric.keys():
                    errors.append(f'"model-index[0].results[0].metrics[0].{missing.pop()}" is required')
    return errors


@pytest.fixture(scope="session")
def server():
    """The [`Hub`] of the session."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(server):
    """The [`Hub`], empty."""
    server.clear()
    return server


@pytest.fixture(scope="session")
def hub_environment(server, tmp_path_factory) -> dict[str, str]:
    """The environment of a process whose Hub is `server`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return environment | {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf-home")),
    }


@pytest.fixture(scope="session")
def plain_site(tmp_path_factory):
    """A folder of installed packages in which this one is missing, for a machine without a compiler."""
    folder = tmp_path_factory.mktemp("site")
    for path in map(Path, sys.path):
        for entry in path.iterdir() if path.name == "site-packages" else ():
            is_left_out = entry.name.lower().startswith(("hf_rskip", "__editable__"))
            if not is_left_out and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@contextmanager
def warm_process(options, modules, environment, folder):
    """Yields a function that runs Python code in a folder, in a fork of a process that has imported modules (see
    `tests/warm_python.py`); it returns `code`, `out` and `err`."""
    python = [sys.executable, *options, Path(__file__).parents[1] / "warm_python.py", folder / "socket"]
    server = subprocess.Popen(
        [*python, "--serve", *modules], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    server.stdout.readline()

    def run(code: str, folder) -> SimpleNamespace:
        command = [python[0], "-ISE", *python[-2:], "-c", code]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        return SimpleNamespace(code=result.returncode, out=result.stdout, err=result.stderr)

    yield run
    server.communicate()


@pytest.fixture(scope="session")
def process_without_package(hub_environment, plain_site, tmp_path_factory):
    environment = hub_environment | {"PYTHONPATH": str(plain_site), "PATH": ""}
    modules = "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"
    with warm_process(["-S"], modules, environment, tmp_path_factory.mktemp("plain")) as run:
        yield run


@pytest.fixture
def run_without_package(process_without_package, tmp_path):
    """Runs Python code where this package is not installed, and no compiler is on the path; see [`warm_process`]."""
    return lambda code: process_without_package(code, tmp_path)


@pytest.fixture(scope="session")
def run_with_package(hub_environment, tmp_path_factory):
    """Runs Python code in an environment like this one; see [`warm_process`]."""
    folder = tmp_path_factory.mktemp("full")
    with warm_process([], ["hf_rskip.training.train", "hf_rskip.hub.push"], hub_environment, folder) as run:
        yield lambda code: run(code, folder)


@pytest.fixture
def cli(hub, run_with_package):
    """Runs `hf-rskip` as a user of `hub`; returns `code`, `out` and `err`."""

    def run(*words) -> SimpleNamespace:
        argv = [str(word) for word in words]
        return run_with_package(f"import sys\nfrom hf_rskip.cli import main\nsys.exit(main({argv!r}))")

    return run
