"""Two prompts through a real tokenizer: which of their tokens belong together."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock, tiny_clip
from host.inprocess import Host

LENGTH = 77


@pytest.fixture
def clip(host: Host) -> Any:  # noqa: ARG001
    return tiny_clip.clip()


def encoded(pack: ModuleType, clip: Any, source: str, target: str, *more: str) -> Any:
    return pack.nodes.host.prompt_pairs.Wording(source, target, *more).encoded(clip)


def partners(mapping: Tensor) -> dict[int, int]:
    """Target's row -> source's row, where there is exactly one."""
    assert set(mapping.unique().tolist()) <= {0.0, 1.0}
    columns = mapping.any(0).nonzero().flatten().tolist()
    return {column: int(mapping[:, column].argmax()) for column in columns}


def test_the_same_prompt_is_all_its_own(pack: ModuleType, clip: Any) -> None:
    found = encoded(pack, clip, "a red hat", "a red hat")
    assert torch.equal(found.edit.mapping, torch.eye(LENGTH))
    assert torch.equal(found.edit.weight, torch.ones(LENGTH))
    assert found.blend is None
    expected = stock.call("CLIPTextEncode", clip=clip, text="a red hat")[0]
    assert torch.equal(found.source[0][0], expected[0][0])
    assert torch.equal(found.target[0][0], expected[0][0])


@pytest.mark.parametrize("mode", ["replace", "refine"])
def test_a_swap(pack: ModuleType, clip: Any, mode: str) -> None:
    """Start, four words, end and padding."""
    found = encoded(pack, clip, "a red hat here", "a (blue:1.3) hat here", mode)
    expected = {row: row for row in range(LENGTH) if mode == "replace" or row != 2}
    assert partners(found.edit.mapping) == expected


@pytest.mark.parametrize("mode", ["replace", "refine"])
def test_an_addition_shifts_the_end_and_the_padding(pack: ModuleType, clip: Any, mode: str) -> None:
    """The end, at which much is looked, stays the end."""
    found = partners(encoded(pack, clip, "a hat", "a big hat", mode).edit.mapping)
    assert [found.get(row) for row in range(6)] == [0, 1, None, 2, 3, 4]
    assert found[76] == 75
    back = partners(encoded(pack, clip, "a big hat", "a hat", mode).edit.mapping)
    assert [back.get(row) for row in range(5)] == [0, 1, 3, 4, 5]
    # The source has no more padding than this.
    assert max(back) == 75


def test_one_word_for_several_tokens(pack: ModuleType, clip: Any) -> None:
    found = encoded(pack, clip, "a hat", "a moustachioed").edit.mapping
    count = int((found[2] > 0).sum())
    assert count > 1
    torch.testing.assert_close(found[2, 2 : 2 + count], torch.full((count,), 1 / count))
    assert found[3, 2 + count] == 1


def test_long_prompts_in_several_parts(pack: ModuleType, clip: Any) -> None:
    words = " ".join(["hat"] * 80)
    found = encoded(pack, clip, "a red hat", f"a red hat {words}").edit.mapping
    assert found.shape == (77, 154)
    assert [int(found[:, row].argmax()) for row in range(4)] == [0, 1, 2, 3]
    # The second part's start is no end.
    assert not found[:, 77].any()


def test_learned_words_belong_together(pack: ModuleType, clip: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    ann = {"l": torch.randn(2, tiny_clip.CONFIG["hidden_size"], generator=generator)}
    knowing = pack.nodes.host.words.with_words(clip, {"ann": ann})
    found = encoded(pack, knowing, "<ann> in a hat", "old <ann> in a hat", "refine")
    mapping = partners(found.edit.mapping)
    assert [mapping.get(row) for row in range(7)] == [0, None, 1, 2, 3, 4, 5]


def test_weights_and_blend_words(pack: ModuleType, clip: Any) -> None:
    found = encoded(
        *(pack, clip, "a red hat", "a blue hat, smiling"),
        *("replace", "smiling: 3, blue hat:-0.5", "red hat, smiling"),
    )
    expected = torch.ones(LENGTH)
    expected[5], expected[2:4] = 3.0, -0.5
    assert torch.equal(found.edit.weight, expected)
    source, target = found.blend
    assert source.nonzero().flatten().tolist() == [2, 3]
    assert target.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("text", ["smiling", ": 2", "smiling: x", "smiling: nan", "smiling: 101"])
def test_weights_that_cannot_be_read(pack: ModuleType, clip: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"reweight has '.*': write a phrase"):
        encoded(pack, clip, "a hat", "a hat, smiling", "replace", text)


def test_phrases_that_are_not_there(pack: ModuleType, clip: Any) -> None:
    with pytest.raises(ValueError, match="reweight has 'red', which is not in target_prompt"):
        encoded(pack, clip, "a red hat", "a blue hat", "replace", "red: 2")
    with pytest.raises(ValueError, match="blend_words has 'shoe', which is neither in"):
        encoded(pack, clip, "a red hat", "a blue hat", "replace", "", "hat, shoe")
    for prompts, name in ((("", "a"), "source_prompt"), (("a", " "), "target_prompt")):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            encoded(pack, clip, *prompts)


def test_the_nodes_work_together(pack: ModuleType, clip: Any, tiny_model: Any) -> None:  # noqa: ARG001
    model, latent = tiny_model("sd3_bare"), torch.zeros(1, 16, 8, 8)
    controlled, source, target = stock.call(
        "PinpointPromptToPrompt",
        **dict(model=model, clip=clip, source_prompt="a red hat", target_prompt="a blue hat"),
        **dict(mode="replace", cross_until=0.8, self_until=0.4, self_grids="coarse"),
        **dict(blocks="all", reweight="blue: 2", blend_words="hat"),
        **dict(blend_threshold=0.3, blend_start=0.2),
    )
    guider = stock.call(
        "PinpointPromptToPromptGuider",
        **dict(model=controlled, source=source, target=target),
        **dict(source_guidance=1.0, target_guidance=1.0, guidance_mode="auto"),
    )[0]
    edited = stock.call(
        "SamplerCustomAdvanced",
        noise=stock.call("RandomNoise", noise_seed=1)[0],
        guider=guider,
        sampler=stock.call("KSamplerSelect", sampler_name="euler")[0],
        sigmas=torch.linspace(1, 0, 5),
        latent_image={"samples": latent},
    )[0]["samples"]
    assert edited.isfinite().all()
    assert guider.blend.area is not None
