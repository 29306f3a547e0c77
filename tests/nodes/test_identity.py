"""Identities applied, saved and loaded, through the nodes."""

from __future__ import annotations

import io
import json
import logging
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
from host.edits import patcher_state, picture_latent
from host.foreign import lora_weights
from host.inprocess import Host

TinyModel = Callable[[str], Any]

LORA = "diffusion_model.joint_blocks.0.x_block.attn.qkv"


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


@pytest.fixture
def ann(pack: ModuleType) -> Any:
    """For the tiny SD3 with its CLIP-L, with a word and a change of the model."""
    lora = {key: t for key, t in lora_weights().items() if key.startswith(LORA)}
    lora[f"{LORA}.alpha"] = torch.tensor(4.0)
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    recipe = {"steps": "10", "prompt": "a photo of <ann> person"}
    return pack.nodes.host.identity.Identity("ann", "person", "SD3", {"l": vectors}, lora, recipe)


def apply(model: Any, identity: Any, clip: Any = None, **inputs: Any) -> tuple[Any, Any]:
    settings = {"strength": 1.0, "name": "", **inputs}
    clip = tiny_clip.clip() if clip is None else clip
    return stock.call(
        "PinpointApplyIdentity", model=model, clip=clip, identity=identity, **settings
    )


def velocity(model: Any, clip: Any, text: str) -> Tensor:
    prompt = stock.call("CLIPTextEncode", clip=clip, text=text)[0]
    return stock.velocity(model, prompt, None, 1.0, picture_latent(), 0.6)


def equal(one: Any, other: Any) -> bool:
    """Whether two identities are the same to the last bit."""
    tensors = (one.vectors, other.vectors), (one.lora, other.lora)
    return replace(one, vectors={}, lora={}) == replace(other, vectors={}, lora={}) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in tensors
    )


# Applying


def test_nothing_sticks_and_strength_0_leaves_the_model_as_it_is(
    tiny_model: TinyModel, ann: Any
) -> None:
    model, clip, text = tiny_model("sd3_bare"), tiny_clip.clip(), "a red hat"
    state, before = patcher_state(model), velocity(model, clip, text)
    mask = torch.zeros(1, 8, 8)
    for inputs in ({"strength": 0.0}, {"strength": 0.0, "mask": mask}):
        off = apply(model, ann, **inputs)
        assert torch.equal(velocity(*off, text), before)
    on = velocity(*apply(model, ann), text)
    assert (on - before).abs().mean() > 0.01
    assert torch.equal(velocity(model, clip, text), before)
    assert torch.equal(velocity(*apply(model, ann), text), on)
    assert patcher_state(model) == state


def test_the_change_of_the_model_is_the_stock_loaders(tiny_model: TinyModel, ann: Any) -> None:
    import comfy.sd

    model = tiny_model("sd3_bare")
    expected, _ = comfy.sd.load_lora_for_models(model, None, dict(ann.lora), 0.7, 0)
    found = apply(model, ann, strength=0.7)
    text = "a red hat"
    assert torch.equal(velocity(*found, text), velocity(expected, tiny_clip.clip(), text))


def test_the_word_is_known_by_its_name_or_another(tiny_model: TinyModel, ann: Any) -> None:
    model = tiny_model("sd3_bare")
    named, renamed = apply(model, ann), apply(model, ann, name=" <Bea> ")
    assert torch.equal(velocity(*named, "a <ann>"), velocity(*renamed, "a <bea>"))
    assert not torch.equal(velocity(*named, "a <ann>"), velocity(*named, "a person"))


def test_several_identities_act_together(tiny_model: TinyModel, ann: Any) -> None:
    model = tiny_model("sd3_bare")
    bea = replace(ann, name="bea", vectors={"l": ann.vectors["l"].flip(0)}, lora={})
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    first = apply(model, ann, mask=left)
    both = apply(first[0], bea, first[1], mask=1 - left)
    second = apply(model, bea, mask=1 - left)
    turned = apply(second[0], ann, second[1], mask=left)
    text = "<ann> and <bea> on a beach"
    assert torch.allclose(velocity(*both, text), velocity(*turned, text), atol=1e-5)
    assert torch.equal(velocity(*both, "a hat"), velocity(*first, "a hat"))
    assert not torch.allclose(velocity(*both, text), velocity(first[0], both[1], text), atol=1e-3)


