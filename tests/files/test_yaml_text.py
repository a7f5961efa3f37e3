"""Keys that YAML 1.1 reads as true and false stay names; everything else is left alone."""

from __future__ import annotations

import pytest
import yaml

from lit_merge.files.yaml_text import with_plain_keys


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("lora: {rank: 4, on: [a]}", {"lora": {"rank": 4, "on": ["a"]}}),
        ("lora:\n  on: {class_path: A}\n  rank: 2 # on: rank", {"lora": {"on": {"class_path": "A"}, "rank": 2}}),
        ("- {no: 1, Yes: on}\n- off", [{"no": 1, "Yes": True}, False]),
        ("a: &x {on: 1}\nb: *x", {"a": {"on": 1}, "b": {"on": 1}}),
        ("\"on\": 1\n'no': 2", {"on": 1, "no": 2}),
        ("a: 'on: b'\nc: |\n  off: d\n", {"a": "on: b", "c": "off: d\n"}),
        ("true: 1", {True: 1}),
    ],
)
def test_keys(text: str, read: object) -> None:
    assert yaml.safe_load(with_plain_keys(text)) == read


@pytest.mark.parametrize("text", ["on: [", "plain: text", "on: &a [*a]"])
def test_what_needs_nothing_or_is_damaged_is_left(text: str) -> None:
    assert with_plain_keys(text) in (text, text.replace("on:", '"on":'))


def test_through_the_command_line(tmp_path) -> None:
    from jsonargparse import ArgumentParser

    import lit_merge.commands.parsing  # noqa: F401 - which sets the loader

    parser = ArgumentParser()
    parser.add_argument("--settings", type=dict)
    path = tmp_path / "config.yaml"
    path.write_text("settings: {on: 1}\n")
    parser.add_argument("--config", action="config")
    assert parser.parse_args(["--config", str(path)]).settings == {"on": 1}
