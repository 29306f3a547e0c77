"""IP-Adapter files as branches, through the nodes, on UNets with all blocks of SD1.5 and SDXL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from host import diffusers_unet, ip_adapters, stock
from host.edits import patcher_state, picture_latent
from host.inprocess import Host

TinyModel = Callable[[str], Any]

MODELS = {"SD15": "sd15_whole", "SDXL": "sdxl_whole"}
TEXT = {"SD15": 768, "SDXL": tiny.text_width}
"""Width of the prompts of these models."""

families = pytest.mark.parametrize("family", MODELS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: ModuleType) -> Path:
    """An empty folder for files; the tiny SDXL's have narrower tokens than published ones."""
    known = pack.nodes.host.ip_adapter_files.FAMILIES
    monkeypatch.setitem(known, "SDXL", replace(known["SDXL"], width=TEXT["SDXL"]))
    return ip_adapters.folder(tmp_path, monkeypatch)


def weights(kind: str, family: str = "SD15", seed: int = 0) -> dict[str, Tensor]:
    return ip_adapters.weights(kind, family, width=TEXT[family], seed=seed)


def load(preservation: str, personalization: str) -> Any:
    names = dict(preservation=preservation, personalization=personalization)
    return stock.call("PinpointIPAdapterBranches", **names)[0]


def made(folder: Path, preservation: str, personalization: str, family: str = "SD15") -> Any:
    """An adapter of two kinds of files."""
    kinds = (preservation, personalization)
    return load(
        *(
            ip_adapters.write(folder, f"{seed}_{kind}", weights(kind, family, seed))
            for seed, kind in enumerate(kinds)
        )
    )


def apply(model: Any, adapter: Any, subject: Any, **inputs: Any) -> Any:
    settings = dict(gamma=0.3, weight=0.8, mode="as trained", start=0.0, end=1.0, blocks="all")
    return stock.call(
        "PinpointApplyFlexIP", model=model, adapter=adapter, subject=subject, **settings | inputs
    )[0]


def velocity(model: Any, family: str = "SD15", rows: int = 1) -> Tensor:
    x = picture_latent(rows, 16, 8, channels=4)
    positive, negative = (stock.conditioning(seed, width=TEXT[family]) for seed in (1, 2))
    return stock.velocity(model, positive, negative, 2.0, x, 3.0)


def test_the_node_says_what_it_loaded(folder: Path) -> None:
    plus = ip_adapters.write(folder, "plus", weights("plus"))
    whole = ip_adapters.write(folder, "whole", weights("global"))
    names = dict(preservation=plus, personalization=whole)
    adapter, about = stock.call("PinpointIPAdapterBranches", **names)
    assert (adapter.name, adapter.family, adapter.mode) == ("plus and whole", "SD15", "linear")
    assert about.splitlines() == [
        "IP-Adapters for SD15",
        "preservation: plus, plus: 16 tokens from hidden states of width 40",
        "personalization: whole, global: 4 tokens from an embedding of width 24",
    ]


def test_other_files_of_the_same_names_are_loaded_anew(folder: Path, host: Host) -> None:
    node: Any = host.nodes["PinpointIPAdapterBranches"]
    names = [ip_adapters.write(folder, name, weights("global")) for name in ("a", "b")]
    seen = [node.fingerprint_inputs(*names)]
    assert node.fingerprint_inputs(*names) == seen[0]
    for name in ("a", "b"):
        ip_adapters.write(folder, name, weights("plus"))
        seen.append(node.fingerprint_inputs(*names))
    assert len(set(seen)) == 3


def test_a_file_that_is_gone_is_refused(folder: Path) -> None:
    name = ip_adapters.write(folder, "one", weights("global"))
    with pytest.raises(ValueError, match=r"personalization is two: choose one of one\.safetensors"):
        load(name, "two")


