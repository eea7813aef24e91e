"""No pickle is read from disk, nor anything else that can bring code along."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, end, short, spawn, write_config
from family import config_of
from packages import PACKAGES

CALLS = {
    "pickle.loads": {"cluster/worker.py"},  # what the driver sent
    "pickle.load": set(),
    "pickle.Unpickler": set(),
    "cloudpickle.loads": set(),
    "marshal.loads": set(),
    "marshal.load": set(),
    "shelve.open": set(),
    "dill.loads": set(),
    "joblib.load": set(),
    "torch.load": set(),
    "torch.jit.load": set(),
    "numpy.load": set(),
    "np.load": {"evaluators/npz.py"},  # which leaves it at refusing pickled objects
    "pd.read_pickle": set(),
    "pandas.read_pickle": set(),
    "yaml.load": set(),
    "yaml.load_all": set(),
    "yaml.full_load": set(),
    "yaml.unsafe_load": set(),
}
"""What can run code out of a file -> modules of ours that may call it."""
IMPORTS = {"_pickle", "shelve", "dill", "joblib", "marshal", "cPickle", "jsonpickle"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_our_code_calls_nothing_that_loads_objects_from_files() -> None:
    sources = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(sources) > 100
    for path in sources:
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                allowed = CALLS.get(dotted(node.func), {where})
                assert where in allowed, f"{where}:{node.lineno} calls {dotted(node.func)}: read plain data instead"
                unsafe = [key.arg for key in node.keywords if key.arg in ("allow_pickle", "weights_only")]
                assert not unsafe, f"{where}:{node.lineno} passes {unsafe[0]}: read plain data instead"
            elif isinstance(node, ast.Import):
                found = IMPORTS.intersection(name.name for name in node.names)
                assert not found, f"{where}:{node.lineno} imports {found.pop()}: read plain data instead"
            elif isinstance(node, ast.ImportFrom):
                named = {f"{node.module}.{name.name}" for name in node.names}
                found = IMPORTS.intersection([node.module or ""]) or named.intersection(CALLS)
                assert not found, f"{where}:{node.lineno} imports {found.pop()}: read plain data instead"


WATCHED = """
import json, sys
opened, found = [], []

def hook(event, arguments):
    if event == "pickle.find_class":
        frame, ours = sys._getframe(), []
        while frame is not None:
            ours.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            frame = frame.f_back
        found.append([".".join(map(str, arguments)), ours])
    elif event == "open" and str(arguments[0]).endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")):
        opened.append(str(arguments[0]))

sys.addaudithook(hook)
from meiosis.cli.main import main

statuses = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["meiosis", *command]
    try:
        main()
    except SystemExit as ended:
        statuses.append([command[0], ended.code])
import pickle, torch
before = len(found)
pickle.loads(pickle.dumps(torch.float32.__reduce__))  # so that the hook is seen to work
print("\\n" + json.dumps(dict(statuses=statuses, opened=opened, found=found[:before], seen=len(found) > before)))
"""


@pytest.mark.timeout(300)
def test_a_search_its_resumption_and_its_export_unpickle_nothing(family: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    config: dict[str, Any] = short(config_of(family, results))
    path, there = write_config(config, tmp_path), ["--results", str(results)]
    baselines = write_config({**config, "name": "standard"}, tmp_path, "baselines.yaml")
    commands = [
        ["plan", str(path)],
        ["search", str(path), "--run", "first"],
        ["status", "first", *there],
        ["resume", "first", "--budget", "12", *there],
        ["export", "first", str(tmp_path / "out"), *there],
        ["baselines", str(baselines)],
    ]
    ended = end(spawn(json.dumps(commands), code=WATCHED))
    assert ended.status == 0, ended.err
    said = json.loads(ended.out.splitlines()[-1])
    assert said["statuses"] == [[command[0], 0] for command in commands], ended.err
    assert said["seen"]
    assert said["found"] == []
    assert said["opened"] == []
