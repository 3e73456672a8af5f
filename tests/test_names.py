"""What may be a part of a path, and what is made of the rest."""

import pytest

from slm.errors import UserError
from slm.names import file_name, path_component


@pytest.mark.parametrize(
    "value", ["", ".", "..", "a/b", "../x", "/x", "a\\b", "a\0b", "ä" * 128, 7, None]
)
def test_what_is_not_one_name_is_refused(value):
    with pytest.raises(UserError, match=r"^name is .*, it must be one name"):
        path_component("name", value)


@pytest.mark.parametrize("value", ["tokens", "a b=c,d", ".hidden", "..x", "ä" * 127, "x" * 255])
def test_one_name_stays_as_it_is(value):
    assert path_component("name", value) == value == file_name(value)


def test_a_file_can_be_named_after_any_text(tmp_path):
    texts = ["a/b", "a_b", "a//b", "..", ".", "", "\0", "x" * 256, "x" * 257, "ä" * 200, "\ud800/"]
    names = [file_name(text) for text in texts]
    assert len(set(names)) == len(texts) and names[1] == "a_b" and names[0].startswith("a_b~")
    assert names == [file_name(text) for text in texts]
    for name in names:
        (tmp_path / name).touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_name_has_room_for_what_is_put_around_it():
    assert file_name("x" * 100, 100) == "x" * 100
    assert len(file_name("x" * 101, 100)) <= 100