@families
def test_nothing_sticks_and_weight_0_leaves_the_model_as_it_is(
    tiny_model: TinyModel, pack: ModuleType, folder: Path, family: str
) -> None:
    model, subject = tiny_model(MODELS[family]), ip_adapters.subject(pack)
    adapter = made(folder, "plus", "global", family)
    state, before = patcher_state(model), velocity(model, family)
    off = apply(model, adapter, subject, weight=0.0)
    assert torch.equal(velocity(off, family), before)
    on = apply(model, adapter, subject)
    found = velocity(on, family)
    assert (found - before).abs().mean() > 0.01
    assert torch.equal(velocity(model, family), before)
    assert torch.equal(velocity(on, family), found)
    assert patcher_state(model) == state


@pytest.mark.parametrize(("gamma", "role"), [(1.0, 0), (0.0, 1)])
def test_at_the_ends_of_the_gate_one_file_acts_alone(
    tiny_model: TinyModel, pack: ModuleType, folder: Path, gamma: float, role: int
) -> None:
    model, subject = tiny_model(MODELS["SD15"]), ip_adapters.subject(pack)
    both = made(folder, "plus", "global")
    alone = load(*[sorted(path.name for path in folder.iterdir())[role]] * 2)
    found = velocity(apply(model, both, subject, gamma=gamma))
    assert torch.equal(found, velocity(apply(model, alone, subject, gamma=gamma)))
    middle = velocity(apply(model, both, subject, gamma=0.5))
    assert not torch.allclose(found, middle, atol=1e-3)


def added(pack: ModuleType, model: Any, patched: Callable[[Any], Any], family: str) -> dict:
    """What comes to each cross-attention: (attention, what was added), by block."""
    tap = pack.nodes.host.tap
    before: dict[Any, Any] = {}
    after: dict[Any, Any] = {}

    def watching(kept: dict[Any, Any]) -> Any:
        def handler(attention: Any, proceed: Any) -> Tensor:
            out = proceed(attention)
            if attention.place.kind == "cross":
                kept[attention.place.block] = (attention, out.clone())
            return out

        return handler

    watched = tap.tapped(patched(tap.tapped(model, watching(before))), watching(after))
    x = picture_latent(1, 16, 8, channels=4)
    stock.velocity(watched, stock.conditioning(1, width=TEXT[family]), None, 1.0, x, 3.0)
    return {block: (attention, out - before[block][1]) for block, (attention, out) in after.items()}


@families
def test_each_layer_of_a_file_acts_in_its_block(
    tiny_model: TinyModel, pack: ModuleType, folder: Path, family: str
) -> None:
    """Every layer's values are its number."""
    content, width = weights("global", family), TEXT[family]
    content["image_proj.norm.weight"] = torch.zeros(width)
    content["image_proj.norm.bias"] = torch.ones(width)
    for key, tensor in content.items():
        if key.endswith("to_v_ip.weight"):
            content[key] = torch.full_like(tensor, int(key.split(".")[1]) / width)
    adapter = load(*[ip_adapters.write(folder, "numbers", content)] * 2)
    found = added(
        pack,
        tiny_model(MODELS[family]),
        lambda model: apply(model, adapter, ip_adapters.subject(pack), weight=0.5),
        family,
    )
    expected = diffusers_unet.numbers(family)
    assert {(b.kind, b.index, b.part) for b in found} == expected.keys()
    for block, (_, values) in found.items():
        number = expected[block.kind, block.index, block.part]
        torch.testing.assert_close(values, torch.full_like(values, number / 2), atol=0.01, rtol=0)


