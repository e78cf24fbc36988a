"""A server that answers like the Hugging Face Hub and like ModelScope, as far as their own clients ask."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import close_session, constants

TOKEN = "token-of-a-test"


class StandIn:
    """repos: {ORG/NAME: {path: bytes}}, the same for both hubs. requests: "METHOD PATH" of each one."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict] = {}  # how each new repository was asked for
        self.blobs: dict[str, bytes] = {}  # uploaded to ModelScope, not yet committed
        self.requests: list[str] = []
        self.down = False

    def commit(self, repo: str) -> str:
        """A hash that changes with the content."""
        content = repr(sorted(self.repos[repo].items()))
        return hashlib.sha1(content.encode()).hexdigest()

    def downloads(self) -> list[str]:
        """The files whose bytes were asked for, of both hubs."""
        paths = [text.removeprefix("GET ") for text in self.requests if text.startswith("GET ")]
        hf = [path.split("/resolve/")[1].partition("/")[2] for path in paths if "/resolve/" in path]
        return hf + [parse_qs(urlsplit(path).query)["FilePath"][0] for path in paths if "FilePath=" in path]


@contextmanager
def serving():
    """(StandIn, its URL)."""
    stand_in = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": stand_in}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield stand_in, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def point_to(url: str, cache, monkeypatch) -> None:
    """Let both clients of this process use `url` and `cache`. They read their environment once, so their
    constants change too.
    """
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN", "FASTMTP_HUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(cache / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(cache / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    close_session()


class Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {self.path}")
        if self.hub.down:
            self.close_connection = True
            return
        address = urlsplit(self.path)
        path, query = unquote(address.path), {k: v[0] for k, v in parse_qs(address.query).items()}
        signed = TOKEN in f"{self.headers.get('Authorization')} {self.headers.get('Cookie')}"
        writes = method in ("POST", "PUT") or "whoami" in path or path.endswith("/users/me")
        if writes and not signed and not path.startswith("/blob/"):
            return self.reply(401, {"error": "no token"})
        modelscope = path.startswith(("/api/v1/", "/openapi/", "/blob/"))
        (self.modelscope if modelscope else self.hugging_face)(method, path, query, body)

    def reply(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in ({"Content-Length": str(len(raw))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def hugging_face(self, method: str, path: str, query: dict, body: bytes) -> None:
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.created[repo], self.hub.repos[repo] = asked, {}
            return self.reply(200, {"url": f"http://{self.headers['Host']}/{repo}"})
        path = path.removeprefix("/api/models")
        repo, rest = "/".join(path.split("/")[1:3]), "/".join(path.split("/")[3:])
        if repo not in self.hub.repos:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files, sha = self.hub.repos[repo], self.hub.commit(repo)
        kind, _, rest = rest.partition("/")
        revision, _, rest = rest.partition("/")
        if kind in ("revision", "resolve", "tree") and revision not in ("main", "v1", sha):
            return self.reply(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        if kind in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            return self.reply(200, {"id": repo, "sha": sha, "private": False, "siblings": siblings})
        if kind == "tree":
            return self.reply(200, [self.entry(name, data) for name, data in files.items()])
        if kind == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]
            return self.reply(200, {"files": modes})
        if kind == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{repo}/commit/{self.hub.commit(repo)}"
            return self.reply(200, {"success": True, "commitOid": self.hub.commit(repo), "commitUrl": url})
        if kind == "resolve" and rest in files:
            etag = self.entry(rest, files[rest])["oid"]
            return self.reply(200, files[rest], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        self.reply(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})

    def entry(self, name: str, data: bytes) -> dict:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def modelscope(self, method: str, path: str, query: dict, body: bytes) -> None:
        if path.endswith("/users/me"):
            return self.reply(200, {"success": True, "data": {"username": "me", "email": "me@example.com"}})
        if path.startswith("/blob/"):
            self.hub.blobs[path.removeprefix("/blob/")] = body
            return self.reply(200, {})
        if path == "/api/v1/models":
            asked = json.loads(body)
            repo = f"{asked['Path']}/{asked['Name']}"
            if repo in self.hub.repos:
                return self.reply(400, {"Code": 10020101, "Message": "exists", "Success": False})
            self.hub.created[repo], self.hub.repos[repo] = asked, {}
            return self.data({"Id": 1, "Path": asked["Path"], "Name": asked["Name"]})
        path = path.removeprefix("/api/v1").removeprefix("/repos").removeprefix("/models")
        repo, rest = "/".join(path.split("/")[1:3]), "/".join(path.split("/")[3:])
        if repo not in self.hub.repos or query.get("Revision", "master") not in ("master", "v1"):
            return self.reply(404, {"Code": 10010205001, "Message": "not found", "Success": False})
        files = self.hub.repos[repo]
        if rest == "repo/files":
            return self.data({"Files": [self.listed(name, data) for name, data in files.items()]})
        if rest == "repo":
            if query["FilePath"] not in files:
                return self.reply(404, {"Code": 404, "Message": "no such file", "Success": False})
            return self.reply(200, files[query["FilePath"]])
        if rest == "info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for one in objects:
                href = f"http://{self.headers['Host']}/blob/{one['oid']}"
                one["actions"] = {"upload": {"href": href, "header": {}}}
            return self.data({"objects": objects})
        if rest.startswith("commit/"):
            for action in json.loads(body)["actions"]:
                content = self.hub.blobs.get(action.get("sha256"))
                files[action["path"]] = base64.b64decode(action["content"]) if content is None else content
            return self.data({"oid": self.hub.commit(repo)})
        self.data({"Name": repo.split("/")[1], "Path": repo.split("/")[0], "Visibility": 5})

    def listed(self, name: str, data: bytes) -> dict:
        return {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}

    def data(self, value: object) -> None:
        self.reply(200, {"Code": 200, "Success": True, "Message": "", "Data": value})
