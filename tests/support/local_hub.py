"""A Hugging Face Hub on loopback that speaks the real protocol, and fails on request.

    with LocalHub(tmp_path) as hub:
        sha = hub.commit("org/model", folder, tag="v1")
        hub.faults.append({"path": r"safetensors$", "method": "GET", "status": 503, "times": 2})
        hub.webhooks.append(Webhook("http://127.0.0.1:4300/webhook", "the secret"))  # told of every commit from here on
        # ... run code under HF_ENDPOINT=hub.url ...

By hand: python -m tests.support.local_hub --port 8911 --root /tmp/hub --repo org/name=FOLDER \\
             --webhook http://127.0.0.1:4300/webhook --secret S
"""

import argparse
import asyncio
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.hub_storage import LFS, Blob, Refusal, Repo
from tests.support.hub_webhooks import Delivered, Webhook, deliver, payload
from tests.support.hub_writes import write

API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs|auth-check))?(?:/([^/]+))?(/.*)?"
)
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Logged(NamedTuple):
    """One answered request."""

    method: str
    path: str
    status: int
    range: str | None
    user: str | None


class LocalHub:
    """The server. Tokens: `hf_alice` (may write) and `hf_bob` (may not) are valid; any other is refused.

    Attributes:
        url: what to set HF_ENDPOINT to.
        faults: each a dict: `path` (a regex searched in the request's path), `method`, `times` (default 1), and what to
            do: `status` with `headers`, `truncate` (send so many bytes, then hang up; with `reset`, reset the
            connection; with `short`, end the answer as if it was whole), `corrupt` (bits to flip in the last byte),
            `delay` (seconds).
        log: the requests answered so far.
        webhooks: who is told of every push to a branch or tag.
        deliveries: how that went so far.
    """

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = Path(root)
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.writers = {"alice"}
        self._lock = threading.Lock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[dict[str, Any]] = []
        self.log: list[Logged] = []
        self.webhooks: list[Webhook] = []
        self.deliveries: list[Delivered] = []
        self._socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        app = Starlette(routes=[Route("/{path:path}", self._serve, methods=["GET", "HEAD", "POST", "PUT"])])
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> "LocalHub":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def environment(self, folder: Path) -> dict[str, str]:
        """What makes a program use this Hub, with empty caches below `folder`."""
        homes = {"HF_HOME": "huggingface", "HF_HUB_CACHE": "huggingface/hub", "LEWIS_HOME": "lewis"}
        return {"HF_ENDPOINT": self.url} | {name: str(folder / place) for name, place in homes.items()}

    def commit(
        self,
        name: str,
        files: Path | Mapping[str, str | bytes],
        *,
        repo_type: str = "model",
        branch: str = "main",
        tag: str | None = None,
    ) -> str:
        """Make `files` the whole tree of a new commit (and of a new repo, at first); returns its 40-digit id."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repo = self.repos.setdefault((repo_type, name), Repo())
        tree = {path: self._store(path, content) for path, content in files.items()}
        sha = self.push(repo_type, name, branch, lambda _: tree)
        if tag:
            old, repo.tags[tag] = repo.tags.get(tag), sha
            self.tell(repo_type, name, f"refs/tags/{tag}", old, sha)
        return sha

    def gate(self, name: str, *readers: str, repo_type: str = "model") -> None:
        """Everyone sees the repo's listing; only `readers` get its files."""
        repo = self.repos[repo_type, name]
        repo.gated, repo.readers = True, set(readers)

    def make_private(self, name: str, *readers: str, repo_type: str = "model") -> None:
        """Only `readers` learn that the repo exists."""
        repo = self.repos[repo_type, name]
        repo.private, repo.readers = True, set(readers)

    def push(
        self,
        repo_type: str,
        name: str,
        branch: str,
        change: Callable[[dict[str, Blob]], dict[str, Blob]],
        *,
        parent: str | None = None,
    ) -> str:
        """Commit what `change` makes of the branch's tree; refused (412) if the branch is not at `parent` any more."""
        repo = self.repos[repo_type, name]
        with self._lock:
            old = repo.branches.get(branch)
            if parent not in (None, old):
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            tree = dict(sorted(change(repo.commits[old] if old else {}).items()))
            content = [repo_type, name, old, [[path, blob.etag] for path, blob in tree.items()]]
            sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
            repo.commits[sha] = tree
            repo.branches[branch] = sha
        self.tell(repo_type, name, f"refs/heads/{branch}", old, sha)
        return sha

    def create(self, name: str, *, repo_type: str = "model", private: bool = False, reader: str = "") -> bool:
        """Make an empty repo; False if it exists."""
        with self._lock:
            if (repo_type, name) in self.repos:
                return False
            self.repos[repo_type, name] = repo = Repo(private=private, readers={reader})
            repo.branches["main"] = hashlib.sha1(f"{repo_type} {name}".encode()).hexdigest()
            repo.commits[repo.branches["main"]] = {}
        self.tell(repo_type, name)
        return True

    def tell(self, repo_type: str, name: str, ref: str = "", old: str | None = None, new: str | None = None) -> None:
        """Tell every webhook, in the background, that `ref` moved; or, without one, that the repo was made."""
        event = {"action": "update", "scope": "repo.content"} if ref else {"action": "create", "scope": "repo"}
        moved = {"ref": ref, "oldSha": old, "newSha": new} if ref else None
        said = payload(self.url, repo_type, name, self.repos[repo_type, name], event, moved)
        for webhook in self.webhooks:
            threading.Thread(target=lambda to=webhook: self.deliveries.append(deliver(to, said)), daemon=True).start()

    def _store(self, path: str, content: str | bytes) -> Blob:
        data = content.encode() if isinstance(content, str) else content
        sha256 = hashlib.sha256(data).hexdigest()
        place = self.root / "blobs" / sha256
        place.write_bytes(data)
        return Blob.of_lfs(sha256, len(data), place) if LFS.search(path) else Blob.of(data, place)

    async def _serve(self, request: Request) -> Response:
        # The raw path: a quoted "/" in a revision (refs%2Fpr%2F1) must not split it.
        path = request.scope["raw_path"].decode().split("?")[0]
        fault = self._fault(request.method, unquote(path))
        await asyncio.sleep(fault.get("delay", 0))
        try:
            if "status" in fault:
                response: Response = Response("fault", fault["status"], fault.get("headers"))
            elif written := request.method in ("POST", "PUT") and await write(self, request, path):
                response = written
            elif match := RESOLVE.fullmatch(path):
                response = self._file(request, fault, *match.groups())
            elif match := API.fullmatch(path):
                response = await self._api(request, *match.groups())
            else:
                raise Refusal(404, "", "Not found")
        except Refusal as refusal:
            response = refusal.response
        range_, user = request.headers.get("range"), self._user(request)
        self.log.append(Logged(request.method, unquote(path), response.status_code, range_, user))
        return response

    def _fault(self, method: str, path: str) -> dict[str, Any]:
        for fault in self.faults:
            left = fault.get("times", 1)
            if left > 0 and fault.get("method", method) == method and re.search(fault["path"], path):
                fault["times"] = left - 1
                return fault
        return {}

    def _user(self, request: Request) -> str | None:
        return self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))

    def _open(self, request: Request, repo_type: str, name: str, *, files: bool) -> Repo:
        user = self._user(request)
        if user is None and "authorization" in request.headers:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        repo = self.repos.get((repo_type, name))
        if repo is None or (repo.private and user not in repo.readers):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if files and repo.gated and user not in repo.readers:
            raise Refusal(403 if user else 401, "GatedRepo", f"Access to {name} is restricted")
        return repo

    def _tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = repo.resolve(unquote(revision))
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return sha, repo.commits[sha]

    async def _api(
        self, request: Request, kind: str, name: str, call: str | None, revision: str | None, folder: str | None
    ) -> Response:
        repo = self._open(request, kind.removesuffix("s"), name, files=call == "auth-check")
        if call == "auth-check":
            return JSONResponse({})
        if call == "refs":
            kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
            refs = {
                key: [{"name": n, "ref": f"refs/{prefix}/{n}", "targetCommit": sha} for n, sha in names.items()]
                for key, (prefix, names) in kinds.items()
            }
            return JSONResponse({**refs, "converts": []})
        sha, tree = self._tree(repo, revision or "main")
        if call == "tree":
            recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
            return JSONResponse(_entries(tree, unquote(folder or "").strip("/"), recursive))
        if call == "paths-info":
            wanted = {path.strip("/") for path in parse_qs((await request.body()).decode()).get("paths", [])}
            return JSONResponse([entry for entry in _entries(tree, "", True) if entry["path"] in wanted])
        siblings = [{"rfilename": path, **_about(blob, "blobId")} for path, blob in tree.items()]
        about = {"id": name, "sha": sha, "private": repo.private, "gated": "manual" if repo.gated else False}
        return JSONResponse({**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "disabled": False})

    def _file(
        self, request: Request, fault: dict[str, Any], kind: str | None, name: str, revision: str, path: str
    ) -> Response:
        repo = self._open(request, "dataset" if kind else "model", name, files=True)
        sha, tree = self._tree(repo, revision)
        blob = tree.get(unquote(path))
        if blob is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.sha256:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        start, end, status = 0, blob.size, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            start, end, status = int(match[1]), min(int(match[2] or blob.size) + 1, blob.size), 206
            if start >= blob.size:
                return Response(status_code=416, headers={"Content-Range": f"bytes */{blob.size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
        if not fault.get("short"):
            headers["Content-Length"] = str(end - start)
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        return StreamingResponse(_send(blob.path, start, end, fault, request), status, headers)


async def _send(path: Path, start: int, end: int, fault: dict[str, Any], request: Request) -> AsyncIterator[bytes]:
    """The bytes [start, end) of a file. Stopping short makes the server hang up, as a broken network does."""
    stop = min(end, start + fault.get("truncate", end))
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            chunk = file.read(min(1 << 18, stop - start))
            start += len(chunk)
            if fault.get("corrupt") and start == stop:
                chunk = chunk[:-1] + bytes([chunk[-1] ^ fault["corrupt"]])
            yield chunk
    if fault.get("reset"):
        await asyncio.sleep(0.1)  # a reset discards what has not arrived
        transport = request.receive.__self__.transport  # type: ignore[attr-defined]
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


def _about(blob: Blob, oid: str) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.sha256, "sha256": blob.sha256, "size": blob.size, "pointerSize": 130}}
    return {"size": blob.size, oid: blob.oid, **(lfs if blob.sha256 else {})}


