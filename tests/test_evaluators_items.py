"""Reading items, and splitting them into pools that share nothing."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evaluators.base import ITEM_POOLS
from evaluators.errors import UserError
from evaluators.items import DataOptions, Items, PoolPaths, Split, read_items, text_in

TEXTS = [f"text number {n} has its own words" for n in range(60)]


def parse(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"text": text_in(record, "text")}


def jsonl(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pools_of(items: Items) -> dict[str, set[str]]:
    return {pool: {items[id_].content["text"] for id_ in items.ids(pool)} for pool in ITEM_POOLS}


def three(folder: Path, **texts: list[str]) -> PoolPaths:
    paths = {p: jsonl(folder / f"{p}.jsonl", *({"text": t} for t in texts.get(p, [f"only {p}"]))) for p in ITEM_POOLS}
    return PoolPaths(**paths)


def test_a_file_is_split_into_three_disjoint_pools_that_together_are_everything(tmp_path: Path) -> None:
    pools = pools_of(read_items(jsonl(tmp_path / "a.jsonl", *({"text": t} for t in TEXTS)), parse))
    assert set().union(*pools.values()) == set(TEXTS)
    assert sum(len(texts) for texts in pools.values()) == len(TEXTS)


@given(st.lists(st.text(min_size=1), unique=True, min_size=1), st.text(min_size=1))
def test_the_pool_of_a_document_does_not_depend_on_other_documents(names: list[str], other: str) -> None:
    before = {name: Split().pool_of(name) for name in names}
    after = {name: Split().pool_of(name) for name in [other, *reversed(names)]}
    assert all(after[name] == pool for name, pool in before.items())


@settings(max_examples=25)
@given(st.integers(5, 60), st.integers(5, 35), st.text(max_size=5))
def test_pools_get_about_their_share(search: int, select: int, salt: str) -> None:
    split = Split(search=search / 100, select=select / 100, certify=(100 - search - select) / 100)
    pools = [split.pool_of(f"{salt}/{n}") for n in range(4000)]
    for pool in ITEM_POOLS:
        # Four standard deviations of a binomial share are at most 0.032.
        assert abs(pools.count(pool) / 4000 - getattr(split, pool)) < 0.04


def test_growing_one_share_at_the_end_moves_no_search_item() -> None:
    names = [f"d{n}" for n in range(500)]
    first, second = Split(search=0.5, select=0.2, certify=0.3), Split(search=0.5, select=0.4, certify=0.1)
    assert [n for n in names if first.pool_of(n) == "search"] == [n for n in names if second.pool_of(n) == "search"]


def test_items_of_one_document_stay_together(tmp_path: Path) -> None:
    records = [{"text": f"{n} of {d}", "document": f"d{d}"} for d in range(30) for n in range(4)]
    items = read_items(jsonl(tmp_path / "a.jsonl", *records), parse)
    where = {id_: pool for pool in ITEM_POOLS for id_ in items.ids(pool)}
    assert all(len({where[i.id] for i in items if i.document == d}) == 1 for d in {i.document for i in items})


def test_equal_texts_of_one_file_never_go_to_two_pools(tmp_path: Path) -> None:
    """However often a text stands there and whatever its ids: it is one document."""
    records = [{"text": t, "id": f"{k}-{n}"} for k in range(5) for n, t in enumerate(TEXTS)]
    pools = pools_of(read_items(jsonl(tmp_path / "a.jsonl", *records), parse))
    assert sum(len(texts) for texts in pools.values()) == len(TEXTS)


def test_moving_lines_or_adding_some_moves_no_text_to_another_pool(tmp_path: Path) -> None:
    few = pools_of(read_items(jsonl(tmp_path / "a.jsonl", *({"text": t} for t in TEXTS[:40])), parse))
    more = pools_of(read_items(jsonl(tmp_path / "b.jsonl", *({"text": t} for t in reversed(TEXTS))), parse))
    assert all(few[pool] <= more[pool] for pool in ITEM_POOLS)


def test_a_limit_keeps_the_same_items_whatever_their_order_and_smaller_limits_keep_some_of_them(
    tmp_path: Path,
) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": t} for t in TEXTS))
    turned = jsonl(tmp_path / "b.jsonl", *({"text": t} for t in reversed(TEXTS)))
    five, three_, same = (pools_of(read_items(p, parse, limit=n)) for p, n in ((path, 5), (path, 3), (turned, 5)))
    assert all(len(five[pool]) == 5 and len(three_[pool]) == 3 for pool in ITEM_POOLS)
    assert all(three_[pool] <= five[pool] for pool in ITEM_POOLS)
    assert five == same


def test_a_folder_gives_one_item_per_text_file_and_one_per_line_of_jsonl(tmp_path: Path) -> None:
    for name in ("a.txt", "inner/b.py", "inner/deep/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    jsonl(tmp_path / "d.jsonl", *({"text": t} for t in TEXTS))
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    items = read_items(tmp_path, parse, reads_text=True)
    ids = {i.id for i in items}
    assert ids == {"a.txt", "inner/b.py", "inner/deep/c.md", *(f"d.jsonl:{n}" for n in range(1, 61))}
    assert items["inner/b.py"].content == {"text": "content of inner/b.py"}


def test_a_separator_divides_a_text_file_and_keeps_indentation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n----\n".join([*TEXTS, "  indented", "\n", ""]))
    items = read_items(tmp_path / "a.txt", parse, reads_text=True, separator="----")
    assert {i.content["text"] for i in items} == {*TEXTS, "  indented"}


def test_bytes_are_kept_but_the_byte_order_mark(tmp_path: Path) -> None:
    for pool in ITEM_POOLS:
        (tmp_path / pool).write_bytes(b"\xef\xbb\xbf" + f"{pool}\r\n\u2028x".encode())
    items = read_items(PoolPaths(**{p: tmp_path / p for p in ITEM_POOLS}), parse, reads_text=True)
    assert {i.content["text"] for i in items} == {f"{p}\r\n\u2028x" for p in ITEM_POOLS}


def test_files_with_the_same_name_in_three_folders_have_different_ids(tmp_path: Path) -> None:
    for pool in ITEM_POOLS:
        jsonl(tmp_path / pool / "data.jsonl", {"text": pool})
    items = read_items(PoolPaths(**{p: tmp_path / p for p in ITEM_POOLS}), parse)
    assert {i.id for i in items} == {f"{p}/data.jsonl:1" for p in ITEM_POOLS}


def test_the_hash_changes_with_a_text_a_document_an_id_or_a_pool_and_not_with_the_place(
    tmp_path: Path,
) -> None:
    def digest(name: str, *records: Mapping[str, Any], **options: Any) -> str:
        lines = [*records, *({"id": n, "text": t} for n, t in enumerate(TEXTS, 100))]
        return read_items(jsonl(tmp_path / name / "a.jsonl", *lines), parse, **options).sha256()

    first = digest("x", {"id": 1, "text": "a"})
    assert first == digest("y", {"id": "1", "text": "a"})
    others = [
        digest("z", {"id": 1, "text": "b"}),
        digest("z", {"id": 2, "text": "a"}),
        digest("z", {"id": 1, "text": "a", "document": "d"}),
        digest("z", {"id": 1, "text": "a"}, split=Split(search=0.2, select=0.3, certify=0.5)),
        digest("z", {"id": 1, "text": "a"}, limit=1),
    ]
    assert len({first, *others}) == 6


GOOD = [json.dumps({"text": t}) for t in TEXTS]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not JSON: Expecting property name enclosed in double quotes"),
        ("[1]", "a.jsonl:2: a list, expected one JSON object per line"),
        ("3", "a.jsonl:2: a number, expected one JSON object"),
        ("[" * 100_000, "a.jsonl:2: not JSON"),
        ('{"txt": "x"}', "a.jsonl:2: no key 'text'; the line has 'txt'"),
        ("{}", "a.jsonl:2: no key 'text'; the line has no keys"),
        ('{"text": 5}', "a.jsonl:2: 'text' is a number, expected text"),
        ('{"text": null}', "a.jsonl:2: 'text' is null, expected text"),
        ('{"text": "  "}', "a.jsonl:2: 'text' is empty"),
        (
            '{"text": "a\\ud800"}',
            "a.jsonl:2: 'text' has half a character (an unpaired surrogate) at position 1",
        ),
        ('{"text": "a", "id": true}', "a.jsonl:2: 'id' is true or false, expected text"),
        ('{"text": "a", "id": ""}', "a.jsonl:2: 'id' is empty"),
        ('{"text": "a", "document": []}', "a.jsonl:2: 'document' is a list, expected text"),
        ('{"text": "a", "id": 7}\n{"text": "b", "id": "7"}', "id '7' is also that of"),
        ('{"text": "a", "id": "a.jsonl:1"}', "id 'a.jsonl:1' is also that of"),
    ],
)
def test_a_wrong_line_is_reported_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([GOOD[0], line, *GOOD[1:]]))
    with pytest.raises(UserError) as caught:
        read_items(tmp_path / "a.jsonl", parse)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faults_of_files_are_reported_with_a_way_out(tmp_path: Path) -> None:
    jsonl(tmp_path / "items.jsonl", {"text": "x"})
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    for name, message in {
        "item.jsonl": "item.jsonl: no such file or folder; did you mean 'items.jsonl'?",
        "nowhere/x": "no such file or folder, and no folder",
        "empty.jsonl": "empty.jsonl: no items in it",
        "empty.txt": "empty.txt: the file is empty",
        "latin.txt": "latin.txt: not UTF-8 text (byte 0)",
        "one.txt": "one.txt: 1 document, and none falls into the",
        "pictures": "pictures: no text files (.txt, .md, .py, ...) or .jsonl files in this folder, 1 other",
    }.items():
        with pytest.raises(UserError) as caught:
            read_items(tmp_path / name, parse, reads_text=True)
        assert message in str(caught.value)


def folder_of_texts(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        path = folder / f"part{number % 2}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def a_broken_link(path: Path) -> None:
    path.symlink_to("gone.txt")


def a_latin_text(path: Path) -> None:
    path.write_bytes("é".encode("latin-1"))


UNREADABLE = {
    "a link to nothing": a_broken_link,
    "not a regular file": os.mkfifo,
    "not UTF-8 text (byte 0)": a_latin_text,
}


@pytest.mark.parametrize("fault", UNREADABLE)
@pytest.mark.parametrize("name", ["old.txt", "it's [old]*.txt"])
def test_a_file_of_a_folder_that_cannot_be_read_is_left_out_as_its_message_says(
    fault: str, name: str, tmp_path: Path
) -> None:
    good = read_items(folder_of_texts(tmp_path), parse, reads_text=True).sha256()
    UNREADABLE[fault](tmp_path / "part1" / name)
    with pytest.raises(UserError) as caught:
        read_items(tmp_path, parse, reads_text=True)
    message = str(caught.value)
    assert f"{name}: {fault}; " in message
    exclude = yaml.safe_load(message[message.index("exclude: ") :])["exclude"]
    assert read_items(tmp_path, parse, reads_text=True, exclude=exclude).sha256() == good


def test_excluded_files_are_found_by_name_and_by_path_and_change_nothing_else(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path)
    everything = pools_of(read_items(folder, parse, reads_text=True))
    for exclude, left_out in {
        ("7.txt",): {TEXTS[7]},
        ("1?.txt", "3.txt"): {*TEXTS[10:20], TEXTS[3]},
        ("part1/*",): set(TEXTS[1::2]),
        ("part0/3*", "part1/3?.txt"): set(TEXTS[30:40]),
    }.items():
        pools = pools_of(read_items(folder, parse, reads_text=True, exclude=exclude))
        assert pools == {pool: texts - left_out for pool, texts in everything.items()}


def test_a_pattern_that_excludes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exclude: no file of the data matches '\*\.bak'"):
        read_items(folder_of_texts(tmp_path / "a"), parse, reads_text=True, exclude=["7.txt", "*.bak"])
    path = jsonl(tmp_path / "a.jsonl", *({"text": t} for t in TEXTS))
    with pytest.raises(UserError, match=r"no file of the data matches 'a\.jsonl'"):
        read_items(path, parse, exclude=["a.jsonl"])


def test_equal_contents_in_two_pools_are_refused_with_both_places(tmp_path: Path) -> None:
    data = three(tmp_path, search=["a", "b"], certify=["c", "b"])
    with pytest.raises(UserError, match=r"certify.jsonl:2: the same content as .*search.jsonl:2"):
        read_items(data, parse)


def test_a_document_in_two_pools_is_refused(tmp_path: Path) -> None:
    paths = {p: jsonl(tmp_path / f"{p}.jsonl", {"text": p, "document": "d"}) for p in ITEM_POOLS}
    with pytest.raises(UserError, match="document 'd' is in the select and"):
        read_items(PoolPaths(**paths), parse)


def test_relative_paths_start_at_the_folder_of_the_config_and_become_absolute(tmp_path: Path) -> None:
    context = {"folder": tmp_path / "configs"}
    options = DataOptions.model_validate({"data": "../data/a.jsonl"}, context=context)
    assert options.data == tmp_path / "data" / "a.jsonl"
    pools = {"search": "s", "select": str(tmp_path / "t"), "certify": "c"}
    several = DataOptions.model_validate({"data": pools}, context=context)
    plain = several.model_dump(mode="json")
    assert plain["data"] == {
        "search": str(tmp_path / "configs" / "s"),
        "select": str(tmp_path / "t"),
        "certify": str(tmp_path / "configs" / "c"),
    }
    assert DataOptions.model_validate(plain, context={"folder": Path("/elsewhere")}) == several


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Field required"),
        ({"data": ""}, "the path is empty"),
        ({"data": 5}, "5 is not a path; expected text"),
        ({"data": {"search": "a", "select": "b"}}, "data.pools.certify"),
        ({"data": {"search": "a", "select": "b", "certify": "c", "train": "d"}}, "Extra inputs"),
        ({"data": "a", "limit": 0}, "greater than or equal to 1"),
        ({"data": "a", "split": {"search": 0.6}}, "add up to 1.1, expected 1"),
        ({"data": "a", "split": {"search": 0, "select": 0.5, "certify": 0.5}}, "greater than 0"),
        ({"data": {"search": "a", "select": "b", "certify": "c"}, "split": {}}, "split has no effect"),
        ({"data": "a", "exclude": "*.bak"}, "Input should be a valid tuple"),
        ({"data": "a", "exclude": [""]}, "at least 1 character"),
        ({"data": "a", "dat": "b"}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataOptions.model_validate(options)
    assert message in str(caught.value)


def test_pools_order_and_hash_are_the_same_in_a_process_with_other_string_hashing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": t, "document": t.split()[2]} for t in TEXTS))
    program = (
        "import sys\nfrom pathlib import Path\nfrom evaluators.items import read_items\n"
        "items = read_items(Path(sys.argv[1]), lambda r: {'text': r['text']}, limit=9)\n"
        "print(items.sha256(), [items.ids(p) for p in ('search', 'select', 'certify')])\n"
    )
    root = str(Path(inspect.getfile(read_items)).parents[1])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
