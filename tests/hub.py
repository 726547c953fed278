"""A hub of one machine: as much of its HTTP interface as an upload needs, written into a folder."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@contextmanager
def local_hub(root: Path) -> Iterator[str]:
    """Serve an empty hub; what is uploaded to "user/name" lies in root/user/name. Gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, values: Any, status: int = 200, **headers: str) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith("/api/models/") and (root / path.removeprefix("/api/models/")).is_dir():
                name = path.removeprefix("/api/models/")
                self.answer({"id": name, "siblings": [], "sha": "0" * 40, "private": False, "tags": []})
            else:
                self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            if path == "/api/repos/create":
                values = json.loads(body)
                name = f"{values['organization']}/{values['name']}" if values.get("organization") else values["name"]
                (root / name).mkdir(parents=True, exist_ok=True)
                self.answer({"url": f"{address}/{name}", "name": name, "id": name})
            elif path.endswith("/preupload/main"):
                files = json.loads(body)["files"]
                kinds = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                self.answer({"files": kinds})
            elif path.endswith("/commit/main"):
                name = path.removeprefix("/api/models/").removesuffix("/commit/main")
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        target = root / name / entry["value"]["path"]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(base64.b64decode(entry["value"]["content"]))
                oid = "1" * 40
                self.answer({"commitUrl": f"{address}/{name}/commit/{oid}", "commitOid": oid, "success": True})
            else:
                self.answer({"errors": [], "warnings": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
