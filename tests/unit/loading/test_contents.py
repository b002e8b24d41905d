"""What a folder holds: whatever is read when it is loaded is in its digest, and what is not is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.contents import patterns, select
from sparsity_atlas.rules.inputs import locate, model_content
from tiny_lm import save_model, tiny_tokenizer

TOKENIZER = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "tokenizer.model.v3", "qwen.tiktoken", "vocab.txt"),
    *("vocab.bpe", "merges.txt", "source.spm", "bpe.codes", "dict.vocab", "tekken.json", "words"),
]
OTHERS = ["generation_config.json", "chat_template.jinja", "processor_config.json"]
TEMPLATE = "additional_chat_templates/tool_use.jinja"
CODE = ["modeling.py", "parts/attention.py", "parts/deep/er.py", "custom_generate/generate.py"]
NOT_READ = [
    *("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".cache/a.json", "plot.png"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"),
    *("checkpoint-5/config.json", "runs/a/events.out.tfevents.1", "__pycache__/modeling.pyc"),
    *(
        "pytorch_model.bin",
        "model-q4.gguf",
        "onnx/model.onnx",
        "rust_model.ot",
        "consolidated.00.pth",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m")


def edited(folder: Path, name: str, trust: bool) -> tuple[str, str, str]:
    """Digests of a folder without a file, with it, and with another content of it."""
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    checkpoint = Checkpoint(folder, trust_remote_code=trust)
    made = [parent for parent in path.parents if not parent.exists()]
    digests = [checkpoint.digest()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in (b"1", b"2"):
        path.write_bytes(content)
        digests.append(checkpoint.digest())
    path.unlink()
    for parent in made:
        parent.rmdir()
    if before is not None:
        path.write_bytes(before)
    return tuple(digests)


@pytest.mark.parametrize("name", [*TOKENIZER, *OTHERS, TEMPLATE, "config.json", "generation.yaml"])
@pytest.mark.parametrize("trust", [False, True])
def test_what_is_read_is_in_the_digest(name: str, trust: bool, model: Path) -> None:
    assert len(set(edited(model, name, trust))) == 3


@pytest.mark.parametrize("name", [*CODE, "parts/words.txt", "assets/vocab.file"])
def test_code_and_what_it_may_read(name: str, model: Path) -> None:
    """Where it is trusted; else none of it is run."""
    assert len(set(edited(model, name, True))) == 3
    assert len(set(edited(model, name, False))) == 1


@pytest.mark.parametrize("name", ["table.npz", "parts/extra.pt", "words.csv", "checkpoint-9/a.md"])
def test_what_code_names_it_may_read(name: str, model: Path) -> None:
    code = model / "modeling_named.py"
    code.write_text(f"FILE = 'data/{Path(name).name}'\nWEIGHTS = 'pytorch_model.bin'\n")
    found = [edited(model, one, True) for one in (name, "pytorch_model.bin")]
    untrusted = edited(model, name, False)
    code.unlink()
    assert [len(set(digests)) for digests in (*found, untrusted)] == [3, 1, 1]


@pytest.mark.parametrize("name", NOT_READ)
@pytest.mark.parametrize("trust", [False, True])
def test_what_is_not_read_is_not(name: str, trust: bool, model: Path) -> None:
    assert len(set(edited(model, name, trust))) == 1


def test_links_to_folders_are_followed_once(model: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/attention.py").write_text("1")
    (model / "parts").symlink_to(tmp_path / "parts")
    (model / "again").symlink_to(model)
    checkpoint = Checkpoint(model, trust_remote_code=True)
    before = checkpoint.digest()
    (tmp_path / "parts/attention.py").write_text("2")
    after = checkpoint.digest()
    (model / "parts").unlink()
    (model / "again").unlink()
    assert before != after


@pytest.mark.parametrize("trust", [False, True])
def test_what_is_fetched_is_what_is_read(trust: bool) -> None:
    names = ["config.json", *TOKENIZER, *OTHERS, TEMPLATE, *CODE, *NOT_READ, "other/config.json"]
    fetched = {name for pair in patterns(code=trust) for name in select(names, *pair)}
    wanted = {"config.json", *TOKENIZER, *OTHERS, TEMPLATE}
    assert fetched == (wanted | {*CODE, "other/config.json"} if trust else wanted)


# What is refused


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(AtlasError, match=rf"{name}: it is a git-lfs pointer.*`git lfs pull`"):
        Checkpoint(folder).config()


def test_adapters(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(
        AtlasError, match=r"adapter beside the model; move .* name that as `adapter`"
    ):
        Checkpoint(folder).config()
    (folder / "config.json").unlink()
    with pytest.raises(AtlasError, match="it holds only an adapter of a/b; name that model"):
        Checkpoint(folder).config()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "torch.float16"}, r"dtype: found 'torch\.float16', expected 'float16'"),
        ({"torch_dtype": "torch.bfloat16"}, r"torch_dtype: found .*, expected 'bfloat16'"),
        ({"transformers_weights": "a.safetensors"}, "transformers_weights: not supported"),
        ({"text_config": {"dtype": "torch.half"}}, r"text_config\.dtype: found 'torch\.half'"),
    ],
)
def test_a_type_with_its_module(change: dict, says: str, model: Path) -> None:
    path = model / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **change}))
    with pytest.raises(AtlasError, match=rf"config\.json: {says}"):
        Checkpoint(model).config()
    path.write_text(before)


@pytest.mark.parametrize("pickles", [False, True])
def test_the_weights_are_those_that_transformers_takes(pickles: bool, tmp_path: Path) -> None:
    """One file before an index: else a file is loaded that the digest does not know."""
    single = "pytorch_model.bin" if pickles else "model.safetensors"
    for name in (single, "a.safetensors", "b.bin"):
        (tmp_path / name).write_bytes(b"1")
    index = {"weight_map": {"a": "b.bin" if pickles else "a.safetensors"}}
    (tmp_path / f"{single}.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path, allow_pickle=True)
    assert [path.name for path in checkpoint.weight_files()] == [single]
    (tmp_path / single).unlink()
    assert [path.name for path in checkpoint.weight_files()] == list(index["weight_map"].values())
    (tmp_path / f"{single}.index.json").unlink()
    with pytest.raises(AtlasError, match=r"expected weights in model\.safetensors, .* only a\."):
        checkpoint.weight_files()


# A tokenizer's own folder


def test_a_tokenizer_of_another_folder(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "words"
    tiny_tokenizer(bos=True).save_pretrained(other)
    alone, with_other = Checkpoint(model), Checkpoint(model, tokenizer=other)
    assert alone.digest() != with_other.digest()
    before = with_other.digest()
    (other / "README.md").write_text("nothing")
    assert with_other.digest() == before
    (other / "tokenizer.json").write_text("{}")
    assert with_other.digest() != before
    with pytest.raises(AtlasError, match=r"models: tokenizer: .*nowhere: no such folder"):
        Checkpoint(model, tokenizer=tmp_path / "nowhere").config()


@pytest.mark.parametrize("source", ["path", "hub"])
def test_a_tokenizer_in_the_configuration(
    source: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found beside the workflow, and an edit of it is seen before anything runs."""
    workflow, work = tmp_path / "workflow", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    tiny_tokenizer().save_pretrained(workflow / "words")
    entry = {source: str(model) if source == "path" else "a/b", "tokenizer": "words"}
    data = {
        "models": {"mine": entry},
        "criteria": {"topp": None},
        "texts": {"prose": {"file": "prose.jsonl"}},
        "tasks": {"pairs": {}},
        "run": [{"models": ["mine"]}],
    }
    config = parse(locate(data, workflow))
    before = model_content(config, "mine")
    assert len(before) == 64
    (workflow / "words/tokenizer.json").write_text("{}")
    # What a process has seen of a model it does not look at again.
    from sparsity_atlas.rules import inputs

    inputs._model_digest.cache_clear()
    assert model_content(config, "mine") not in ("", before)
