"""The command line: what goes where, how it ends, and what it must not load."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended, end, meiosis, short, spawn, wait_until, write_config
from family import DOMAINS, config_of, copy_of

COMMANDS = [
    ["samples", "text"],
    ["plan"],
    ["search"],
    ["resume"],
    ["status"],
    ["baselines"],
    ["merge"],
    ["recipe"],
    ["mergekit"],
    ["recycle"],
    ["statistics"],
    ["evaluate"],
    ["export"],
    ["operators"],
    ["evaluators"],
    ["cache"],
]
HEAVY = ("torch", "ray", "transformers", "nevergrad")


@pytest.fixture(scope="module")
def config(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file whose runs lie in `runs` beside it."""
    folder = tmp_path_factory.mktemp("cli")
    return write_config(config_of(family, folder / "runs"), folder)


@pytest.fixture(scope="module")
def results(config: Path) -> Path:
    return config.parent / "runs"


@pytest.fixture(scope="module")
def search(config: Path) -> Ended:
    """A finished search, called `first`."""
    return meiosis("search", config, "--run", "first")


# Help and what it costs


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    ended = meiosis(*command, "--help")
    assert ended.status == 0
    assert f"Example: {' '.join(['meiosis', *command])} " in ended.out
    assert ended.err == ""


def test_without_a_command_there_is_the_help() -> None:
    assert meiosis() == meiosis("--help")


def loads(arguments: list[object]) -> tuple[Ended, list[str]]:
    """Run a command in a fresh process; the heavy packages it loaded."""
    code = (
        "import json, sys\n"
        "from meiosis.cli.main import main\n"
        "try:\n    main()\n"
        f"finally:\n    print(json.dumps([n for n in {HEAVY} if n in sys.modules]), file=sys.stderr)"
    )
    ended = end(spawn(*arguments, code=code))
    return ended, json.loads(ended.err.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["search", "--help"], ["merge", "--help"], ["operators"], ["evaluators"], ["--version"]],
    ids=" ".join,
)
def test_what_needs_no_model_loads_neither_torch_nor_ray(arguments: list[object]) -> None:
    ended, loaded = loads(arguments)
    assert ended.status == 0, ended.err
    assert loaded == []


def test_plan_and_status_load_neither_torch_nor_ray(
    config: Path, results: Path, search: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path))  # so that plan reads every byte of the models
    for arguments in (
        ["plan", config],
        ["status", "--results", results],
        ["status", "first", "--results", results],
        ["plan", tmp_path / "missing.yaml"],
    ):
        ended, loaded = loads([*arguments])
        assert ended.status == (2 if "missing" in str(arguments) else 0), ended.err
        assert loaded == []


# Results on stdout, errors on stderr, one JSON document


def test_a_search_shows_parents_baselines_and_the_found_merge_and_where_it_is(search: Ended, results: Path) -> None:
    assert search.status == 0, search.err
    for label in (*(f"parent:{name}" for name in DOMAINS), "base", "uniform_soup", "greedy_soup", "ties"):
        assert label in search.out
    assert f"Exported model: {results / 'first' / 'best'}" in search.out
    assert "search: 26/26 candidates" in search.err
    assert "95 %" not in search.err


def test_status_lists_runs_and_shows_one(search: Ended, results: Path) -> None:
    listed = meiosis("status", "--results", results)
    assert listed.status == 0
    assert "first" in listed.out
    assert "finished" in listed.out
    assert "26/26" in listed.out
    one = meiosis("status", "first", "--results", results)
    assert "26 of 26 candidates" in one.out
    assert str(results / "first" / "best") in one.out
    assert one.err == ""
    assert meiosis("status", results / "first").out == one.out


def test_status_without_runs_says_so(tmp_path: Path) -> None:
    ended = meiosis("status", "--results", tmp_path / "nothing")
    assert (ended.status, ended.err) == (0, "")
    assert "No runs" in ended.out