@pytest.mark.parametrize(("family", "references"), [("SD15", 3), ("SDXL", 1)])
def test_what_is_added_is_an_attention_written_out(
    tiny_model: TinyModel, pack: ModuleType, folder: Path, family: str, references: int
) -> None:
    subject = ip_adapters.subject(pack, references)
    adapter = made(folder, "plus", "global", family)
    found = added(
        pack,
        tiny_model(MODELS[family]),
        lambda model: apply(model, adapter, subject, gamma=0.3, weight=0.8),
        family,
    )
    files = [weights("plus", family, 0), weights("global", family, 1)]
    whole = [t.double() for key, t in files[1].items() if key.startswith("image_proj")]
    embedded = (subject.high.double() @ whole[0].T + whole[1]).view(-1, TEXT[family])
    centred = embedded - embedded.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    tokens = [
        adapter.preservation.network.image_proj(subject.hidden).double().flatten(0, 1),
        scaled * whole[2] + whole[3],
    ]
    assert [len(t) for t in tokens] == [16 * references, 4 * references]
    for (kind, index, part), number in diffusers_unet.numbers(family).items():
        attention, values = found[pack.nodes.host.layouts.Block(kind, index, part)]
        (q,) = attention.q.double()
        expected = torch.zeros_like(values[0], dtype=torch.float64)
        for file, seen, gain in zip(files, tokens, (0.3, 0.7), strict=True):
            k, v = (
                (seen @ file[f"ip_adapter.{number}.to_{part}_ip.weight"].double().T)
                .unflatten(1, (q.shape[0], q.shape[2]))
                .transpose(0, 1)
                for part in "kv"
            )
            read = (q @ k.mT / q.shape[2] ** 0.5).softmax(-1) @ v
            expected += 0.8 * gain * read.transpose(0, 1).flatten(1)
        torch.testing.assert_close(values[0].double(), expected, atol=1e-4, rtol=1e-4)


def test_order_of_references_does_not_matter(
    tiny_model: TinyModel, pack: ModuleType, folder: Path
) -> None:
    model, adapter = tiny_model(MODELS["SD15"]), made(folder, "plus", "global")
    three = ip_adapters.subject(pack, 3)
    turned = replace(three, high=three.high.flip(0), hidden=three.hidden.flip(0))
    one = replace(three, high=three.high[:1], hidden=three.hidden[:1])
    found = velocity(apply(model, adapter, three))
    torch.testing.assert_close(velocity(apply(model, adapter, turned)), found)
    assert not torch.allclose(velocity(apply(model, adapter, one)), found, atol=1e-3)


@pytest.mark.parametrize("kinds", [("global", "global"), ("full", "plus")], ids="-".join)
def test_rows_are_as_single_runs(
    tiny_model: TinyModel, pack: ModuleType, folder: Path, kinds: tuple[str, str]
) -> None:
    model = apply(tiny_model(MODELS["SD15"]), made(folder, *kinds), ip_adapters.subject(pack))
    torch.testing.assert_close(velocity(model, rows=2)[:1], velocity(model))


def test_files_in_half_precision_act_in_the_models(
    tiny_model: TinyModel, pack: ModuleType, folder: Path
) -> None:
    model, subject = tiny_model(MODELS["SD15"]), ip_adapters.subject(pack)
    exact = weights("plus")
    names = [
        ip_adapters.write(folder, name, {key: t.half().to(dtype) for key, t in exact.items()})
        for name, dtype in (("half", torch.float16), ("whole", torch.float32))
    ]
    half, whole = (velocity(apply(model, load(name, name), subject)) for name in names)
    assert torch.equal(half, whole)


def test_other_models_and_encoders_are_refused(
    tiny_model: TinyModel, pack: ModuleType, folder: Path
) -> None:
    adapter, subject = made(folder, "plus", "global"), ip_adapters.subject(pack)
    for name, said in (
        ("sdxl_whole", "adapter 0_plus and 1_global was trained for SD15, the model is SDXL: load"),
        ("flux", "was trained for SD15, the model is Flux"),
        ("sd15", "has attention for block .*, .*: load the model that it was trained for"),
    ):
        with pytest.raises(ValueError, match=said):
            apply(tiny_model(name), adapter, subject)
    said = "subject comes from a high_encoder whose features are {} wide, the adapter was .* {}: co"
    for part, found, wanted in (("hidden", 20, 40), ("high", 12, 24)):
        narrow = replace(subject, **{part: getattr(subject, part)[..., :found]})
        with pytest.raises(ValueError, match=said.format(found, wanted)):
            apply(tiny_model(MODELS["SD15"]), adapter, narrow)
    dino = subject.encoders[0]
    other = replace(subject, encoders=(dino, dino), high_input="low_encoder")
    with pytest.raises(ValueError, match=r"from a low_encoder that is dinov2 .* trained with CLIP"):
        apply(tiny_model(MODELS["SD15"]), adapter, other)
