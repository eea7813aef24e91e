"""The config beside the sample models, when what is shipped changes and when the user changes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from meiosis.samples.config_file import CONFIG, make_with_config


class Family:
    """A folder in which the command is repeated; `anew` as a rebuild does it, which replaces the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, list[str]()

    def made(self, shipped: str, *, anew: bool = False) -> str:
        """The config after the command of a version that ships this one."""

        def make() -> str:
            if anew:
                shutil.rmtree(self.folder)
            self.folder.mkdir(exist_ok=True)
            return shipped

        self.lines.clear()
        return make_with_config(self.folder, make, self.lines.append).read_text()

    def edit(self, text: str) -> None:
        (self.folder / CONFIG).write_text(text)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path / "text")


@pytest.mark.parametrize("anew", [False, True])
def test_a_config_that_nobody_edited_follows_the_shipped_one(family: Family, anew: bool) -> None:
    for shipped in ("budget: 1\n", "budget: 2 # größer\n", "budget: 2 # größer\n", "budget: 3\n"):
        assert family.made(shipped, anew=anew and family.folder.exists()) == shipped
        assert family.lines == []


@pytest.mark.parametrize("anew", [False, True])
def test_an_edited_config_is_kept_and_one_line_says_how_to_get_the_shipped_one(family: Family, anew: bool) -> None:
    family.made("budget: 1\n")
    family.edit("budget: 100\n")
    for shipped in ("budget: 1\n", "budget: 2\n"):
        assert family.made(shipped, anew=anew) == "budget: 100\n"
        [line] = family.lines
        assert str(family.folder / CONFIG) in line
        assert "delete it and repeat this command" in line
        assert "\n" not in line
    (family.folder / CONFIG).unlink()
    assert family.made("budget: 2\n") == "budget: 2\n"
    assert family.made("budget: 3\n") == "budget: 3\n", "from here on it follows again"
    assert family.lines == []


def test_a_file_in_place_of_the_folder_is_left_to_the_making_of_the_family(family: Family) -> None:
    family.folder.write_text("")
    with pytest.raises(FileExistsError):
        family.made("budget: 1\n")


def test_an_edit_that_was_taken_back_is_none(family: Family) -> None:
    family.made("budget: 1\n")
    family.edit("budget: 100\n")
    family.made("budget: 2\n", anew=True)
    family.edit("budget: 1\n")
    assert family.made("budget: 2\n") == "budget: 2\n"


def test_of_a_family_that_is_older_than_the_record_only_the_shipped_config_is_known_to_be_unedited(
    family: Family,
) -> None:
    family.folder.mkdir()
    family.edit("budget: 1\n")
    assert family.made("budget: 2\n") == "budget: 1\n"
    assert len(family.lines) == 1
    family.edit("budget: 2\n")
    family.made("budget: 2\n")
    assert family.made("budget: 3\n") == "budget: 3\n"
