"""From a picture to a picture through a real ComfyUI server, with the demo checkpoint."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from host.client import Client, PromptTimedOut, ServerError
from host.graphs import NodeGraph, Wire
from host.prompts import Outputs, PromptFailed, PromptInterrupted, PromptRejected
from host.server import Server
from portraits import checkpoint, demo_case

STEPS, N_MAX = 14, 12
SEED = 5


@pytest.fixture(scope="module")
def portrait(server: Server) -> str:
    pixels, _, _ = demo_case(3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return server.upload_image("test_portrait.png", buffer.getvalue())


class EditGraph(NodeGraph):
    """A portrait, its prompts, and the end of an edit: what all graphs here have."""

    def __init__(self, portrait: str, model: str = checkpoint.name):
        super().__init__()
        loader = self.add("CheckpointLoaderSimple", ckpt_name=model)
        self.model, clip, self.vae = loader, loader.out(1), loader.out(2)
        self.source = self.add("LoadImage", image=portrait)
        self.latent = self.add("VAEEncode", vae=self.vae, pixels=self.source)
        _, source, target = demo_case(3)
        texts = {"source": source, "target": target, "negative": ""}
        self.prompts = {
            name: self.add("CLIPTextEncode", clip=clip, text=text) for name, text in texts.items()
        }

    def end(self, edited: Wire, mask: Wire) -> EditGraph:
        """Save the edited latent and the picture, its outside pasted back."""
        decoded = self.add("VAEDecode", vae=self.vae, samples=edited)
        pasted = self.add(
            "PinpointCompositeEdit",
            source=self.source,
            edited=decoded,
            mask=mask,
            threshold=0.5,
            feather=4,
        )
        self.add("SaveImage", images=pasted, filename_prefix="tests/edit")
        place = self.add("MaskToImage", mask=mask)
        self.add("SaveImage", images=place, filename_prefix="tests/mask")
        self.add("SaveLatent", samples=edited, filename_prefix="tests/edit")
        return self


def one_node(portrait: str, **widgets: Any) -> EditGraph:
    graph = EditGraph(portrait, widgets.pop("model", checkpoint.name))
    values = {
        "seed": SEED,
        "steps": STEPS,
        "strength": N_MAX / STEPS,
        "source_guidance": 1.5,
        "target_guidance": 5.5,
        "mask_threshold": 0.3,
        "mask_blur": 3,
    }
    edited = graph.add(
        "PinpointEditWithWords",
        model=graph.model,
        latent=graph.latent,
        **graph.prompts,
        **{**values, **widgets},
    )
    return graph.end(edited, edited.out(1))


def parts(portrait: str) -> EditGraph:
    graph = EditGraph(portrait)
    pair = {name: graph.prompts[name] for name in ("source", "target")}
    mask = graph.add(
        "PinpointVelocityMask",
        model=graph.model,
        latent=graph.latent,
        **pair,
        **dict(noise_level=0.75, samples=10, guidance=1.5, threshold=0.3, softness=0.3),
        **dict(dilation=0, blur=3, seed=0),
    )
    edited = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED),
        guider=graph.add(
            "PinpointSourceTargetGuider",
            model=graph.model,
            **graph.prompts,
            **dict(source_guidance=1.5, target_guidance=5.5, guidance_mode="auto"),
        ),
        sampler=graph.add(
            "PinpointEditSampler",
            **dict(method="FocusFlow", n_max=N_MAX, n_min=0, n_avg=1, reanchor=False, mask=mask),
        ),
        sigmas=graph.add(
            "BasicScheduler", model=graph.model, scheduler="simple", steps=STEPS, denoise=1.0
        ),
        latent_image=graph.latent,
    )
    return graph.end(edited, mask)


def saved(outputs: Outputs, kind: str, name: str) -> dict[str, str]:
    """The file that a prompt saved as tests/<name>."""
    files = [file for output in outputs.values() for file in output.get(kind, ())]
    (file,) = (file for file in files if file["filename"].startswith(f"{name}_"))
    return file


def png(server: Server, outputs: Outputs, name: str = "edit") -> bytes:
    """The saved picture; its prompt is in it, so that only equal prompts give equal bytes."""
    return server.view(**saved(outputs, "images", name))


def pixels(server: Server, outputs: Outputs, name: str = "edit") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(server, outputs, name))))


def saved_latent(server: Server, outputs: Outputs) -> Tensor:
    file = saved(outputs, "latents", "edit")
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def cached(server: Server, prompt_id: str) -> set[str]:
    """The nodes of a finished prompt that were not run again."""
    messages = dict(server.history(prompt_id)["status"]["messages"])
    return set(messages["execution_cached"]["nodes"])


@pytest.fixture(scope="module")
def expected(server: Server, portrait: str) -> Outputs:
    """What the one-node graph gives."""
    return server.run(one_node(portrait).nodes)


def test_the_edit_changes_the_inside_of_the_mask_only(
    server: Server, portrait: str, expected: Outputs
) -> None:
    edited, mask = pixels(server, expected), pixels(server, expected, "mask")
    source = np.asarray(Image.open(server.base / "input" / portrait))
    # The pasted part is where the mask is 0.5 and above.
    outside = mask[..., 0] < 127
    assert 0.05 < outside.mean() < 0.95
    assert np.array_equal(edited[outside], source[outside])
    assert (edited != source).any(-1)[~outside].mean() > 0.5


def test_parts_give_the_same_latent_and_picture_as_the_one_node(
    server: Server, portrait: str, expected: Outputs
) -> None:
    apart = server.run(parts(portrait).nodes)
    assert torch.equal(saved_latent(server, apart), saved_latent(server, expected))
    assert np.array_equal(pixels(server, apart), pixels(server, expected))


def test_a_second_queue_runs_nothing_and_another_seed_only_what_follows_it(
    server: Server, portrait: str, expected: Outputs
) -> None:
    graph = one_node(portrait)
    edit = graph.find("PinpointEditWithWords")
    # ComfyUI keeps the results of the last prompt only, and others have run since.
    server.run(graph.nodes)
    again = server.queue(graph.nodes)
    assert png(server, server.wait(again)) == png(server, expected)
    assert cached(server, again) == set(graph.nodes)
    graph.nodes[edit]["inputs"]["seed"] = SEED + 1
    other = server.queue(graph.nodes)
    assert not np.array_equal(pixels(server, server.wait(other)), pixels(server, expected))
    before = {"CheckpointLoaderSimple", "LoadImage", "VAEEncode", "CLIPTextEncode"}
    kept = {node_id for node_id, node in graph.nodes.items() if node["class_type"] in before}
    assert cached(server, other) == kept


def test_prompts_queued_at_once_do_not_mix(
    server: Server, portrait: str, expected: Outputs
) -> None:
    other = server.run(one_node(portrait, seed=SEED + 2).nodes)
    # Each has a setting that no prompt before had, so that nothing comes from the cache.
    first, second = (
        server.queue(one_node(portrait, seed=seed, mask_blur=5).nodes) for seed in (SEED, SEED + 2)
    )
    third = server.queue(one_node(portrait).nodes)
    one, two, three = (pixels(server, server.wait(prompt)) for prompt in (first, second, third))
    alone = [
        pixels(server, server.run(one_node(portrait, seed=seed, mask_blur=5).nodes))
        for seed in (SEED, SEED + 2)
    ]
    assert np.array_equal(one, alone[0])
    assert np.array_equal(two, alone[1])
    assert not np.array_equal(one, two)
    assert not np.array_equal(two, pixels(server, other))
    assert np.array_equal(three, pixels(server, expected))


def test_an_interrupted_edit_leaves_nothing_behind(
    server: Server, portrait: str, expected: Outputs
) -> None:
    long = one_node(portrait, steps=900, seed=SEED + 3)
    prompt, parts_done = server.queue(long.nodes), []

    def interrupt(node_id: str, done: float) -> None:
        if node_id == long.find("PinpointEditWithWords") and 0 < done < 1:
            parts_done.append(done)
            server.interrupt(prompt)

    with pytest.raises(PromptInterrupted):
        server.wait(prompt, interrupt)
    assert parts_done, "interrupted in mid-edit"
    fresh = one_node(portrait)
    # Run again, not taken from the cache, which the interrupted prompt has replaced.
    after = server.queue(fresh.nodes)
    assert np.array_equal(pixels(server, server.wait(after)), pixels(server, expected))
    assert fresh.find("PinpointEditWithWords") not in cached(server, after)


def idle(client: Client) -> bool:
    """Whether nothing runs or waits, at last."""
    for _ in range(100):
        queue = client.get("/queue").json()
        if not queue["queue_running"] + queue["queue_pending"]:
            return True
        time.sleep(0.1)
    return False


def test_a_prompt_that_takes_too_long_is_cancelled_where_it_is(
    server: Server, portrait: str
) -> None:
    running, waiting = (server.queue(one_node(portrait, steps=900 + i).nodes) for i in range(2))
    with pytest.raises(PromptTimedOut, match=f"{waiting} took longer than 0 s"):
        server.wait(waiting, timeout=0.2)
    assert not server.get("/queue").json()["queue_pending"]
    with pytest.raises(PromptTimedOut, match=running):
        server.wait(running, timeout=0.2)
    assert idle(server)


def test_ctrl_c_cancels_what_was_waited_for(server: Server, portrait: str) -> None:
    def stop(_node_id: str, _done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server.run(one_node(portrait, steps=990).nodes, stop)
    assert idle(server)


def test_a_prompt_of_which_a_part_is_wrong_does_not_run(server: Server, portrait: str) -> None:
    long = server.queue(one_node(portrait, steps=950).nodes)
    graph = one_node(portrait)
    graph.add("SaveImage", filename_prefix="tests/nothing")
    with pytest.raises(PromptRejected, match="Required input is missing: images") as rejected:
        server.queue(graph.nodes)
    assert not rejected.value.error, "the rest of it was taken"
    assert not server.get("/queue").json()["queue_pending"]
    server.cancel(long)
    assert idle(server)


def test_a_lost_connection_is_made_anew(
    server: Server, portrait: str, expected: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "_reconnects", (0.1, 0.1))
    with Client(server.address.removeprefix("http://")) as client:
        prompt = client.queue(one_node(portrait, steps=STEPS + 1).nodes)
        assert client._socket is not None
        client._socket.shutdown()
        assert saved(client.wait(prompt, timeout=60), "images", "edit")
        again = client.run(one_node(portrait).nodes, timeout=60)
        assert png(server, again) == png(server, expected)


def test_a_connection_that_says_nothing_is_not_waited_for(
    server: Server, portrait: str, expected: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "_silence", 0.2)
    monkeypatch.setattr(Client, "_sort", lambda *_: None)
    with Client(server.address) as client:
        again = client.run(one_node(portrait).nodes, timeout=60)
        assert png(server, again) == png(server, expected)
        with pytest.raises(ServerError, match="does not know prompt gone any more"):
            client.wait("gone")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "http://[::1", "ftp://127.0.0.1:9", "::"])
def test_an_address_without_a_server_is_named(address: str) -> None:
    with pytest.raises(ServerError, match=r"No ComfyUI answers at .*: start it, or correct the"):
        Client(address).__enter__()


def test_what_a_server_refuses_is_a_sentence(server: Server) -> None:
    with pytest.raises(ServerError, match=r"/view\?filename=gone.* answered 404"):
        server.view("gone.png")


def test_an_error_leaves_nothing_behind(server: Server, portrait: str, expected: Outputs) -> None:
    broken = parts(portrait)
    broken.nodes[broken.find("PinpointEditSampler")]["inputs"]["n_max"] = STEPS + 1
    message = (
        rf"SamplerCustomAdvanced .*ValueError: n_max is {STEPS + 1}, but .* only {STEPS} steps"
    )
    with pytest.raises(PromptFailed, match=message):
        server.run(broken.nodes)
    broken.nodes[broken.find("PinpointEditSampler")]["inputs"]["n_max"] = N_MAX
    mended = server.run(broken.nodes)
    assert np.array_equal(pixels(server, mended), pixels(server, expected))


def test_a_missing_model_file_is_named(server: Server, portrait: str) -> None:
    with pytest.raises(PromptRejected, match=r"Value not in list: ckpt_name: 'gone\.safetensors'"):
        server.run(one_node(portrait, model="gone.safetensors").nodes)


def test_a_model_file_that_vanishes_is_named(server: Server, portrait: str) -> None:
    """Between the page's listing and the run."""
    file = server.base / "models" / "checkpoints" / "vanishing.safetensors"
    file.write_bytes(b"not a model")
    with pytest.raises(PromptFailed, match=r"CheckpointLoaderSimple .*") as broken:
        server.run(one_node(portrait, model=file.name).nodes)
    assert broken.value.node_type == "CheckpointLoaderSimple"
    file.unlink()
    with pytest.raises(PromptRejected, match=r"vanishing\.safetensors"):
        server.run(one_node(portrait, model=file.name).nodes)