def test_resuming_a_finished_run_shows_the_same_table_and_evaluates_nothing(search: Ended, results: Path) -> None:
    history = sorted((results / "first" / "history").rglob("*"))
    before = [(path, path.read_bytes()) for path in history if path.is_file()]
    again = meiosis("resume", "first", "--results", results)
    assert again.status == 0, again.err
    assert again.out == search.out
    assert "candidates" not in again.err
    assert [(path, path.read_bytes()) for path in history if path.is_file()] == before


def test_json_is_one_document_on_stdout(config: Path, results: Path, search: Ended, family: Path) -> None:
    place = ["--results", results]
    plan = meiosis("plan", config, "--json").json
    assert plan["cost"]["candidates"] == 26
    assert len(plan["genes"]) == plan["groups"] * 3
    assert {status["name"] for status in meiosis("status", "--json", *place).json} >= {"first"}
    assert meiosis("status", "first", "--json", *place).json["done"] == 26
    verdict = meiosis("resume", "first", "--json", *place).json["verdict"]
    assert verdict["rows"][-1]["candidate"] == verdict["winner"]
    score = meiosis("evaluate", family / "base", "--config", config, "--json").json
    assert set(score["metrics"]) >= {f"{name}.nll" for name in DOMAINS}
    assert "linear" in meiosis("operators", "--json").json
    assert "perplexity" in meiosis("evaluators", "--json").json
    small = ("--set", "search.baselines=[]", "--budget", 6, "--set", "search.finalists=1")
    second = meiosis("search", config, "--run", "second", "--json", *small)
    assert second.json["model"] == str(results / "second" / "best")


def test_plan_and_evaluate_for_people_name_what_they_looked_at(config: Path, family: Path) -> None:
    plan = meiosis("plan", config)
    assert (plan.status, plan.err) == (0, "")
    for text in ("layer0", "task_arithmetic", "diagonal_cma", "26 candidates", "nothing was spent"):
        assert text in plan.out
    score = meiosis("evaluate", family / "cpp", "--config", config, "--items", "select")
    assert score.status == 0
    assert "select items" in score.out
    assert "cpp.nll" in score.out


# Mistakes: one line on stderr, nothing on stdout, status 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serch"], ["no command 'serch'", "did you mean 'search'?"]),
        (["search"], ["Missing argument 'CONFIG'", "meiosis search --help"]),
        (["plan", "x.yaml", "--jsn"], ["No such option '--jsn'", "--json"]),
        (["samples"], ["Missing command", "meiosis samples --help"]),
        (["search", "x.yaml", "--budget", "many"], ["--budget", "'many'"]),
        (["plan", "no/such.yaml"], ["no/such.yaml", "no such file"]),
        (["merge", "no/such.yaml", "out"], ["no/such.yaml", "no such file"]),
        (["evaluate", "no/such/model", "--config", "CONFIG"], ["no/such/model"]),
        (["search", "CONFIG", "--set", "search.budgt=3"], ["search.budgt", "did you mean 'budget'?"]),
        (["search", "CONFIG", "--budget", "0"], ["search.budget", "greater than or equal to 1"]),
        (["search", "CONFIG", "--run", "../escape"], ["'../escape'", "no name for a run"]),
        (["search", "CONFIG", "--run", "first"], ["'first' already exists", "/first` or choose another"]),
        (["resume", "frist", "--results", "RESULTS"], ["no run 'frist'", "did you mean 'first'?"]),
        (["status", "frist", "--results", "RESULTS"], ["no run 'frist'", "did you mean 'first'?"]),
        (["export", "frist", "out", "--results", "RESULTS"], ["no run 'frist'", "did you mean 'first'?"]),
        (["export", "first", "out", "--trial", "99", "--results", "RESULTS"], ["no trial 99", "0 to 25"]),
        (["export", "first", "out", "--trial", "-1", "--results", "RESULTS"], ["no trial -1"]),
        (["resume", "first", "--workers", "0", "--results", "RESULTS"], ["cluster.workers"]),
    ],
    ids=lambda value: " ".join(value) if "no" not in value[0] else "",
)
def test_a_mistake_is_one_line_on_stderr_with_status_2(
    arguments: list[str],
    expected: list[str],
    config: Path,
    results: Path,
    search: Ended,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"CONFIG": str(config), "RESULTS": str(results)}
    ended = meiosis(*(places.get(argument, argument) for argument in arguments))
    assert ended.status == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("meiosis: ")
    assert ended.err.count("\n") == 1, ended.err
    for text in expected:
        assert text in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_nobody_answers_takes_no_name_for_a_run(config: Path, tmp_path: Path) -> None:
    given = ("--run", "w", "--address", "127.0.0.1:1", "--set", "cluster.pool=ray", "--set", f"results={tmp_path}")
    ended = meiosis("search", config, *given)
    assert ended.status == 1
    assert "no Ray head answers at '127.0.0.1:1'" in ended.err
    assert "--address none" in ended.err
    assert not list(tmp_path.iterdir())


