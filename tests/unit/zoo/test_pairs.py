"""Minimal pairs: the notation of the frames, and what the drawn items promise."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import yaml

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo import pairs
from sparsity_atlas.zoo.lexicon import (
    apply_switch,
    fill,
    load_lexicon,
    parse_lexicon,
    tidy,
)

TASKS = Path(__file__).parents[3] / "workflow/resources/tasks"
PHENOMENA = pairs.load_phenomena()
# A reader's notion of a function word, made without the lexicon.
FUNCTION_WORDS = """
    a an the this that these those i you he she it we they me him her us them my his your their
    himself herself itself themselves of to in on at for from by with near upon than as so too
    very not no nor and or but is are was were be been has have had do does did will would shall
    should can could may might must who whom which what why where when if whether some any many
    much few little all each every both there here
"""

SMALL = parse_lexicon(
    {
        "beast": {"forms": "sg pl", "words": "cat cats, dog dogs, ox oxen"},
        "act": {"forms": "base s", "words": "run runs, sit sits"},
        "lean": {"forms": "base prep wrong", "closed": "prep wrong", "words": "rely on of"},
    }
)


def good(item: dict) -> str:
    return item["choices"][item["answer"]]


def draw(phenomenon: str, items: int, seed: int = 0) -> list[dict]:
    return list(islice(pairs.generate(phenomenon, PHENOMENA[phenomenon]["frames"], seed), items))


def test_contrast_follows_the_switch() -> None:
    frame = "<This/These> {beast} [was/were] here."
    assert pairs.contrast(frame, 0) == ("This {beast} was here.", "This {beast} were here.")
    assert pairs.contrast(frame, 1) == ("These {beast} were here.", "These {beast} was here.")


def test_fixed_contrast_ignores_the_switch() -> None:
    assert pairs.contrast("I [ran|run] <to/>.", 1) == ("I ran .", "I run .")


@pytest.mark.parametrize("frame", ["No contrast.", "[a|b] and [c|d]."])
def test_a_frame_has_one_contrast(frame: str) -> None:
    with pytest.raises(AtlasError, match="must be 1"):
        pairs.contrast(frame, 0)


def test_fill_gives_each_form_that_a_slot_asks_for() -> None:
    rng = random.Random(0)
    for _ in range(50):
        filled = fill(["{beast}/{beast.sg}/{act.s}/{act}"], SMALL, 1, rng)
        assert filled is not None
        here, singular, third, base = filled[0][0].lower().split("/")
        row = next(row for row in SMALL.classes["beast"] if row["sg"] == singular)
        assert here == row["pl"]
        assert third == base + "s"


def test_any_number_is_the_same_in_both_sentences() -> None:
    rng = random.Random(1)
    seen = set()
    for _ in range(50):
        filled = fill(["One {beast.any} here.", "Two {beast.any} there."], SMALL, 0, rng)
        assert filled is not None
        words = [text.split()[1] for text in filled[0]]
        assert words[0] == words[1]
        seen.add(words[0] in {"cats", "dogs", "oxen"})
    assert seen == {True, False}


def test_two_slots_never_hold_the_same_word() -> None:
    rng = random.Random(2)
    texts = [fill(["{beast} {beast2}"], SMALL, 0, rng) for _ in range(100)]
    kept = [filled[0][0].lower().split() for filled in texts if filled is not None]
    assert kept
    assert len(kept) < 100
    assert all(first != second for first, second in kept)


def test_alternatives_and_articles() -> None:
    assert tidy("a(n) apple , a(n) king and a(n) useful ox  near a(n) hour .") == (
        "An apple, a king and a useful ox near an hour."
    )
    assert apply_switch("<a/b> c <d/>", 0) == "a c d"
    assert apply_switch("<a/b> c <d/>", 1) == "b c "


def test_content_undoes_inflection_and_leaves_function_words_out() -> None:
    assert SMALL.content("The oxen rely on a dog; of it runs.") == {"ox", "rely", "dog", "run"}
    assert SMALL.content("The sea ran.", also=["sea"]) == {"sea"}


def test_bad_slots_and_rows_are_one_line_errors() -> None:
    rng = random.Random(0)
    with pytest.raises(AtlasError, match=r"\{bird\}: no such class"):
        fill(["{bird}"], SMALL, 0, rng)
    with pytest.raises(AtlasError, match=r"\{beast.past\} must be one of"):
        fill(["{beast.past}"], SMALL, 0, rng)
    with pytest.raises(AtlasError, match="'cat' must give the forms"):
        parse_lexicon({"beast": {"forms": "sg pl", "words": "cat, dog dogs"}})


def test_running_out_of_words_is_an_error() -> None:
    frames = {"01": "The {beast} [runs/run]."}
    items = list(islice(pairs.generate("small", frames, 0, SMALL), 3))
    assert len({good(item).split()[1].rstrip("s") for item in items}) == 3
    with pytest.raises(AtlasError, match="small-01: no new words"):
        list(islice(pairs.generate("small", frames, 0, SMALL), 4))


def test_there_are_enough_phenomena_and_frames() -> None:
    assert len(PHENOMENA) >= 8
    for name, entry in PHENOMENA.items():
        frames = entry["frames"]
        assert len(frames) >= 20, name
        # A frame that another repeats with other word classes is not a frame of its own.
        bare = {re.sub(r"\{[^{}]*\}", "_", frame) for frame in frames.values()}
        assert len(bare) == len(frames), name


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_items_of_a_phenomenon(phenomenon: str) -> None:
    items = draw(phenomenon, 600)
    templates = Counter(item["template"] for item in items)
    assert len(templates) == len(PHENOMENA[phenomenon]["frames"])
    assert max(templates.values()) - min(templates.values()) <= 1
    assert len({item["id"] for item in items}) == 600
    assert len({tuple(sorted(item["choices"])) for item in items}) == 600
    assert 0.4 < sum(item["answer"] for item in items) / 600 < 0.6

    stop = set(FUNCTION_WORDS.split())
    content = set()
    for item in items:
        first, second = item["choices"]
        assert first != second
        assert abs(len(first.split()) - len(second.split())) <= 1
        for text in item["choices"]:
            assert not re.search(r"[{}\[\]<>|/_()]|  | [.,?!]", text), text
            assert re.fullmatch(r"[A-Z].*[.?!]", text), text
        words = [frozenset(re.findall(r"[a-z]+", text.lower())) - stop for text in item["choices"]]
        both = words[0] | words[1]
        assert content.isdisjoint({*words, both}), item
        content |= {*words, both}


def test_a_prefix_covers_the_templates_and_is_a_shorter_draw() -> None:
    items = draw("preposition", 60)
    frames = len(PHENOMENA["preposition"]["frames"])
    assert len({item["template"] for item in items[:frames]}) == frames
    assert draw("preposition", 17) == items[:17]
    assert draw("preposition", 17, seed=1) != items[:17]


def test_the_good_reflexive_has_the_gender_of_its_subject() -> None:
    classes = load_lexicon().classes
    male = {row["sg"] for row in classes["male"]} | {row["name"] for row in classes["boyname"]}
    female = {row["sg"] for row in classes["female"]} | {row["name"] for row in classes["girlname"]}
    # The subject of the reflexive is the first of the two people, or the second.
    subject = {"01": 0, "10": 0, "19": 0, "20": 0, "04": 1, "06": 1, "08": 1, "15": 1, "21": 1}
    checked = Counter()
    for item in draw("anaphor_gender", 300):
        people = [word for word in re.findall(r"\w+", good(item)) if word in male | female]
        position = subject.get(item["template"].rpartition("-")[2])
        if position is not None:
            reflexive = "himself" if people[position] in male else "herself"
            assert reflexive in good(item), good(item)
            checked[reflexive] += 1
    assert min(checked.values()) > 20


def test_the_good_verb_has_the_number_of_its_subject() -> None:
    rows = [row for c in ("person", "item", "animal", "place") for row in load_lexicon().classes[c]]
    plural = {row["pl"] for row in rows}
    checked = Counter()
    for item in draw("agreement_distant", 600):
        words = re.findall(r"\w+", good(item).lower())
        nouns = [word for word in words if word in plural | {row["sg"] for row in rows}]
        for verb in {"was", "were", "has", "have", "does", "do"} & set(words[3:]):
            assert (verb in {"were", "have", "do"}) == (nouns[0] in plural), good(item)
            checked[verb] += 1
    assert len(checked) == 6
    assert min(checked.values()) > 10


def test_the_committed_files_are_what_the_command_writes(tmp_path: Path) -> None:
    pairs.main(["--out", str(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"{name}.jsonl" for name in PHENOMENA} < names
    assert "pairs.yaml" in names
    for name in names:
        assert (TASKS / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_command_draws_fewer_with_another_seed(tmp_path: Path) -> None:
    pairs.main(["--out", str(tmp_path / "new"), "--items", "5", "--seed", "3"])
    lines = (tmp_path / "new/preposition.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == draw("preposition", 5, seed=3)


def test_lm_eval_scores_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pairs.write(tmp_path, items=4, seed=0)
    monkeypatch.chdir(tmp_path)
    known = {
        good(json.loads(line))
        for path in tmp_path.glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    }

    class Knows(LM):
        """Prefers the good sentence, but in one phenomenon the bad one."""

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            assert all(request.args[0] == "" for request in requests)
            return [
                (-1.0 if (r.args[1] in known) == (r.task_name != "atlas_preposition") else -2.0, 0)
                for r in requests
            ]

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list) -> list[str]:
            raise NotImplementedError

    results = simple_evaluate(
        model=Knows(),
        tasks=["atlas_pairs"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    expected = {f"atlas_{name}": float(name != "preposition") for name in PHENOMENA}
    found = {name: result["acc,none"] for name, result in results.items()}
    assert {name: found[name] for name in expected} == expected
    assert found["atlas_pairs"] == pytest.approx(1 - 1 / len(PHENOMENA))


def test_every_task_file_names_data_beside_it() -> None:
    for path in TASKS.glob("*.yaml"):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "group" in task:
            assert set(task["task"]) == {f"atlas_{name}" for name in PHENOMENA}
            continue
        assert task["task"] == f"atlas_{path.stem}"
        if path.stem != "prose":
            assert (path.parent / task["dataset_kwargs"]["data_files"]["test"]).is_file()
