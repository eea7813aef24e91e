"""The text samples: what the corpus promises, and a family trained for a few steps."""

import json
import os
import re
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.errors import UserError
from meiosis.samples.card import CARD, POOLS, FamilyPlan, file_hashes, read_card
from meiosis.samples.corpus import (
    DOMAINS,
    ITEM_CHARACTERS,
    ITEMS,
    SHARED_PARAGRAPH,
    Document,
    excerpts_of,
    read_corpus,
    split,
    without_shared_paragraphs,
)
from meiosis.samples.text import make_text_family
from meiosis.samples.training import ModelShape, Phase

REPOSITORY = Path(__file__).parents[1]
TINY = FamilyPlan(
    shape=ModelShape(vocabulary=384, hidden=32, layers=2, heads=2, mlp=48, window=48),
    base=Phase(steps=6, batch=4, learning_rate=3e-3),
    **dict.fromkeys(DOMAINS, Phase(steps=3, batch=2, learning_rate=1e-3)),
)


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(seed=0)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A family of a few steps, and the lines that its making reported."""
    folder = tmp_path_factory.mktemp("samples") / "text"
    lines: list[str] = []
    make_text_family(folder, seed=3, report=lines.append, plan=TINY)
    return folder, lines


def test_every_pool_of_every_domain_is_full(corpus):
    for text in corpus.values():
        assert {pool: len(items) for pool, items in text.items.items()} == ITEMS
        assert all(200 <= len(item.text) <= ITEM_CHARACTERS + 1 for pool in POOLS for item in text.items[pool])


def test_no_document_lies_in_two_splits(corpus):
    for text in corpus.values():
        splits = [{document.name for document in text.train}]
        splits += [{item.document for item in text.items[pool]} for pool in POOLS]
        for one, other in combinations(splits, 2):
            assert not one & other


def test_no_paragraph_of_a_scored_document_can_be_read_in_training(corpus):
    def paragraphs(text):
        return {
            words
            for paragraph in re.split(r"\n\s*\n", text)
            if len(words := " ".join(paragraph.split())) >= SHARED_PARAGRAPH
        }

    train = set().union(*(paragraphs(d.text) for text in corpus.values() for d in text.train))
    pools = {
        pool: set().union(*(paragraphs(item.text) for text in corpus.values() for item in text.items[pool]))
        for pool in POOLS
    }
    for pool, found in pools.items():
        # A paragraph that the cut has halved may equal a whole one by chance; none does.
        assert not found & train, pool
    for one, other in combinations(POOLS, 2):
        assert not pools[one] & pools[other]


def test_ids_are_unique_and_name_no_path_of_the_machine(corpus):
    ids = [item.id for text in corpus.values() for pool in POOLS for item in text.items[pool]]
    assert len(set(ids)) == len(ids)
    assert all(id_.partition("/")[0] in DOMAINS and "/./" not in id_ and ".." not in id_ for id_ in ids)
    assert not any(part in id_ for id_ in ids for part in (str(Path.home()), sys.prefix, "site-packages"))


def test_an_item_is_a_contiguous_part_of_its_document(corpus):
    source = {d.name: d.text for d in without_shared_paragraphs(_english())}
    for pool in POOLS:
        for item in corpus["english"].items[pool]:
            if item.document in source:
                assert item.text.strip("\n") in source[item.document]


def _english():
    from meiosis.samples.corpus import english_documents

    return english_documents()


def test_another_seed_gives_another_split(corpus):
    other = read_corpus(seed=1)
    for domain in DOMAINS:
        mine = {item.id for item in corpus[domain].items["search"]}
        theirs = {item.id for item in other[domain].items["search"]}
        assert len(mine & theirs) < len(mine) / 2


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.sampled_from([f"paragraph {i} " + "word " * 40 for i in range(8)]), max_size=6),
        max_size=6,
    )
)
def test_after_deduplication_every_long_paragraph_is_in_one_document(contents):
    documents = [Document(f"english/{i}", "\n\n".join(parts)) for i, parts in enumerate(contents)]
    kept = without_shared_paragraphs(documents)
    owners: dict[str, list[str]] = {}
    for document in kept:
        for paragraph in re.split(r"\n\s*\n", document.text.strip()):
            owners.setdefault(paragraph.strip(), []).append(document.name)
    assert all(len(names) == 1 for names in owners.values())
    assert without_shared_paragraphs(documents[::-1]) == kept


def test_of_two_equal_documents_one_is_kept():
    text = "short lines\n\n" * 60
    kept = without_shared_paragraphs([Document("english/b", text), Document("english/a", text)])
    assert [document.name for document in kept] == ["english/a"]


def test_a_document_without_enough_of_its_own_text_is_dropped():
    quoted = "one paragraph " * 40
    documents = [
        Document("english/short", quoted),
        Document("english/quotes", quoted + "\n\nand little more"),
    ]
    assert [d.name for d in without_shared_paragraphs(documents)] == ["english/short"]


def test_excerpts_are_cut_at_line_ends_and_do_not_overlap():
    document = Document("python/x.py", "".join(f"line {i:04d} of a file\n" for i in range(200)))
    lines = [line for item in excerpts_of(document, seed=0, count=99) for line in item.text.splitlines()]
    assert len(set(lines)) == len(lines)
    assert set(lines) <= set(document.text.splitlines())


def test_the_split_of_a_document_does_not_depend_on_the_order_in_which_documents_are_found(corpus):
    documents = [
        Document(f"python/{i}.py", "".join(f"document {i} line {j} of many\n" for j in range(60))) for i in range(300)
    ]
    assert split(documents, seed=5) == split(documents[::-1], seed=5)


def test_a_family_has_the_promised_files_and_its_card_their_hashes(family):
    folder, _ = family
    for model in ("base", *DOMAINS):
        names = {path.name for path in (folder / model).iterdir()}
        assert {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
        } <= names
    card = read_card(folder)
    assert card is not None
    assert card.files == file_hashes(folder)
    assert card.seed == 3
    assert {p.name for p in folder.parent.iterdir()} == {"text"}
    umask_mode = (folder / CARD).stat().st_mode
    assert all(path.stat().st_mode == umask_mode for path in folder.rglob("*") if path.is_file())
    for domain in DOMAINS:
        for pool in POOLS:
            rows = [json.loads(line) for line in (folder / "data" / domain / f"{pool}.jsonl").open()]
            assert len(rows) == card.splits[domain][pool].items == ITEMS[pool]
            assert all(set(row) == {"id", "document", "text"} for row in rows)


def test_no_file_of_a_family_names_a_path_of_the_machine(family):
    folder, _ = family
    for path in [p for p in folder.rglob("*") if p.suffix in {".json", ".md"}]:
        text = path.read_text()
        assert str(folder.parent) not in text
        assert sys.prefix not in text


def test_stock_transformers_loads_the_checkpoints_and_the_losses_are_those_of_the_card(family):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder, _ = family
    card = read_card(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "python")
    model = AutoModelForCausalLM.from_pretrained(folder / "python").eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    total, tokens = 0.0, 0
    for line in (folder / "data" / "english" / "search.jsonl").open():
        text = json.loads(line)["text"]
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[0, 1:]) == text
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert total / tokens == pytest.approx(card.losses["search"]["python"]["english"], rel=1e-4)


def test_progress_comes_as_plain_lines(family):
    _, lines = family
    assert any(re.fullmatch(r"base: step 6/6, loss \d+\.\d\d, \d+ s", line) for line in lines)
    assert all(any(line.startswith(f"{model}: step 3/3") for line in lines) for model in DOMAINS)
    assert not any("\n" in line or "\r" in line or "\x1b" in line for line in lines)


def test_the_same_seed_gives_the_same_bits_in_a_fresh_process_on_one_thread(family, tmp_path):
    folder, _ = family
    code = (
        "import sys; from pathlib import Path\n"
        "from meiosis.samples.card import FamilyPlan; from meiosis.samples.text import make_text_family\n"
        "plan = FamilyPlan.model_validate_json(sys.argv[2])\n"
        "make_text_family(Path(sys.argv[1]), seed=3, threads=1, plan=plan)"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "77",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "2",
    }
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again"), TINY.model_dump_json()],
        check=True,
        env=environment,
        capture_output=True,
    )
    first, again = read_card(folder), read_card(tmp_path / "again")
    assert first is not None
    assert again is not None
    assert first.files == again.files
    assert first.losses == again.losses


def test_a_complete_family_is_returned_at_once(family):
    folder, _ = family
    written = (folder / CARD).stat().st_mtime_ns
    # The command puts a config beside the models, and users put what they like.
    (folder / "search.yaml").write_text("seed: 1\n")
    card = make_text_family(folder, seed=3, report=lambda _: None, plan=TINY)
    (folder / "search.yaml").unlink()
    assert card == read_card(folder)
    assert (folder / CARD).stat().st_mtime_ns == written


def test_making_a_family_leaves_the_random_state_of_the_caller_alone(family, tmp_path):
    import torch

    folder, _ = family
    (folder / "python" / "model.safetensors").write_bytes(b"damaged")
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    make_text_family(folder, seed=3, report=lambda _: None, plan=TINY)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads
    card = read_card(folder)
    assert card is not None
    assert card.files == file_hashes(folder), "a damaged family is rebuilt"


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty and holds no sample models \('thesis.txt'") as error:
        make_text_family(folder, plan=TINY)
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_foreign_card_does_not_make_a_folder_ours(tmp_path):
    (tmp_path / CARD).write_text('{"kind": "postcard"}')
    with pytest.raises(UserError, match="holds no sample models"):
        make_text_family(tmp_path, plan=TINY)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "text").write_text("")
    with pytest.raises(UserError, match="is a file"):
        make_text_family(tmp_path / "text", plan=TINY)


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_looks_complete_and_the_next_one_works(tmp_path):
    folder = tmp_path / "text"
    endless = TINY.model_copy(update={"base": Phase(steps=100_000, batch=4, learning_rate=1e-3)})
    code = (
        "import sys; from pathlib import Path\n"
        "from meiosis.samples.card import FamilyPlan; from meiosis.samples.text import make_text_family\n"
        "make_text_family(Path(sys.argv[1]), plan=FamilyPlan.model_validate_json(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(folder), endless.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
    )
    assert process.stdout is not None
    assert any(line.startswith("base: step") for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    card = make_text_family(folder, report=lambda _: None, plan=TINY)
    assert card.files == file_hashes(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_the_example_recipe_merges_the_sample_models(family, tmp_path):
    from search.export import merge_recipe
    from search.recipe_file import read_recipe

    (tmp_path / "samples").symlink_to(family[0].parent)  # the recipe goes by `../samples/text`
    examples = tmp_path / "examples"
    examples.mkdir()
    recipe = read_recipe(Path(__file__).parent.parent / "examples" / "recipe.yaml")
    merge_recipe(recipe, tmp_path / "merged", folder=examples)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