def _entries(tree: dict[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders below `folder`, as the tree call lists them."""
    prefix = folder + "/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, blob in tree.items():
        if path.startswith(prefix):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                parent = prefix + "/".join(parts[:depth])
                found[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
            found[path] = {"type": "file", "path": path, **_about(blob, "oid")}
    if folder and not found:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
    return [entry for path, entry in found.items() if recursive or "/" not in path.removeprefix(prefix)]


def main() -> None:
    """Serve folders as repos until interrupted."""
    parser = argparse.ArgumentParser(description="A local Hugging Face Hub; point HF_ENDPOINT at it")
    parser.add_argument("--port", type=int, default=8911)
    parser.add_argument("--root", type=Path, required=True, help="where to keep the blobs")
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME=FOLDER", help="a model repo")
    parser.add_argument("--dataset", action="append", default=[], metavar="ORG/NAME=FOLDER", help="a dataset repo")
    parser.add_argument("--webhook", metavar="URL", help="whom to tell of every push")
    parser.add_argument("--secret", help="what to send it as X-Webhook-Secret")
    arguments = parser.parse_args()
    with suppress(KeyboardInterrupt), LocalHub(arguments.root, arguments.port) as hub:
        for repo_type, repos in (("model", arguments.repo), ("dataset", arguments.dataset)):
            for name, _, folder in (repo.partition("=") for repo in repos):
                print(f"{name} {hub.commit(name, Path(folder), repo_type=repo_type)}")
        if arguments.webhook:
            hub.webhooks.append(Webhook(arguments.webhook, arguments.secret))
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        hub._thread.join()


if __name__ == "__main__":
    main()