def test_stock_loras_before_and_after_stay(tiny_model: TinyModel, ann: Any) -> None:
    import comfy.sd

    model, text = tiny_model("sd3_bare"), "a red hat"

    def lora(model: Any, clip: Any) -> tuple[Any, Any]:
        return comfy.sd.load_lora_for_models(model, clip, lora_weights(), 0.5, 0.5)

    after = lora(*apply(model, ann))
    before = apply(lora(model, None)[0], ann)
    assert torch.allclose(velocity(*after, text), velocity(*before, text), atol=1e-4)
    assert not torch.allclose(velocity(*after, text), velocity(*apply(model, ann), text), atol=1e-3)
    tokens = after[1].tokenize("a <ann>")["l"][0]
    assert torch.equal(tokens[2][0], ann.vectors["l"][0])


def test_quantised_weights_are_bypassed_and_bypasses_stack(
    pack: ModuleType, tiny_model: TinyModel, ann: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each injection puts back what it found, so that none may be left in the model."""
    from comfy import model_management

    model, text = tiny_model("sd3_bare"), "a red hat"
    plain, clip = velocity(model, tiny_clip.clip(), text), tiny_clip.clip()
    bea = replace(ann, name="bea", vectors={}, lora={k: v * 0.5 for k, v in ann.lora.items()})
    patched = apply(apply(model, ann)[0], bea)
    monkeypatch.setattr(pack.nodes.host.applying, "QuantizedTensor", torch.Tensor)
    bypassed = apply(apply(model, ann)[0], bea)
    assert not bypassed[0].patches
    found = velocity(*bypassed, text)
    torch.testing.assert_close(found, velocity(*patched, text), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, velocity(*apply(model, ann), text), atol=1e-3)
    model_management.unload_all_models()
    assert torch.equal(velocity(model, clip, text), plain)


def test_another_family_is_refused(tiny_model: TinyModel, ann: Any) -> None:
    with pytest.raises(
        ValueError, match=r"identity <ann> was learned with SD3, the model is Flux: l"
    ):
        apply(tiny_model("flux"), ann)


def test_other_text_encoders_are_refused(tiny_model: TinyModel, ann: Any) -> None:
    wide = replace(ann, vectors={"l": torch.ones(1, 768)})
    said = r"with the text encoders {}, the clip has l \(64 wide\): load the text encoders"
    with pytest.raises(ValueError, match=said.format(r"l \(768 wide\)")):
        apply(tiny_model("sd3_bare"), wide)
    other = replace(ann, vectors={"t5xxl": torch.ones(1, 4096)})
    with pytest.raises(ValueError, match=said.format(r"t5xxl \(4096 wide\)")):
        apply(tiny_model("sd3_bare"), other)


def test_weights_that_the_model_has_not_are_refused(tiny_model: TinyModel, ann: Any) -> None:
    model = tiny_model("sd3_bare")
    elsewhere = {key.replace("blocks.0", "blocks.7"): t for key, t in ann.lora.items()}
    smaller = {**ann.lora, f"{LORA}.lora_down.weight": torch.ones(4, 64)}
    for lora in (elsewhere, smaller):
        with pytest.raises(
            ValueError, match="changes 1 weights, of which the model has 0: load the"
        ):
            apply(model, replace(ann, lora=lora))


def test_names_that_are_taken_or_impossible_are_refused(tiny_model: TinyModel, ann: Any) -> None:
    model = tiny_model("sd3_bare")
    first = apply(model, ann)
    with pytest.raises(ValueError, match="identity is called <Ann>, and the clip knows another"):
        apply(first[0], ann, first[1], name="Ann")
    for name in ("two words", "<>", "(ann)", "ann:1.2"):
        with pytest.raises(
            ValueError, match="write a name of letters, digits, - and _, such as ann"
        ):
            apply(model, ann, name=name)


def test_masks_that_cannot_act(
    tiny_model: TinyModel, ann: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, mask = tiny_model("sd3_bare"), torch.ones(1, 8, 8)
    with pytest.raises(ValueError, match="mask holds values that are not finite"):
        apply(model, ann, mask=mask * torch.nan)
    with pytest.raises(ValueError, match="identity <ann> has no learned word whose attention"):
        apply(model, replace(ann, vectors={}), mask=mask)
    with caplog.at_level(logging.WARNING):
        apply(model, ann, mask=mask * 0)
    assert [r.message for r in caplog.records if "Pinpoint" in r.message] == [
        "Pinpoint: the mask of <ann> is empty, so the picture never looks at it"
    ]


# Files


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
    with pytest.raises(
        ValueError, match=r"identity is ann\.safetensors, which is not in models/ident"
    ):
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
