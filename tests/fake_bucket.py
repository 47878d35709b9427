"""A bucket in memory that is gs:// for all who write there: epath through fsspec, and TensorStore.

Like the real one it has objects and no folders, takes objects whole, and never changes one.
"""

import datetime
import io
import itertools
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from urllib.parse import parse_qs, unquote, urlparse

import fsspec
from etils.epath import backend
from fsspec.spec import AbstractFileSystem


class Bucket:
    """Objects by name, "bucket/folder/file": (bytes, seconds since 1970, generation)."""

    def __init__(self):
        self.objects, self.generations = {}, itertools.count(1)
        self.refuse = None  # an exception that every access raises

    def put(self, name, data):
        self.touch()
        self.objects[name] = (bytes(data), time.time(), next(self.generations))
        return self.objects[name]

    def touch(self):
        if self.refuse is not None:
            raise self.refuse

    def below(self, folder):
        return {name: found for name, found in self.objects.items() if name.startswith(folder)}

    def names(self, folder):
        """Names of the objects below a folder, from there."""
        return sorted(name.removeprefix(folder + "/") for name in self.below(folder + "/"))


class Written(io.BytesIO):
    def __init__(self, store):
        super().__init__()
        self.store = store

    def __exit__(self, kind, *_):
        if kind is not None:
            super().close()
        self.close()

    def close(self):
        if not self.closed:
            self.store(self.getvalue())
        super().close()


def file_system(bucket):
    class FileSystem(AbstractFileSystem):
        protocol = ("gs", "gcs")
        cachable = False

        def ls(self, path, detail=True, **_):
            bucket.touch()
            path = self._strip_protocol(path)
            found = {}
            for name, (data, written, _) in bucket.below(path).items():
                rest = name[len(path) :]
                if rest and not rest.startswith("/"):
                    continue
                first, _, more = rest.removeprefix("/").partition("/")
                if not rest or not more:
                    mtime = datetime.datetime.fromtimestamp(written, datetime.UTC)
                    entry = {"type": "file", "size": len(data), "mtime": mtime}
                else:
                    entry = {"type": "directory", "size": 0}
                full = f"{path}/{first}" if rest else path
                found[full] = {"name": full} | entry
            if not found:
                raise FileNotFoundError(path)
            return list(found.values()) if detail else sorted(found)

        def info(self, path, **_):
            path = self._strip_protocol(path)
            if path in bucket.objects:
                return next(entry for entry in self.ls(path) if entry["name"] == path)
            self.ls(path)
            return {"name": path, "type": "directory", "size": 0}

        def mkdir(self, path, create_parents=True, **_):
            bucket.touch()

        def makedirs(self, path, exist_ok=False):
            bucket.touch()

        def _open(self, path, mode="rb", **_):
            bucket.touch()
            if mode == "rb":
                if path not in bucket.objects:
                    raise FileNotFoundError(path)
                return io.BytesIO(bucket.objects[path][0])
            assert mode == "wb", f"no {mode!r} in a bucket"
            return Written(lambda data: bucket.put(path, data))

        def cp_file(self, source, target, **_):
            source = self._strip_protocol(source)
            if source in bucket.objects:  # and no folder
                bucket.put(self._strip_protocol(target), bucket.objects[source][0])

        def _rm(self, path):
            bucket.touch()
            if bucket.objects.pop(self._strip_protocol(path), None) is None:
                raise FileNotFoundError(path)

        def rm_file(self, path):
            self._rm(path)

        def rm(self, path, recursive=False, maxdepth=None):
            path = self._strip_protocol(path)
            found = bucket.below(path + "/") if recursive else {}
            found |= {path: None} if path in bucket.objects else {}
            if not found:
                raise FileNotFoundError(path)
            for name in found:
                self._rm(name)

    return FileSystem


def handler(bucket):
    class Handler(BaseHTTPRequestHandler):
        """The part of the JSON API of Google Cloud Storage that TensorStore asks for."""

        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def asked(self):
            url = urlparse(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            _, _, rest = url.path.partition("/storage/v1/b/")
            of, _, name = rest.partition("/o/")
            return unquote(of.removesuffix("/o")), unquote(name), query

        def described(self, name, found):
            data, written, generation = found
            date = datetime.datetime.fromtimestamp(written, datetime.UTC).isoformat()
            return {
                "name": name, "size": str(len(data)), "generation": str(generation),
                "updated": date, "timeCreated": date,
            }  # fmt: skip

        def fits(self, query, found):
            generation = str(found[2]) if found else "0"
            return query.get("ifGenerationMatch", generation) == generation

        def do_GET(self):
            of, name, query = self.asked()
            if not name:
                prefix, items = query.get("prefix", ""), []
                for full, found in sorted(bucket.below(f"{of}/{prefix}").items()):
                    inside = full[len(of) + 1 :]
                    after = query.get("startOffset", "") <= inside
                    if after and ("endOffset" not in query or inside < query["endOffset"]):
                        items.append(self.described(inside, found))
                self.answer(200, json.dumps({"items": items}).encode())
                return
            found = bucket.objects.get(f"{of}/{name}")
            if found is None:
                self.answer(404)
            elif not self.fits(query, found):
                self.answer(412)
            elif query.get("ifGenerationNotMatch") == str(found[2]):
                self.answer(304)
            elif query.get("alt") != "media":
                self.answer(200, json.dumps(self.described(name, found)).encode())
            else:
                data, code, extra = found[0], 200, {}
                if "Range" in self.headers:
                    first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                    first, end = int(first), min(int(last or len(data)) + 1, len(data))
                    if first >= len(data):
                        self.answer(416)
                        return
                    extra = {"Content_Range": f"bytes {first}-{end - 1}/{len(data)}"}
                    data, code = data[first:end], 206
                self.answer(code, data, x_goog_generation=found[2], **extra)

        def do_POST(self):
            of, _, query = self.asked()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            name = query["name"]
            if not self.fits(query, bucket.objects.get(f"{of}/{name}")):
                self.answer(412)
                return
            found = bucket.put(f"{of}/{name}", data)
            self.answer(200, json.dumps(self.described(name, found)).encode())

        def do_DELETE(self):
            of, name, query = self.asked()
            found = bucket.objects.get(f"{of}/{name}")
            if found is None or not self.fits(query, found):
                self.answer(404 if found is None else 412)
                return
            del bucket.objects[f"{of}/{name}"]
            self.answer(204)

    return Handler


def serve(monkeypatch):
    """A `Bucket` that is gs:// while the test runs; yields it once, for a fixture."""
    bucket = Bucket()
    for name in ("gs", "gcs"):
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, file_system(bucket))
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", fsspec.filesystem)
    # Orbax asks Google's own library whether the bucket has folders.
    storage = ModuleType("google.cloud.storage")
    storage.Client = lambda: SimpleNamespace(get_bucket=lambda name: SimpleNamespace())
    cloud = ModuleType("google.cloud")
    cloud.storage = storage
    for module in (cloud, storage):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(bucket))
    server.daemon_threads = True
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    often = {"poll_interval": 0.05}
    threading.Thread(target=server.serve_forever, kwargs=often, daemon=True).start()
    yield bucket
    server.shutdown()
    server.server_close()
