"""The write half of the local Hub: create a repo, upload files, commit, tag and branch, as `HfApi` does.

A client needs HF_HUB_DISABLE_XET=1, for LFS files come by the plain LFS protocol.
"""

import base64
import hashlib
import json
import os
import re
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.support.hub_storage import LFS, Blob, Refusal

if TYPE_CHECKING:
    from tests.support.local_hub import LocalHub

CALL = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(preupload|commit|tag|branch)/([^/]+)")
BATCH = re.compile(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
UPLOAD = re.compile(r"/_lfs/([0-9a-f]{64})")


async def write(hub: "LocalHub", request: Request, path: str) -> Response | None:
    """Answer a call of the write half; None if it is none."""
    if path == "/api/validate-yaml":
        return JSONResponse({"errors": [], "warnings": []})
    if path == "/api/repos/create":
        return _create(hub, request, await request.json())
    if match := UPLOAD.fullmatch(path):
        return await _receive(hub, request, match[1])
    if match := BATCH.fullmatch(path):
        _writable(hub, request, "dataset" if match[1] else "model", match[2])
        return _where_to_upload(hub, (await request.json())["objects"])
    if match := CALL.fullmatch(path):
        repo_type, name, call, what = match[1].removesuffix("s"), match[2], match[3], unquote(match[4])
        _writable(hub, request, repo_type, name)
        if call == "preupload":
            return _preupload(hub, repo_type, name, what, (await request.json())["files"])
        if call == "commit":
            return _commit(hub, repo_type, name, what, await request.body())
        return _name(hub, repo_type, name, call, what, json.loads(await request.body() or b"{}"))
    return None


def _writer(hub: "LocalHub", request: Request) -> str:
    user = hub._user(request)
    if user is None:
        raise Refusal(401, "", "Invalid username or password.")
    if user not in hub.writers:
        raise Refusal(403, "", "Forbidden: you must use a write token to upload to a repository.")
    return user


def _writable(hub: "LocalHub", request: Request, repo_type: str, name: str) -> None:
    hub._open(request, repo_type, name, files=False)  # whether it exists is told first
    _writer(hub, request)


def _create(hub: "LocalHub", request: Request, body: dict[str, Any]) -> Response:
    user = _writer(hub, request)
    repo_type, name = body.get("type") or "model", f"{body.get('organization') or user}/{body['name']}"
    url = f"{hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}{name}"
    private = body.get("visibility") == "private" or bool(body.get("private"))
    if not hub.create(name, repo_type=repo_type, private=private, reader=user):
        return JSONResponse({"error": "You already created this model repo", "url": url}, 409)
    return JSONResponse({"url": url, "name": name, "id": name})


def _preupload(hub: "LocalHub", repo_type: str, name: str, revision: str, files: list[dict[str, Any]]) -> Response:
    sha, tree = hub._tree(hub.repos[repo_type, name], revision)
    answers = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if LFS.search(file["path"]) or file["size"] > 10_000_000 else "regular",
            "shouldIgnore": False,
            "oid": tree[file["path"]].etag if file["path"] in tree else None,
        }
        for file in files
    ]
    return JSONResponse({"commitOid": sha, "files": answers})


def _where_to_upload(hub: "LocalHub", objects: list[dict[str, Any]]) -> Response:
    answers = []
    for each in objects:
        known = (hub.root / "blobs" / each["oid"]).exists()
        upload = {} if known else {"actions": {"upload": {"href": f"{hub.url}/_lfs/{each['oid']}"}}}
        answers.append({"oid": each["oid"], "size": each["size"], "authenticated": True, **upload})
    return JSONResponse({"transfer": "basic", "objects": answers}, media_type="application/vnd.git-lfs+json")


async def _receive(hub: "LocalHub", request: Request, sha256: str) -> Response:
    beside, digest = hub.root / "blobs" / f".{uuid.uuid4().hex}", hashlib.sha256()
    with beside.open("wb") as file:
        async for chunk in request.stream():
            file.write(chunk)
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        beside.unlink()
        raise Refusal(400, "", "the content does not have the announced SHA-256")
    os.replace(beside, hub.root / "blobs" / sha256)
    return Response()


def _commit(hub: "LocalHub", repo_type: str, name: str, branch: str, body: bytes) -> Response:
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    parent = next((line["value"].get("parentCommit") for line in lines if line["key"] == "header"), None)
    added: dict[str, Blob] = {}
    removed: list[str] = []
    for key, value in ((line["key"], line["value"]) for line in lines):
        if key == "file":
            added[value["path"]] = hub._store(value["path"], base64.b64decode(value["content"]))
        elif key == "lfsFile":
            place = hub.root / "blobs" / value["oid"]
            if not place.exists():
                raise Refusal(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
            added[value["path"]] = Blob.of_lfs(value["oid"], place.stat().st_size, place)
        elif key in ("deletedFile", "deletedFolder"):
            removed.append(value["path"].rstrip("/"))

    def change(tree: dict[str, Blob]) -> dict[str, Blob]:
        kept = {p: blob for p, blob in tree.items() if not any(p == r or p.startswith(r + "/") for r in removed)}
        return kept | added

    sha = hub.push(repo_type, name, branch, change, parent=parent)
    return JSONResponse({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})


def _name(hub: "LocalHub", repo_type: str, name: str, call: str, what: str, body: dict[str, Any]) -> Response:
    """Make a tag (`what` is its revision) or a branch (`what` is its name)."""
    repo = hub.repos[repo_type, name]
    new = body["tag"] if call == "tag" else what
    sha, _ = hub._tree(repo, what if call == "tag" else body.get("startingPoint", "main"))
    names, kind = (repo.tags, "tags") if call == "tag" else (repo.branches, "heads")
    if new in names:
        raise Refusal(409, "", f"Reference already exists: {new}")
    names[new] = sha
    hub.tell(repo_type, name, f"refs/{kind}/{new}", None, sha)
    return JSONResponse({})
