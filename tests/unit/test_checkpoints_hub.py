"""Hub ids: what is fetched, what is found in the cache, and what is said when neither works."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from fluxlab.checkpoints import (
    CheckpointError,
    find,
    load_autoencoder,
    load_transformer,
    save_autoencoder,
    save_transformer,
)
from fluxlab.checkpoints.hub import is_hub_id
from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams

PARAMS = FluxParams(8, 8, 8, 8, 64, 4.0, 2, 1, 1, (4, 14, 14), 10000, True, False)
SIZES = AutoEncoderParams(32, 3, 32, 3, (1,), 1, 4, 0.3611, 0.1159)
DEV = [
    ".gitattributes",
    "README.md",
    "ae.safetensors",
    "dev_grid.jpg",
    "flux1-dev.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


class Hub:
    """`snapshot_download` of one repository with these files; remembers what was asked of it."""

    def __init__(self, root: Path, files: dict[str, bytes]):
        self.root, self.files, self.fetched, self.revisions = root, files, set(), []

    def __call__(self, repo, *, revision=None, allow_patterns):
        self.revisions.append(revision)
        self.root.mkdir(exist_ok=True)
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            self.fetched.add(name)
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(self.files[name])
        return str(self.root)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(files):
        fake = Hub(tmp_path / "snapshot", dict.fromkeys(files, b"") if isinstance(files, list) else files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*args, **kwargs)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("black-forest-labs/FLUX.1-dev", True),
        ("owner/name@refs/pr/1", True),
        ("owner/name/flux1-dev.safetensors", True),
        ("name", False),
        ("./a/b", False),
        ("/a/b", False),
        ("~/models", False),
        ("../a", False),
        ("a/b/c", False),
        ("models/flux.safetensors", False),
        ("models/", False),
    ],
)
def test_what_looks_like_a_hub_id(text, answer):
    assert is_hub_id(text) is answer


def test_one_network_fetches_its_folder_only(hub):
    fake = hub(DEV)
    complaint(load_transformer, "black-forest-labs/FLUX.1-dev")  # the files are empty
    assert fake.fetched == {n for n in DEV if n.startswith("transformer/") and "fp16" not in n and ".bin" not in n}
    fake = hub(DEV)
    complaint(load_transformer, "black-forest-labs/FLUX.1-dev", variant="fp16")
    assert fake.fetched == {"transformer/config.json", "transformer/diffusion_pytorch_model.fp16.safetensors"}
    fake = hub(DEV)
    complaint(load_autoencoder, "black-forest-labs/FLUX.1-dev")
    assert fake.fetched == {n for n in DEV if n.startswith("vae/")}


def test_a_pipeline_fetches_neither_originals_nor_pictures(hub):
    fake = hub(DEV)
    assert find("black-forest-labs/FLUX.1-dev").kind == "pipeline"
    unused = ("fp16", ".bin", "README", ".jpg", ".git", "ae.saf", "flux1")
    assert fake.fetched == {name for name in DEV if not any(word in name for word in unused)}


def test_repositories_of_original_files(hub, tmp_path):
    save_transformer(Flux(PARAMS), tmp_path / "repo" / "flux1-small.safetensors")
    save_autoencoder(AutoEncoder(SIZES), tmp_path / "repo" / "ae.safetensors")
    fake = hub({**contents(tmp_path / "repo"), "other.safetensors": b""})
    assert load_transformer("owner/name").params == PARAMS
    assert fake.fetched == {"flux1-small.safetensors"}
    assert load_autoencoder("owner/name@v1").params == SIZES
    assert fake.revisions[-1] == "v1"
    assert find("owner/name").kind == "originals"
    assert load_transformer("owner/name/flux1-small.safetensors").params == PARAMS


def test_repositories_of_one_network(hub, tmp_path):
    save_transformer(Flux(PARAMS), tmp_path / "repo", layout="diffusers", max_shard_size=100_000)
    hub(contents(tmp_path / "repo"))
    assert load_transformer("owner/name").params == PARAMS


def test_the_cache_is_used_offline(tmp_path, monkeypatch):
    """The library's own cache layout: links from a snapshot to blobs, an index beside linked shards."""
    commit = "0" * 40
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    save_transformer(Flux(PARAMS), snapshot / "transformer", layout="diffusers", max_shard_size=100_000)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted((snapshot / "transformer").iterdir())):
        file.rename(repository / "blobs" / str(i))
        file.symlink_to(f"../../../blobs/{i}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_transformer("owner/name").params == PARAMS
    assert "no autoencoder checkpoint" in complaint(load_autoencoder, "owner/name")
    message = complaint(load_transformer, "owner/other")
    assert "owner/other: no such folder here" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "local folder" in message


def test_nobody_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for error in (
        errors.LocalEntryNotFoundError("An error happened while trying to locate the files\nand so on\nand so on"),
        ConnectionError("Connection refused"),
        OSError(28, "No space left on device"),
        errors.IncompleteSnapshotError.__new__(errors.IncompleteSnapshotError),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
        message = complaint(load_transformer, "owner/name")
        assert "owner/name" in message
        assert "could not be fetched" in message
        assert "hf auth login" in message
        assert "local folder" in message


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def answer(kind, status):
    """An error as the library raises it for an answer of the hub; its http library differs between versions."""
    error = kind.__new__(kind, "the hub's words")
    error.response = type("Response", (), {"status_code": status, "headers": {}})()
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, ["gated", "the page of owner/name", "hf auth login", "local folder"]),
        (errors.RepositoryNotFoundError, ["no such folder here", "no such repository", "hf auth login"]),
        (errors.RevisionNotFoundError, ["no revision 'v9'"]),
        (errors.HfHubHTTPError, ["could not be fetched", "HfHubHTTPError"]),
    ],
)
def test_the_hub_says_no(monkeypatch, kind, words):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(answer(kind, 403)))
    for call in (load_transformer, load_autoencoder, find):
        message = complaint(call, "owner/name@v9")
        assert "owner/name" in message
        assert all(word in message for word in words)


def test_a_repository_of_something_else(hub):
    hub({"config.json": json.dumps({"_class_name": "UNet2DConditionModel"}).encode()})
    assert "'UNet2DConditionModel'" in complaint(load_transformer, "owner/name")


def test_a_local_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(AssertionError("asked the hub")))
    save_transformer(Flux(PARAMS), tmp_path / "owner" / "name" / "transformer", layout="diffusers")
    assert load_transformer("owner/name").params == PARAMS
    shutil.rmtree(tmp_path / "owner")
    with torch.no_grad():
        assert "no such path" in complaint(load_transformer, Path("owner/name"))