def test_runs_at_a_url_are_not_looked_for_in_a_folder(tmp_path: Path) -> None:
    ended = meiosis("status", "--results", f"file://{tmp_path}")
    assert (ended.status, ended.out) == (2, "")
    assert "meiosis status URL/RUN" in ended.err


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_of_a_verdict_names_every_model_however_narrow_the_terminal(
    search: Ended, results: Path, width: int
) -> None:
    from rich.console import Console

    from meiosis.cli.tables import verdict_table
    from search.store.events import End
    from search.store.run_folder import RunFolder
    from search.verdict import Verdict

    (end,) = [event for event in RunFolder.find(results, "first").events() if isinstance(event, End)]
    verdict = Verdict.from_json(end.verdict)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(verdict_table(verdict, width))
    lines = console.export_text(clear=False).splitlines()
    for row in verdict.rows:
        (line,) = [line for line in lines if f" {row.label} " in line]
        assert f"{row.value:.4f}" in line
        assert width < 80 or row.difference is None or f"{row.difference:+.4f}" in line
    assert ("No room here for" in console.export_text()) == (width < 200)


def test_debug_adds_the_traceback_and_keeps_the_status(results: Path) -> None:
    plain = meiosis("status", "nowhere", "--results", results)
    debug = meiosis("status", "nowhere", "--results", results, "--debug")
    assert (plain.status, debug.status) == (2, 2)
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert debug.err.endswith(plain.err)


def test_an_error_of_ours_is_status_1_and_shows_its_traceback_with_debug(
    search: Ended, results: Path, tmp_path: Path
) -> None:
    run = copy_of(results / "first", tmp_path / "first")
    (run / "run.yaml").write_text("models: 3\n")
    plain = meiosis("status", "first", "--results", tmp_path)
    assert plain.status == 1
    assert plain.err.startswith("meiosis: ")
    assert "Traceback" not in plain.err
    assert "Traceback" in meiosis("status", "first", "--results", tmp_path, "--debug").err


# Interrupting, locking, resuming


def slow_config(family: Path, folder: Path) -> Path:
    """A search whose candidates take a while, for as long as there is a file `slow` beside the config."""
    (folder / "pause.py").write_text(
        "import pathlib, time\n"
        f"SLOW = pathlib.Path({str(folder / 'slow')!r})\n"
        "def score(model):\n"
        "    time.sleep(0.3 * SLOW.exists())\n"
        "    return 0.0\n"
    )
    (folder / "slow").touch()
    config = short(config_of(family, folder / "runs"), budget=12)
    config["evaluators"]["pause"] = {"use": "python", "function": f"{folder / 'pause.py'}:score"}
    return write_config(config, folder)


def told(results: Path, name: str) -> int:
    ended = meiosis("status", name, "--results", results, "--json")
    return int(ended.json["done"]) if ended.status == 0 else 0


