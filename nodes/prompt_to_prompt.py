"""Prompt-to-Prompt: a target prompt looks where its source prompt looks."""

from __future__ import annotations

from comfy_api.latest import io

from .host import arguments, layouts, prompt_guiding, prompt_pairs, prompt_to_prompt, widgets
from .host.guiding import GuidanceMode
from .host.inversion import Trajectory


class PromptToPrompt(io.ComfyNode):
    """Controls a target prompt's attention by the source prompt's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointPromptToPrompt",
            display_name="Prompt-to-Prompt",
            category="pinpoint/attention",
            description=(
                "Keeps a picture's layout while words change: what the new prompt's words look at "
                "is taken from the old prompt's, and single words can be made stronger or weaker."
            ),
            search_aliases=["p2p", "cross attention control", "attention replace", "reweight"],
            inputs=[
                io.Model.Input("model", tooltip="For a Prompt-to-Prompt Guider."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                widgets.prompt("source_prompt", "Describes the picture as it is."),
                widgets.prompt(
                    "target_prompt",
                    "The same prompt with words swapped, added or left out. May be the same if "
                    "reweight changes something.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["replace", "refine"],
                    default="replace",
                    tooltip=(
                        "Words in place of others look where those looked (replace) or where they "
                        "want, as added words do (refine)."
                    ),
                ),
                widgets.part(
                    "cross_until",
                    0.4,
                    "Part of the sampling in which words look where the source's looked. 0 = off.",
                ),
                widgets.part(
                    "self_until",
                    0.6,
                    "Part of the sampling in which the picture's own attention is the source's. "
                    "Keeps shapes. 0 = off.",
                ),
                io.Combo.Input(
                    "self_grids",
                    options=["coarse", "all"],
                    default="coarse",
                    tooltip=(
                        "Where self_until acts: on grids of tokens at most half as fine as the "
                        "latent, as published, or on all."
                    ),
                ),
                widgets.blocks("all"),
                io.String.Input(
                    "reweight",
                    default="",
                    tooltip=(
                        "Words of the target prompt with the number by which their attention is "
                        "multiplied, as smile: 2, hat: 0.5. Acts while cross_until does."
                    ),
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    tooltip=(
                        "Words of either prompt, with commas: the picture changes only where it "
                        "looks at them. Empty = everywhere. Needs a Prompt-to-Prompt Guider."
                    ),
                ),
                widgets.part(
                    "blend_threshold",
                    0.3,
                    "Part of the highest attention to blend_words from which a place may change.",
                ),
                widgets.part(
                    "blend_start",
                    0.2,
                    "Part of the sampling after which blend_words hold the change.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="For a Prompt-to-Prompt Guider."),
                io.Conditioning.Output(
                    display_name="source", tooltip="The source prompt, for the guider."
                ),
                io.Conditioning.Output(
                    display_name="target", tooltip="The target prompt, for the guider."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        source_prompt: str,
        target_prompt: str,
        mode: prompt_pairs.Mode,
        cross_until: float,
        self_until: float,
        self_grids: prompt_to_prompt.Grids,
        blocks: str,
        reweight: str,
        blend_words: str,
        blend_threshold: float,
        blend_start: float,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        settings = prompt_to_prompt.ControlSettings(
            layouts.chosen_blocks(model, blocks),
            prompt_to_prompt.sigma_after(model, cross_until),
            prompt_to_prompt.sigma_after(model, self_until),
            self_grids,
        )
        blend = prompt_to_prompt.BlendSettings(
            blend_threshold, prompt_to_prompt.sigma_after(model, blend_start)
        )
        wording = prompt_pairs.Wording(source_prompt, target_prompt, mode, reweight, blend_words)
        prompts = wording.encoded(clip)
        controlled = prompt_to_prompt.controlled(model, prompts, settings, blend)
        return io.NodeOutput(controlled, prompts.source, prompts.target)


class PromptToPromptGuider(io.ComfyNode):
    """Samples source and target side by side, with any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointPromptToPromptGuider",
            display_name="Prompt-to-Prompt Guider",
            category="pinpoint/attention",
            description=(
                "Lets the source picture arise beside the target from the same noise, or follow "
                "its inversion, so that Prompt-to-Prompt works with any model and sampler."
            ),
            search_aliases=["p2p guider", "null-text editing", "paired guider"],
            inputs=[
                io.Model.Input("model", tooltip="From Prompt-to-Prompt."),
                io.Conditioning.Input(
                    "source", tooltip="The picture as it is, from Prompt-to-Prompt."
                ),
                io.Conditioning.Input(
                    "target", tooltip="The picture as it shall be, from Prompt-to-Prompt."
                ),
                _guidance(
                    "source_guidance",
                    "Guidance scale of the source. Not used with a trajectory, except by models "
                    "that take guidance as a number.",
                ),
                _guidance("target_guidance", "Guidance scale of the target."),
                io.Combo.Input(
                    "guidance_mode",
                    options=["auto", "cfg", "embedded"],
                    default="auto",
                    tooltip=(
                        "cfg: classifier-free guidance; embedded: given to the model as a number "
                        "(Flux.1-dev); auto: as the model needs."
                    ),
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip=(
                        "Negative prompt, often empty text. A trajectory of Null-Text Inversion "
                        "brings its own."
                    ),
                ),
                widgets.Trajectory.Input(
                    "trajectory",
                    optional=True,
                    tooltip=(
                        "The inverted picture that is edited. Without it the source arises from "
                        "the sampler's noise."
                    ),
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced, with any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        source: io.Conditioning.Type,
        target: io.Conditioning.Type,
        source_guidance: float,
        target_guidance: float,
        guidance_mode: GuidanceMode,
        negative: io.Conditioning.Type | None = None,
        trajectory: Trajectory | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        guider = prompt_guiding.PairGuider(
            model,
            source,
            target,
            negative,
            source_guidance,
            target_guidance,
            guidance_mode,
            trajectory,
        )
        return io.NodeOutput(guider)


def _guidance(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=7.5, min=0.0, max=100.0, step=0.1, tooltip=tooltip)


nodes = [PromptToPrompt, PromptToPromptGuider]