BAD_WIDGETS: dict[str, tuple[dict[str, Any], str]] = {
    "below": (dict(strength=-0.1), r"Value -0\.1 smaller than min of 0\.0: strength"),
    "above": (dict(target_guidance=1e9), r"Value 1000000000\.0 bigger than max of 100\.0: target"),
    "huge steps": (dict(steps=10**12), r"bigger than max of \d+: steps"),
    "negative steps": (dict(steps=-3), r"Value -3 smaller than min of 1: steps"),
    "text": (dict(steps="many"), r"Failed to convert an input value to a INT value: steps"),
    "nothing": (dict(mask_threshold=None), r"mask_threshold"),
}


@pytest.mark.parametrize(("widgets", "message"), BAD_WIDGETS.values(), ids=BAD_WIDGETS)
def test_bad_widgets_are_rejected_with_their_names(
    server: Server, portrait: str, widgets: dict[str, Any], message: str
) -> None:
    graph = one_node(portrait, **widgets)
    with pytest.raises(PromptRejected, match=message) as rejected:
        server.queue(graph.nodes)
    assert set(rejected.value.node_errors) == {graph.find("PinpointEditWithWords")}


def test_a_missing_widget_is_rejected_with_its_name(server: Server, portrait: str) -> None:
    graph = one_node(portrait)
    del graph.nodes[graph.find("PinpointEditWithWords")]["inputs"]["seed"]
    with pytest.raises(PromptRejected, match="Required input is missing: seed"):
        server.queue(graph.nodes)


def test_the_same_queue_after_a_restart_gives_the_same_bytes(
    server: Server, portrait: str, expected: Outputs
) -> None:
    before = png(server, expected)
    server.close()
    with pytest.raises(ServerError):
        server.get("/system_stats")
    server.__enter__()
    prompt = server.queue(one_node(portrait).nodes)
    assert png(server, server.wait(prompt)) == before
    assert not cached(server, prompt)
