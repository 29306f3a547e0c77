"""Identities saved and loaded, through the nodes."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from host import stock, tiny_clip
from host.identities import LORA, apply, velocity
from host.inprocess import Host

TinyModel = Callable[[str], Any]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Host) -> Path:  # noqa: ARG001
    """Empty folders for identities, embeddings and LoRAs."""
    import folder_paths

    for kind in ("identities", "embeddings", "loras"):
        _, endings = folder_paths.folder_names_and_paths[kind]
        entry = ([str(tmp_path / kind)], endings)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, entry)
        monkeypatch.delitem(folder_paths.filename_list_cache, kind, raising=False)
        (tmp_path / kind).mkdir()
    return tmp_path


def equal(one: Any, other: Any) -> bool:
    """Whether two identities are the same to the last bit."""
    tensors = (one.vectors, other.vectors), (one.lora, other.lora)
    return replace(one, vectors={}, lora={}) == replace(other, vectors={}, lora={}) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in tensors
    )


def save(identity: Any, **inputs: Any) -> list[Path]:
    settings = dict(file_name="", embedding=False, lora=False, overwrite=False)
    (files,) = stock.call("PinpointSaveIdentity", identity=identity, **{**settings, **inputs})
    return [Path(line) for line in files.splitlines()]


def load(file_name: str) -> Any:
    return stock.call("PinpointLoadIdentity", file_name=file_name)[0]


def test_an_identity_comes_back_from_its_file(folders: Path, ann: Any) -> None:
    (path,) = save(ann)
    assert path == folders / "identities" / "ann.safetensors"
    loaded, about = stock.call("PinpointLoadIdentity", file_name="ann.safetensors")
    assert equal(loaded, ann)
    assert "<ann>, a person, for SD3" in about
    assert "prompt: a photo of <ann> person" in about
    assert not any(t.is_inference() for t in (*loaded.vectors.values(), *loaded.lora.values()))
    (nested,) = save(ann, file_name="people/ann 2.safetensors")
    assert nested == folders / "identities" / "people" / "ann 2.safetensors"
    assert equal(load(str(Path("people") / "ann 2.safetensors")), ann)


def test_parts_work_in_stock_nodes(folders: Path, tiny_model: TinyModel, ann: Any) -> None:
    _, embedding, lora = save(ann, embedding=True, lora=True)
    assert load_file(embedding).keys() == {"clip_l"}
    model, text = tiny_model("sd3_bare"), "a red hat"
    (by_stock,) = stock.call(
        "LoraLoaderModelOnly", model=model, lora_name="ann.safetensors", strength_model=1.0
    )
    clip = tiny_clip.clip()
    assert torch.equal(velocity(by_stock, clip, text), velocity(*apply(model, ann), text))
    assert lora.parent == folders / "loras"
    tokenizer = clip.tokenizer.clip_l
    before = tokenizer.embedding_directory
    tokenizer.embedding_directory = [str(embedding.parent)]
    try:
        by_embedding = velocity(by_stock, clip, "a embedding:ann in a hat")
    finally:
        tokenizer.embedding_directory = before
    assert torch.equal(by_embedding, velocity(*apply(model, ann), "a <ann> in a hat"))


def test_parts_that_are_not_there_are_refused(folders: Path, ann: Any) -> None:
    with pytest.raises(ValueError, match="embedding is on, but the identity has no learned word"):
        save(replace(ann, vectors={}), embedding=True)
    with pytest.raises(ValueError, match="lora is on, but the identity changes no weights"):
        save(replace(ann, lora={}), lora=True)
    assert not [path for path in folders.rglob("*") if path.is_file()]


def test_files_are_replaced_only_on_request(folders: Path, ann: Any) -> None:
    save(ann, lora=True)
    (folders / "identities" / "ann.safetensors").unlink()
    other = replace(ann, class_word="dog")
    with pytest.raises(ValueError, match=r"file_name is ann, and .*loras.* exists: choose another"):
        save(other, lora=True)
    assert not (folders / "identities" / "ann.safetensors").exists()
    save(other, lora=True, overwrite=True)
    assert load("ann.safetensors").class_word == "dog"


@pytest.mark.parametrize(
    "name", ["../ann", "people/../../ann", "/tmp/ann", "C:\\ann", ".ann", "a\0nn", "people//ann"]
)
def test_names_that_lead_elsewhere_are_refused(folders: Path, ann: Any, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"file_name is '.*': write a name such as ann or people/ann"
    ):
        save(ann, file_name=name)
    assert not [path for path in folders.rglob("*") if path.is_file()]


def test_names_are_refused_when_a_prompt_is_queued(folders: Path, host: Host) -> None:  # noqa: ARG001
    valid = host.nodes["PinpointSaveIdentity"].validate_inputs  # type: ignore[attr-defined]
    assert [valid(name) for name in ("", "people/ann", "ann.safetensors", None)] == [True] * 4
    assert "write a name such as ann" in valid("../ann")
    assert valid("people/" + "a" * 300) == (
        "file_name has a part of 300 bytes: write one of at most 200"
    )


def test_files_can_be_read_by_whom_folders_let(folders: Path, ann: Any) -> None:
    usual = folders / "usual"
    usual.touch()
    save(ann)
    saved = folders / "identities" / "ann.safetensors"
    assert saved.stat().st_mode == usual.stat().st_mode


def test_links_that_lead_elsewhere_are_refused(folders: Path, ann: Any) -> None:
    (folders / "identities" / "out").symlink_to(folders / "loras", target_is_directory=True)
    with pytest.raises(ValueError, match="write a name such as ann"):
        save(ann, file_name="out/ann")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond two thousand bytes; pytest's own log must not need to meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_half_written(folders: Path, ann: Any) -> None:
    (path,) = save(ann)
    before = path.read_bytes()
    refused = pytest.raises(ValueError, match=r"cannot be written .* free space on the disk")
    with refused, full_disk():
        save(replace(ann, class_word="dog"), overwrite=True)
    assert path.read_bytes() == before
    assert [path.name for path in (folders / "identities").iterdir()] == ["ann.safetensors"]


def cut(content: bytes) -> bytes:
    return content[:-100]


def huge_header(content: bytes) -> bytes:
    return (2**62).to_bytes(8, "little") + content[8:]


def pickled(_content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"vectors.l": torch.ones(1, 64)}, buffer)
    return buffer.getvalue()


def another(
    metadata: dict[str, str | None] | None = None, **changes: Tensor | None
) -> Callable[[bytes], bytes]:
    """The file with other tensors and metadata in it; None leaves one out."""

    def damage(content: bytes) -> bytes:
        tensors: dict[str, Tensor | None] = {**safetensors.torch.load(content), **changes}
        size = int.from_bytes(content[:8], "little")
        told = {**json.loads(content[8 : 8 + size])["__metadata__"], **(metadata or {})}
        return safetensors.torch.save(
            {key: tensor for key, tensor in tensors.items() if tensor is not None},
            {key: text for key, text in told.items() if text is not None},
        )

    return damage


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (cut, "cannot be read .* save or download it again"),
    "empty": (lambda _: b"", "cannot be read"),
    "huge header": (huge_header, "cannot be read"),
    "pickle": (pickled, "cannot be read"),
    "stranger": (another({"format": None}), "was not written by Save Identity: load embeddings"),
    "newer": (another({"format_version": "2"}), "has format 2, this Pinpoint knows 1: update"),
    "nameless": (another({"name": None}), "does not say its name, class word and model family"),
    "bad name": (another({"name": "../ann"}), "name in ann.safetensors is '../ann': write a name"),
    "bad recipe": (another({"recipe": "[1]"}), "is damaged: its recipe cannot be read"),
    "nan": (another(**{"vectors.l": torch.tensor([[torch.nan]])}), "vectors.l holds values that"),
    "integers": (another(**{"vectors.l": torch.ones(1, 8).int()}), "vectors.l holds values that"),
    "flat": (another(**{"vectors.l": torch.ones(8)}), "it holds vectors.l, which is not a part"),
    "more": (another(**{"model.weight": torch.ones(1)}), "it holds model.weight, which is not a"),
    "half a change": (
        another(**{f"{LORA}.lora_up.weight": None}),
        f"the change of {LORA} is not whole",
    ),
    "flat change": (
        another(**{f"{LORA}.lora_down.weight": torch.tensor(1.0)}),
        f"the change of {LORA} is not whole",
    ),
    "two scales": (another(**{f"{LORA}.alpha": torch.ones(2)}), f"change of {LORA} is not whole"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_refused_in_a_sentence(
    folders: Path, ann: Any, damage: Callable[[bytes], bytes], said: str
) -> None:
    (path,) = save(ann)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=said):
        load("ann.safetensors")
    assert folders in path.parents


def test_a_file_that_is_gone_is_refused(folders: Path, pack: ModuleType, ann: Any) -> None:
    (path,) = save(ann)
    path.unlink()
    with pytest.raises(ValueError, match=r"file_name is ann\.safetensors: choose one of "):
        load("ann.safetensors")
    with pytest.raises(ValueError, match="which is not in models/identities: choose another"):
        pack.nodes.host.identity_files.load("ann.safetensors")
    assert not list((folders / "identities").iterdir())


def test_another_file_of_the_same_name_is_loaded_anew(
    folders: Path,  # noqa: ARG001
    host: Host,
    ann: Any,
) -> None:
    node = host.nodes["PinpointLoadIdentity"]
    save(ann)
    first = node.fingerprint_inputs("ann.safetensors")  # type: ignore[attr-defined]
    assert node.fingerprint_inputs("ann.safetensors") == first  # type: ignore[attr-defined]
    save(replace(ann, class_word="a small dog"), overwrite=True)
    assert node.fingerprint_inputs("ann.safetensors") != first  # type: ignore[attr-defined]


def test_an_interrupted_identity_is_a_file_of_its_own(
    folders: Path, pack: ModuleType, ann: Any
) -> None:
    path = pack.nodes.host.identity_files.save_partial(ann)
    assert path == folders / "identities" / "ann.partial.safetensors"
    pack.nodes.host.identity_files.save_partial(replace(ann, class_word="dog"))
    assert load("ann.partial.safetensors").class_word == "dog"