def test_ctrl_c_ends_with_status_130_and_the_command_that_goes_on(family: Path, tmp_path: Path) -> None:
    config, results = slow_config(family, tmp_path), tmp_path / "runs"
    process = spawn("search", config, "--run", "long")
    wait_until(lambda: (results / "long" / "history").is_dir() and told(results, "long") >= 2, process)
    second = meiosis("resume", "long", "--results", results)
    assert second.status == 1
    assert second.out == ""
    assert second.err.count("\n") == 1, second.err
    assert str(process.pid) in second.err
    assert meiosis("status", "long", "--results", results, "--json").json["state"] == "running"
    process.send_signal(signal.SIGINT)
    ended = end(process)
    assert ended.status == 130, ended
    assert ended.out == ""
    last = ended.err.splitlines()[-1]
    assert f"meiosis resume {results / 'long'}" in last
    done = told(results, "long")
    assert 2 <= done < 12
    assert f"{done} of 12 candidates" in last
    stopped = meiosis("status", "long", "--results", results)
    assert "stopped" in stopped.out
    assert "meiosis resume" in stopped.out
    (tmp_path / "slow").unlink()
    finished = meiosis("resume", results / "long", "--workers", 1)
    assert finished.status == 0, finished.err
    assert f"search: {done}/12 candidates" in finished.err
    assert told(results, "long") == 12


# A resume is of the same models and data


@pytest.fixture
def own_family(family: Path, tmp_path: Path) -> Path:
    """A copy of the family that a test may change."""
    return Path(shutil.copytree(family, tmp_path / "own"))


def unfinished(config: dict[str, Any], folder: Path) -> Path:
    """A run that stopped before its first candidate, as one whose worker could not start."""
    from search.config import load_config
    from search.run import Watcher, start
    from search.setup import check

    def no_pool(*_: object) -> Any:
        raise KeyboardInterrupt

    from search.errors import InterruptedRun

    with pytest.raises(InterruptedRun):
        start(check(load_config(write_config(config, folder))), no_pool, Watcher(), "run")
    return folder / "results"


def test_a_source_that_changed_refuses_resume_and_export_by_its_name(own_family: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    results = unfinished(config_of(own_family, tmp_path / "results"), tmp_path)
    weights = own_family / "english" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, weights, {"format": "pt"})
    for command in (["resume", "run"], ["export", "run", str(tmp_path / "out")]):
        ended = meiosis(*command, "--results", results)
        assert ended.status != 0
        assert ended.err.count("\n") == 1, ended.err
        assert "model 'english'" in ended.err
        assert str(own_family / "english") in ended.err


def test_data_that_changed_refuses_resume_by_the_name_of_the_evaluator(own_family: Path, tmp_path: Path) -> None:
    results = unfinished(config_of(own_family, tmp_path / "results"), tmp_path)
    path = own_family / "data" / "cpp" / "certify.jsonl"
    path.write_text(path.read_text().replace("a", "b", 1))
    ended = meiosis("resume", "run", "--results", results)
    assert ended.status != 0
    assert ended.err.count("\n") == 1, ended.err
    assert "evaluator 'cpp'" in ended.err


def test_a_source_that_is_gone_refuses_resume_with_its_key(own_family: Path, tmp_path: Path) -> None:
    results = unfinished(config_of(own_family, tmp_path / "results"), tmp_path)
    shutil.rmtree(own_family / "python")
    ended = meiosis("resume", "run", "--results", results)
    assert ended.status == 2
    assert "models.sources.python" in ended.err


# What the repository ships


def examples() -> list[Path]:
    root = Path(__file__).parents[1]
    found = sorted((root / "examples").rglob("*.y*ml"))
    assert "recipe.yaml" in {path.name for path in found}
    # That of the vision family is planned where one is made: test_samples_vision.py.
    found = [path for path in found if path.name != "vision.yaml"]
    return [*found, root / "meiosis" / "samples" / "text.yaml"]


@pytest.mark.parametrize("example", examples(), ids=lambda path: path.name)
def test_every_shipped_yaml_works_on_a_family_like_the_sample_models(
    example: Path, family: Path, tmp_path: Path
) -> None:
    folder = "examples" if "examples" in example.parts else "samples/text"
    shutil.copytree(family, tmp_path / "samples" / "text")
    (tmp_path / folder).mkdir(exist_ok=True)
    copy = tmp_path / folder / example.name
    shutil.copy(example, copy)
    is_recipe = "\nrules:" in copy.read_text()
    ended = meiosis("merge", copy, tmp_path / "out") if is_recipe else meiosis("plan", copy)
    assert ended.status == 0, ended.err
    assert ended.err == ""
