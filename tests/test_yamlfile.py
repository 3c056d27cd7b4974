import pytest

from s2seg.errors import InputError
from s2seg.yamlfile import parse_yaml, read_yaml


def test_merged_keys_are_not_repeated_ones():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, *a], x: 4}\n1: one\n'1': text"
    assert parse_yaml(text) == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 4, "y": 3}, 1: "one", "1": "text"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: {c: 1, d: 2,\n  c: 3}", r"gives 'c' twice \(line 3\); keep one of them"),
        ("a: [", r"is not YAML: .* but found '<stream end>' \(line 1\)"),
        ("a\x00", "is not YAML: unacceptable character"),
        ("a: 2020-13-45", "is not YAML: month must be in 1..12"),
        ("[" * 2000, "is nested too deeply"),
    ],
)
def test_what_is_no_plain_document(text, says):
    with pytest.raises(InputError, match=f"^{says}") as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    for path, says in ((tmp_path / "x.yaml", "is not YAML: "), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(InputError, match=says):
            read_yaml(path)
