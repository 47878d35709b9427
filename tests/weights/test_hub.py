"""Names on the Hugging Face Hub: the real client package against a small server on this machine."""

import contextlib
import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest
from safetensors.numpy import load_file

from ltx2_jax.convert import cli
from ltx2_jax.errors import UserError
from ltx2_jax.weights import hub
from ltx2_jax.weights.lora import read_lora
from ltx2_jax.weights.sources import open_release

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the optional `hub` extra")

GOLDEN = Path(__file__).parents[1] / "golden"
COMMIT = "0" * 40


class Server(http.server.ThreadingHTTPServer):
    """Repositories as `repos` says: name -> file -> bytes; a gated one has None."""

    def __init__(self, repos):
        super().__init__(("localhost", 0), Handler)
        self.repos, self.requests, self.cut = repos, [], None

    @property
    def url(self):
        return f"http://localhost:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = unquote(self.path).partition("?")[0].strip("/")
        server = self.server
        server.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            if repo not in server.repos:
                return self.send(404, {"X-Error-Code": "RepoNotFound"})
            names = server.repos[repo] or {}
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": "0"}
                    for n, c in names.items()
                ]
                return self.send(
                    200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
                )
            siblings = [{"rfilename": name} for name in names]
            found = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(found).encode())
        org, name, _, _, *inner = path.split("/")
        files = server.repos.get(f"{org}/{name}", {})
        if f"{org}/{name}" not in server.repos:
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        if files is None:
            return self.send(403, {"X-Error-Code": "GatedRepo"})
        content = files.get("/".join(inner))
        if content is None:
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(206 if start else 200, headers, content[start:], body)

    def send(self, code, headers, content=b"", body=True):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command == "GET":
            with contextlib.suppress(OSError):
                cut, self.server.cut = self.server.cut, None
                self.wfile.write(content[:cut])
                if cut is not None:  # the connection breaks
                    self.close_connection = True


REPOS = {
    "Lightricks/LTX-2": {
        "ltx-2.safetensors": (GOLDEN / "v2.0/checkpoint.safetensors").read_bytes(),
        "upsampler.safetensors": (GOLDEN / "v2.0/upsampler_spatial.safetensors").read_bytes(),
        "vae/video.safetensors": (GOLDEN / "v2.5/split/video_vae_conv.safetensors").read_bytes(),
        "vae/audio.safetensors": (GOLDEN / "v2.5/split/audio_vae.safetensors").read_bytes(),
        "README.md": b"hello",
    },
    "someone/one-lora": {"lora.safetensors": (GOLDEN / "v2.0/lora.safetensors").read_bytes()},
    "google/gemma": {
        name: (GOLDEN / "v2.0/gemma" / name).read_bytes()
        for name in ("config.json", "model.safetensors", "tokenizer.model")
    },
    "someone/models": {
        f"gemma/{name}": (GOLDEN / "v2.0/gemma" / name).read_bytes()
        for name in ("config.json", "model.safetensors")
    },
    "someone/peft": {
        "adapter_model.safetensors": (GOLDEN / "v2.3/lora.safetensors").read_bytes(),
        "adapter_config.json": b'{"lora_alpha": 6, "r": 3}',
    },
    "someone/text": {"README.md": b"hello"},
    "google/gated": None,
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The hub at localhost, with an empty cache."""
    server = Server(REPOS)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    real = huggingface_hub.hf_hub_download, huggingface_hub.snapshot_download
    cache = {"cache_dir": tmp_path / "cache", "endpoint": server.url, "token": False}
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: real[0](*a, **k | cache)
    )
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: real[1](*a, **k | cache)
    )
    api = huggingface_hub.HfApi(endpoint=server.url, token=False)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", api.list_repo_files)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def test_a_file_of_a_repository_is_downloaded_once(server):
    for _ in range(2):
        with open_release("Lightricks/LTX-2/ltx-2.safetensors") as release:
            assert release.release_of() == "2.0"
    gets = [path for method, path, _ in server.requests if method == "GET" and "resolve" in path]
    assert len(gets) == 1


def test_an_interrupted_download_goes_on_where_it_stopped(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**14)
    server.cut = 100_000
    path = hub.fetch("Lightricks/LTX-2/ltx-2.safetensors")
    assert path.read_bytes() == REPOS["Lightricks/LTX-2"]["ltx-2.safetensors"]
    ranges = [r for method, path, r in server.requests if method == "GET" and r]
    assert len(ranges) == 1
    assert 80_000 <= int(ranges[0].removeprefix("bytes=").rstrip("-")) <= 100_000


def test_a_folder_of_weights_is_downloaded_whole_and_nothing_else(server):
    folder = hub.fetch("google/gemma")
    assert sorted(p.name for p in folder.iterdir()) == sorted(REPOS["google/gemma"])
    with open_release("google/gemma") as release:
        release.load("gemma")
    with open_release("hf://Lightricks/LTX-2/vae") as release:
        assert set(release.networks) == {"video_vae", "audio_vae", "vocoder"}
    assert not any(path.endswith("README.md") for _, path, _ in server.requests)


def test_the_only_file_of_a_repository_needs_no_name(server):
    assert hub.fetch("someone/one-lora").name == "lora.safetensors"


def test_a_folder_inside_a_repository_comes_with_its_config(server):
    with open_release("someone/models/gemma") as release:
        assert release.config("gemma").width == 32
        assert release.load("gemma")


@pytest.mark.parametrize("name", ["someone/peft", "someone/peft/adapter_model.safetensors"])
def test_a_lora_of_peft_comes_with_its_scales(server, name):
    assert {target.scale for target in read_lora(name).targets.values()} == {2.0}


def test_loras_on_the_hub_are_inspected_merged_and_converted(server, tmp_path, capsys):
    name, base = "someone/peft", str(GOLDEN / "v2.3/checkpoint.safetensors")
    assert cli(["--inspect", name]) == 0
    assert "alpha / rank 2" in capsys.readouterr().out
    assert cli([name, "official.safetensors"]) == 0
    assert cli([base, "a.safetensors", "--lora", "official.safetensors"]) == 0
    assert cli([base, "b.safetensors", "--lora", name]) == 0
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Lightricks/LTX-2",
            "name one of its files: ltx-2.safetensors, upsampler.safetensors, vae",
        ),
        ("Lightricks/LTX-2/gone.safetensors", "Lightricks/LTX-2 has no such file"),
        ("Lightricks/LTX-2/gone", "has no safetensors files in gone"),
        ("someone/text", "someone/text: has no safetensors files"),
        ("someone/nothing", "no repository of that name on the Hugging Face Hub"),
        (
            "google/gated/model.safetensors",
            "google/gated is gated: accept its terms at https://hug",
        ),
    ],
)
def test_what_cannot_be_downloaded_is_explained_in_one_line(server, name, message):
    with pytest.raises(UserError) as error:
        hub.fetch(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_network_the_reason_is_said(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be downloaded from the Hugging Face Hub"):
        hub.fetch("Lightricks/LTX-2/ltx-2.safetensors")


def test_paths_are_never_looked_up_on_the_hub(server, tmp_path):
    (tmp_path / "weights").mkdir()
    for name in ("gone.safetensors", "weights/gone.safetensors", "./a/b", str(tmp_path / "a/b")):
        with pytest.raises(UserError, match=r"no such file or folder$"):
            hub.fetch(name)
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "gemma").mkdir()
    assert hub.fetch("google/gemma") == Path("google/gemma")
    assert server.requests == []


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'ltx2-jax\[hub\]'"):
        hub.fetch("Lightricks/LTX-2")
