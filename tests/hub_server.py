"""A small Hugging Face Hub over HTTP on loopback: enough of its API to create, fill and download repositories."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


def card_errors(card: str) -> list[str]:
    """What the Hub would refuse in the metadata of a model card, as far as it concerns ours."""
    errors, texts = [], ("library_name", "license", "license_name", "pipeline_tag")
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(metadata, dict):
        return ["there is no metadata"]
    errors += [f'"{name}" must be a string' for name in texts if not isinstance(metadata.get(name, ""), str)]
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            for path in ("task.type", "dataset.type", "dataset.name"):
                part, name = path.split(".")
                if not isinstance(result.get(part, {}).get(name), str):
                    errors.append(f'"model-index[0].results[0].{path}" must be a string')
            for metric in result["metrics"]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float)):
                    errors.append("a metric has a type and a value")
    return errors


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves at `hub.endpoint`; `hub.repos[id]` is the newest commit, path → bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.lfs_objects: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()

    def environment(self, home) -> dict[str, str]:
        """What a process needs, before it imports huggingface_hub, to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, content: bytes | dict | list, status: int = 200, **headers: str):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def not_found(self, code: str):
        self.reply({"error": code}, status=404, X_Error_Code=code)

    def do_PUT(self):
        content = self.body()
        self.server.lfs_objects[hashlib.sha256(content).hexdigest()] = content
        self.reply({})

    def do_POST(self):
        content = self.body()
        if self.path == "/api/repos/create":
            request = json.loads(content)
            repo_id = "/".join(filter(None, [request.get("organization") or "me", request["name"].split("/")[-1]]))
            self.server.repos.setdefault(repo_id, {})
            self.server.commits.setdefault(repo_id, hashlib.sha1(repo_id.encode()).hexdigest())
            self.reply({"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id})
        elif self.path == "/api/validate-yaml":
            errors = card_errors(json.loads(content)["content"])
            self.reply({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)
        elif re.fullmatch(r"/api/models/.+/preupload/main", self.path):
            files = []
            for path in (file["path"] for file in json.loads(content)["files"]):
                mode = "lfs" if path.endswith(".safetensors") else "regular"
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None})
            self.reply({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            repo_id = match[1]
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.repos[repo_id][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    lfs_object = self.server.lfs_objects[entry["value"]["oid"]]
                    self.server.repos[repo_id][entry["value"]["path"]] = lfs_object
                elif entry["key"] == "deletedFile":
                    del self.server.repos[repo_id][entry["value"]["path"]]
            commit = hashlib.sha1(content + self.server.commits[repo_id].encode()).hexdigest()
            self.server.commits[repo_id] = commit
            url = f"{self.server.endpoint}/{repo_id}/commit/{commit}"
            self.reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        else:
            self.not_found("UnknownEndpoint")

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            self.reply({"name": "me", "type": "user", "orgs": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            repo_id = match[1]
            if repo_id not in self.server.repos:
                return self.not_found("RepoNotFound")
            files = self.server.repos[repo_id]
            if (match[2] or "").startswith("/tree"):
                return self.reply(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ]
                )
            info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": self.server.commits[repo_id]}
            siblings = [{"rfilename": name} for name in files]
            self.reply({**info, "private": False, "tags": [], "siblings": siblings})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo_id, name = match[1], match[2]
            if repo_id not in self.server.repos:
                return self.not_found("RepoNotFound")
            if name not in self.server.repos[repo_id]:
                return self.not_found("EntryNotFound")
            content = self.server.repos[repo_id][name]
            etag = hashlib.sha256(content).hexdigest()
            self.reply(content, ETag=f'"{etag}"', X_Repo_Commit=self.server.commits[repo_id], Accept_Ranges="bytes")
        else:
            self.not_found("UnknownEndpoint")

    do_HEAD = do_GET
