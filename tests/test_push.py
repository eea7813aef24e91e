"""Pushing to the hub: a small server that speaks the endpoints which are used, and what goes wrong in one line."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Ended, end, meiosis, spawn, write_config
from family import config_of
from recipes import recipe_of

from search.errors import MeiosisError, UserError
from search.push import Repository, push_folder


class Hub(ThreadingHTTPServer):
    """A hub with one user. `answers` maps an endpoint's end to (status, body) that it gives instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.answers: dict[str, tuple[int, dict[str, Any]]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Endpoint(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        self.server.requests.append(self.path)
        for path, (status, answer) in self.server.answers.items():
            if path in self.path:
                return self.answer(status, answer)
        repository = "me/merged"
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer(200, {"url": f"{self.server.address}/{repository}", "name": repository})
        if "/preupload/" in self.path:
            wanted = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in wanted]})
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            url = f"{self.server.address}/{repository}/commit/abc"
            return self.answer(200, {"commitUrl": url, "commitOid": "a" * 40, "success": True})
        return self.answer(200, {})

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.server.answers:
            return self.answer(404, {"error": "Repository not found"})
        return self.answer(200, {"id": "me/merged", "siblings": [], "sha": "0" * 40})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if "error" in body:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def recipe(family: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(family, "linear").model_dump(mode="json", exclude_none=True)))
    return path


def pushed(recipe: Path, *more: object) -> Ended:
    """A process of its own: the library reads the hub's address when it is imported."""
    return end(spawn("merge", recipe, recipe.parent / "out", *more))


def test_a_merge_is_pushed_with_every_file_when_it_is_asked_for(hub: Hub, recipe: Path) -> None:
    ended = pushed(recipe, "--push", "me/merged", "--private", "--json")
    assert ended.status == 0, ended.err
    assert ended.json["pushed"].endswith("/me/merged")
    (created,) = hub.created
    assert (created["name"], created["organization"]) == ("merged", "me")
    assert created.get("private") is True or created.get("visibility") == "private"  # as the library's version has it
    out = recipe.parent / "out"
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}


def test_an_export_of_a_run_is_pushed(hub: Hub, family: Path, tmp_path: Path) -> None:
    config = config_of(family, tmp_path / "runs")
    config["search"] |= {"budget": 6, "finalists": 1, "baselines": ["uniform_soup"]}
    assert meiosis("search", write_config(config, tmp_path), "--run", "run").status == 0
    ended = end(spawn("export", tmp_path / "runs" / "run", tmp_path / "out", "--push", "me/merged", "--json"))
    assert ended.status == 0, ended.err
    assert ended.json["pushed"].endswith("/me/merged")
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_nothing_is_pushed_without_being_asked(hub: Hub, recipe: Path) -> None:
    assert pushed(recipe).status == 0
    assert hub.requests == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("endpoint", "status", "said", "expected"),
    [
        ("/api/repos/create", 401, "Invalid username or password.", ["401", "hf auth login"]),
        ("/api/repos/create", 403, "no rights in the namespace me", ["403", "no rights", "hf auth login"]),
        ("/api/repos/create", 400, "Invalid repo name", ["400", "Invalid repo name", "choose another"]),
        ("/commit/", 403, "read-only token", ["403", "read-only token"]),
        ("/preupload/", 404, "Repository not found", ["404"]),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_the_model_stays(
    endpoint: str, status: int, said: str, expected: list[str], hub: Hub, folder: Path
) -> None:
    hub.answers[endpoint] = (status, {"error": said})
    with pytest.raises(UserError) as caught:
        push_folder(folder, Repository("me/merged"), endpoint=hub.address)
    line = str(caught.value)
    assert "\n" not in line
    for text in ["--push me/merged", f"the model is whole in {folder}", *expected]:
        assert text in line
    assert "hf_secret" not in line


def test_a_hub_that_cannot_be_reached_is_one_line(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeiosisError, match="the hub cannot be reached") as caught:
        push_folder(folder, Repository("me/merged"), endpoint="http://127.0.0.1:9")
    assert caught.value.exit_status == 1
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push_folder(folder, Repository("me/merged"), endpoint=hub.address)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["merged", "a/b/c", "me/mer ged", "me/-x", "me/a..b", ""])
def test_a_name_that_is_no_repository_is_refused_before_the_merge(name: str, hub: Hub, recipe: Path) -> None:
    ended = meiosis("merge", recipe, recipe.parent / "out", "--push", name)
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    assert "expected ORG/NAME" in ended.err
    assert not (recipe.parent / "out").exists()


def test_without_a_token_the_way_to_one_is_told_before_the_merge(
    hub: Hub, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(recipe.parent / "no-token"))
    ended = meiosis("merge", recipe, recipe.parent / "out", "--push", "me/merged")
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    assert "hf auth login" in ended.err
    ended = meiosis("merge", recipe, recipe.parent / "out", "--private")
    assert ended.status == 2
    assert "give --push" in ended.err
    assert not (recipe.parent / "out").exists()
