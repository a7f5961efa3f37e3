"""The tokenizer of a merge of several vocabularies is the one that has its rows' tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders.language_folders import language_model, tokenizer
from builders.tiny_architectures import silent
from safetensors.torch import load_file

from lit_merge.commands.merge import merge
from lit_merge.errors import ConfigurationError

pytest.importorskip("transformers")

WHOLE = 50  # tokens of the tokenizer without those that are added
TABLE = "model.embed_tokens.weight"


@pytest.fixture
def save(tmp_path):
    """Write a model with the tokens that are added to its tokenizer, and tell its folder."""

    def write(name, *tokens, seed=0, rows=None, template=None, words=True, **settings):
        count = WHOLE + len(tokens) if rows is None else rows
        made = tokenizer("causal")
        made.add_tokens(list(tokens))
        made.chat_template = template
        with silent():
            language_model("llama", seed, vocab_size=count, **settings).save_pretrained(tmp_path / name)
            if words:
                made.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def run(tmp_path):
    """Merge, and tell what came of it."""

    def merged(base, *vectors, rows, output="out", **more):
        return merge(list(vectors), str(tmp_path / output), "task_arithmetic", base=base, rows=rows,
                     settings={"coefficient": 1.0}, **more)  # fmt: skip

    return merged


def opened(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with silent():
        return AutoModelForCausalLM.from_pretrained(str(folder)).eval(), AutoTokenizer.from_pretrained(str(folder))


@torch.no_grad()
def runs(folder, text, ids):
    """Whether a folder's tokenizer numbers a text so, and its model computes something of it."""
    model, words = opened(folder)
    given = words(text, return_tensors="pt").input_ids
    assert given.tolist() == [ids]
    assert max(words.get_vocab().values()) < model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    assert model(given).logits.isfinite().all()
    return words


def bytes_of(folder, *names):
    return [(Path(folder) / name).read_bytes() for name in names]


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def test_a_union_has_the_tokenizer_with_all_tokens(save, run, capsys):
    base, same = save("base"), save("same", seed=1)
    new = save("new", "<new>", seed=2, template="{{ messages }}")
    planned = run(base, same, new, rows="union", dry_run=True)
    result = run(base, same, new, rows="union")
    words = runs(result.output, "a <new> b", [1, 4, WHOLE, 5])
    assert words.chat_template == "{{ messages }}"
    files = (*TOKENIZER, "chat_template.jinja")
    assert bytes_of(result.output, *files) == bytes_of(new, *files)
    assert bytes_of(result.output, "generation_config.json") == bytes_of(base, "generation_config.json")
    merged, own = (load_file(f"{one}/model.safetensors")[TABLE] for one in (result.output, new))
    torch.testing.assert_close(merged[WHOLE], own[WHOLE])
    card = (result.output / "README.md").read_text(encoding="utf-8")
    for said in (str(planned), result.describe(), card):
        assert f"the tokenizer of these rows is that of {new}" in said
        assert f"chat_template.jinja, tokenizer.json, tokenizer_config.json: of {new} instead of the base" in said
        assert "1 of them new ('<new>')" in said
    assert "differs from that of the base" not in str(planned) + card + capsys.readouterr().err


def test_a_union_without_new_tokens_has_the_bases(save, run):
    base = save("base", "<new>", template="{{ messages }}")
    result = run(base, save("old", seed=1), rows="union")
    runs(result.output, "a <new> b", [1, 4, WHOLE, 5])
    assert bytes_of(result.output, *TOKENIZER) == bytes_of(base, *TOKENIZER)
    assert "the tokenizer of these rows is the base's" in result.describe()
    assert "instead of the base" not in result.describe()


def test_what_the_fitting_tokenizer_has_not_stays_behind(save, run):
    base = save("base", template="{{ messages }}")
    new = save("new", "<new>", seed=1)
    result = run(base, new, rows="union")
    assert runs(result.output, "<new>", [1, WHOLE]).chat_template is None
    assert f"not written, as {new} has none: the base's chat_template.jinja" in result.describe()


def test_tokens_in_another_order_are_found_by_the_larger_tokenizer(save, run):
    base = save("base")
    one, two = save("one", "<a>", seed=1), save("two", "<b>", "<a>", seed=2)
    result = run(base, one, two, rows="union")
    runs(result.output, "<a> <b>", [1, WHOLE + 1, WHOLE])
    merged, first, second, start = (
        load_file(f"{folder}/model.safetensors")[TABLE].double() for folder in (result.output, one, two, base)
    )
    torch.testing.assert_close(merged[WHOLE], second[WHOLE], rtol=1e-5, atol=1e-6)
    origin = (first[WHOLE] + second[WHOLE + 1]) / 2  # of a row that the base has not
    expected = first[WHOLE] + second[WHOLE + 1] - origin
    torch.testing.assert_close(merged[WHOLE + 1], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged[4], first[4] + second[4] - start[4], rtol=1e-5, atol=1e-5)


