"""The cloze task: what its items promise, per kind of frame."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import yaml
from jinja2 import Template

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo import cloze
from sparsity_atlas.zoo.lexicon import load_lexicon, parse_lexicon, read_yaml

TASKS = Path(__file__).parents[3] / "workflow/resources/tasks"
FUNCTION_WORDS = """
    a an the and or but of in on at to for from by with before after under over near his her he
    she they it i is was were has had have not no that this there
"""


@pytest.fixture(scope="module")
def task() -> cloze.Cloze:
    return cloze.Cloze()


@pytest.fixture(scope="module")
def items(task: cloze.Cloze) -> list[dict]:
    return list(islice(task.generate(0), 1500))


def right(item: dict) -> str:
    return item["choices"][item["answer"]]


def wrong(item: dict) -> set[str]:
    return set(item["choices"]) - {right(item)}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_items(task: cloze.Cloze, items: list[dict]) -> None:
    content = set()
    for item in items:
        assert len(set(item["choices"])) == 4
        assert re.fullmatch(r"[A-Z].*\w", item["context"]), item["context"]
        assert not re.search(r"[{}\[\]<>|/_()]|  | [.,?!]", item["context"]), item["context"]
        assert not words(item["context"]) & wrong(item)
        content.add(frozenset(words(item["context"]) | {right(item)}) - words(FUNCTION_WORDS))
    assert len(content) == len({item["id"] for item in items}) == 1500
    assert {item["template"] for item in items} == set(task.frames)
    assert min(Counter(item["template"] for item in items).values()) >= 8
    places = Counter(item["answer"] for item in items)
    assert all(0.2 < places[place] / 1500 < 0.3 for place in range(4))


def test_a_prefix_covers_the_templates_and_is_a_shorter_draw(
    task: cloze.Cloze, items: list[dict]
) -> None:
    assert len({item["template"] for item in items[: len(task.frames)]}) == len(task.frames)
    assert list(islice(task.generate(0), 30)) == items[:30]


def test_fields_choose_between_topics(task: cloze.Cloze, items: list[dict]) -> None:
    checked = 0
    for item in items:
        frame = task.frames[item["template"]]
        if frame.kind == "fields":
            assert right(item) in task.field_words[frame.family]
            assert not wrong(item) & set(task.field_words[frame.family])
            (domain,) = (fields for fields in task.domains if frame.family in fields)
            assert wrong(item) <= {word for field in domain for word in task.field_words[field]}
            checked += 1
    assert checked > 400


def test_pairs_ask_for_the_partner(task: cloze.Cloze, items: list[dict]) -> None:
    partners = {pair for row in task.partners.values() for pair in row}
    seconds = {second for _, second in partners}
    checked = 0
    for item in items:
        if item["template"].startswith("pairs-"):
            assert any((said, right(item)) in partners for said in words(item["context"]))
            assert wrong(item) <= seconds
            checked += 1
    assert checked > 100


def test_mention_asks_for_a_word_that_was_said(items: list[dict]) -> None:
    lexicon = load_lexicon()
    checked = 0
    for item in items:
        if item["template"].startswith("mention-"):
            said = lexicon.content(item["context"])
            assert lexicon.content(right(item)) <= said, item
            assert not lexicon.content(" ".join(wrong(item))) & said, item
            checked += 1
    assert checked > 200


def test_words_run_out_with_an_error() -> None:
    fields = {"sea": "The {waves,winds} broke the [ship]", "law": "He saw the [judge,jury,court]"}
    source = {
        "domains": {"all": "sea law hall farm"},
        "fields": {field: {"01": text} for field, text in fields.items()},
        "pairs": {"words": {}, "frames": {}},
        "mention": {},
    }
    source["fields"]["hall"] = {"01": "A {long,short} [dance,song]"}
    source["fields"]["farm"] = {"01": "A {plough,cow} in the [field,barn,yard]"}
    with pytest.raises(AtlasError, match="for 15 items only"):
        list(cloze.Cloze(source, parse_lexicon({})).generate(0))
    source["domains"] = {"one": "sea law", "two": "hall farm"}
    with pytest.raises(AtlasError, match="law-01: 1 wrong words, must be 3"):
        list(cloze.Cloze(source, parse_lexicon({})).generate(0))


def test_a_frame_must_end_in_its_word() -> None:
    source = read_yaml("cloze.yaml") | {"fields": {"sea": {"01": "The [ship] sank"}}}
    with pytest.raises(AtlasError, match="must end in the missing word"):
        cloze.Cloze(source)


def test_the_committed_files_are_what_the_command_writes(tmp_path: Path) -> None:
    cloze.main(["--out", str(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cloze.jsonl", "cloze.yaml"]
    for name in names:
        assert (TASKS / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert len((TASKS / "cloze.jsonl").read_text(encoding="utf-8").splitlines()) >= 1000


def test_the_task_sets_a_space_between_context_and_word(tmp_path: Path) -> None:
    cloze.write(tmp_path, items=3, seed=0)
    description = yaml.safe_load((tmp_path / "cloze.yaml").read_text(encoding="utf-8"))
    item = json.loads((tmp_path / "cloze.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert description["target_delimiter"] == " "
    assert not item["context"].endswith(" ")
    assert {description[f"doc_to_{part}"] for part in ("text", "choice", "target")} <= set(item)


def test_the_written_form_is_of_the_same_items(items: list[dict]) -> None:
    """Right is what begins with the missing word, whatever stands around it."""
    chosen, written = (
        yaml.safe_load((TASKS / name).read_text(encoding="utf-8"))
        for name in ("cloze.yaml", "cloze_written.yaml")
    )
    for key in ("dataset_path", "dataset_kwargs", "test_split", "doc_to_text"):
        assert written[key] == chosen[key]
    pattern = written["filter_list"][0]["filter"][0]["regex_pattern"]
    for item in items[:100]:
        reference = Template(written["doc_to_target"]).render(**item)
        assert reference == right(item)
        for text in (" {}", "{}, and", ' "{}" he', " {} of the"):
            assert re.findall(pattern, text.format(reference)) == [reference]