def test_a_union_that_no_tokenizer_has_is_refused(save, run, tmp_path):
    base, one, two = save("base"), save("one", "<a>", seed=1), save("two", "<b>", seed=2)
    with pytest.raises(ConfigurationError) as refused:
        run(base, one, two, rows="union")
    assert str(refused.value) == (
        "rows: expected a tokenizer with exactly the tokens of the rows that are written, as tokens without a row "
        "break the model and rows without their token are lost, got none: the base's lacks '<a>', '<b>'; "
        f"that of {one} lacks '<b>'; that of {two} lacks '<a>', has under another number '<b>'. Give one of these "
        "models a tokenizer with all of them, choose other rows (base fits always), or name a file ending in "
        ".safetensors as output, which has no tokenizer."
    )
    assert not (tmp_path / "out").exists()
    result = run(base, one, two, rows="union", output="out/m.safetensors")
    assert "no model's tokenizer has exactly the tokens of these rows: the base's lacks '<a>', '<b>'" in (
        result.describe()
    )
    both = tokenizer("causal")  # the way out that the refusal names
    both.add_tokens(["<a>", "<b>"])
    both.save_pretrained(one)
    runs(run(base, one, two, rows="union").output, "<a> <b>", [1, WHOLE, WHOLE + 1])


def test_common_rows_have_a_tokenizer_without_the_others(save, run, capsys):
    from lit_merge.models.language.loading import load_language_model

    base, old = save("base", "<new>"), save("old", seed=1)
    result = run(base, old, rows="common")
    runs(result.output, "a <new> b", [1, 4, 3, 5])
    assert bytes_of(result.output, *TOKENIZER) == bytes_of(old, *TOKENIZER)
    assert f"the tokenizer of these rows is that of {old}; 1 token has no row ('<new>')" in result.describe()
    assert "differs from that of the base" not in capsys.readouterr().err
    with silent():
        load_language_model(str(result.output), "causal")  # which has refused what was written


def test_common_rows_that_no_tokenizer_fits_are_refused(save, run, tmp_path):
    base, bare = save("base", "<new>"), save("bare", seed=1, words=False)
    with pytest.raises(ConfigurationError, match=r"got none: the base's has without a row '<new>'\. Give one of"):
        run(base, bare, rows="common")
    one, two = save("one", "<x>", "<y>", seed=2), save("two", "<z>", seed=3)
    with pytest.raises(ConfigurationError) as refused:
        run(one, two, rows="common")
    assert "the base's lacks '<z>', has without a row '<y>'; that of " in str(refused.value)
    assert f"that of {two} lacks '<x>'. Give" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_special_tokens_of_the_configuration_need_a_row(save, run, tmp_path):
    base, old = save("base", "<pad2>", pad_token_id=WHOLE), save("old", seed=1)
    with pytest.raises(ConfigurationError, match=r"below 50, the rows .* got pad_token_id 50 in .* Choose rows that"):
        run(base, old, rows="common")
    assert not (tmp_path / "out").exists()
    runs(run(base, old, rows="union").output, "a <pad2>", [1, 4, WHOLE])


def test_rows_of_the_base_have_its_tokenizer(save, run, capsys):
    base, new = save("base"), save("new", "<new>", seed=1)
    result = run(base, new, rows="base")
    runs(result.output, "a <new>", [1, 4, 3])
    assert bytes_of(result.output, *TOKENIZER) == bytes_of(base, *TOKENIZER)
    assert "the tokenizer of these rows is the base's; 1 token has no row ('<new>')" in result.describe()
    assert "differs from that of the base" not in capsys.readouterr().err


def test_tokens_in_rows_that_filled_the_table_up(save, run):
    """The tables are of one size, and only the tokenizer tells that a row is a token's now."""
    base, new = save("base", rows=64), save("new", "<new>", seed=1, rows=64)
    for rows in ("union", "common"):
        result = run(base, new, rows=rows, output=rows)
        runs(result.output, "a <new>", [1, 4, WHOLE])
        assert json.loads((result.output / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 64


def test_rows_that_met_another_token_are_still_warned_of(save, run, capsys):
    base, one, bare = save("base", "<a>"), save("one", "<b>", seed=1), save("bare", seed=2, words=False)
    with pytest.raises(ConfigurationError, match=r"got none: the base's lacks '<b>'; that of .*one lacks '<a>'"):
        run(base, one, bare, rows="union")  # by number, as a tokenizer is missing
    run(base, one, bare, rows="union", output="out/m.safetensors")
    assert "the tokenizer of one differs from that of the base in 2 tokens ('<a>', '<b>')" in capsys.readouterr().err
