"""Who is in the picture: learned identities applied, saved and loaded."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .host import applying, arguments, identity_files, progress, tensor_files, widgets
from .host.identity import Identity


class ApplyIdentity(io.ComfyNode):
    """Makes an identity's word known to prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointApplyIdentity",
            display_name="Apply Identity",
            category="pinpoint/identity",
            description=(
                "Makes a learned identity known to a model: its name in angle brackets, as "
                "<ann>, then works in any prompt, and a mask can keep it to its place."
            ),
            search_aliases=["textual inversion", "learned token", "subject", "s2edit", "face"],
            inputs=[
                io.Model.Input("model", tooltip="Of the family that it was learned with."),
                io.Clip.Input("clip", tooltip="The model's text encoders."),
                widgets.Identity.Input("identity", tooltip="From Learn or Load Identity."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip=(
                        "Of its change of the model, which holds most of a person. At 0 the model "
                        "is untouched and the word acts alone; prompt weights as (<ann>:1.2) turn "
                        "it up or down."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip=(
                        "What to call it in prompts, if not by its own name: for two identities of "
                        "the same name."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where its word may act, 1 = inside; any size. Without it, everywhere.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="For a guider or a sampler, or the next Apply Identity."),
                io.Clip.Output(tooltip="For CLIP Text Encode, or the next Apply Identity."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        identity: Identity,
        strength: float,
        name: str,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        # The page keeps a warning until there is another text.
        progress.show(f"<{applying.name_in_prompts(identity, name)}> can be written in prompts")
        return io.NodeOutput(*applying.applied(model, clip, identity, strength, mask, name))


class SaveIdentity(io.ComfyNode):
    """An identity as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointSaveIdentity",
            display_name="Save Identity",
            category="pinpoint/identity",
            description=(
                "Saves a learned identity to models/identities, and on request its parts for "
                "ComfyUI's own nodes."
            ),
            search_aliases=["save token", "export embedding", "export lora"],
            is_output_node=True,
            inputs=[
                widgets.Identity.Input("identity", tooltip="From Learn Identity."),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip=(
                        "In models/identities, with folders if you like: people/ann. Empty for the "
                        "identity's name."
                    ),
                ),
                io.Boolean.Input(
                    "embedding",
                    default=False,
                    tooltip="Save its word to models/embeddings too, for embedding:ann in prompts.",
                ),
                io.Boolean.Input(
                    "lora",
                    default=False,
                    tooltip="Save its change of the model to models/loras too, for Load LoRA.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace files that are there already."
                ),
            ],
            outputs=[
                io.String.Output(display_name="files", tooltip="What was written, one in a line.")
            ],
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None = None) -> bool | str:
        """Tell of an impossible name when a prompt is queued; a linked one is not known then."""
        try:
            identity_files.require_file_name(file_name or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, identity: Identity, file_name: str, embedding: bool, lora: bool, overwrite: bool
    ) -> io.NodeOutput:
        paths = identity_files.save(
            identity, file_name, embedding=embedding, lora=lora, overwrite=overwrite
        )
        written = "\n".join(map(str, paths))
        progress.show(written)
        return io.NodeOutput(written, ui=ui.PreviewText(written))


class LoadIdentity(io.ComfyNode):
    """An identity from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointLoadIdentity",
            display_name="Load Identity",
            category="pinpoint/identity",
            description="Loads an identity that Save Identity wrote to models/identities.",
            search_aliases=["load token", "load subject"],
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=identity_files.names(),
                    tooltip="A file of models/identities.",
                )
            ],
            outputs=[
                widgets.Identity.Output(display_name="identity", tooltip="For Apply Identity."),
                io.String.Output(
                    display_name="about", tooltip="Its name, model family and how it was learned."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str) -> str:
        """Another file by the same name is another identity."""
        return tensor_files.fingerprint(tensor_files.path_of(identity_files.folder, file_name))

    @classmethod
    def execute(cls, file_name: str) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        identity = identity_files.load(file_name)
        about = identity.about()
        progress.show(about)
        return io.NodeOutput(identity, about, ui=ui.PreviewText(about))


class IdentityHook(io.ComfyNode):
    """An identity's change of the model, for chosen prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointIdentityHook",
            display_name="Identity Hook",
            category="pinpoint/identity",
            description=(
                "Lets an identity change the model for chosen prompts only, by ComfyUI's hooks, so "
                "that several people each have their own place."
            ),
            search_aliases=["two people", "regional lora", "hook lora", "several subjects"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="What will be sampled with; only whether it fits is looked at."
                ),
                widgets.Identity.Input(
                    "identity",
                    tooltip="From Learn or Load Identity; in its Apply Identity, strength is 0.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Of its change of the model.",
                ),
                io.Hooks.Input(
                    "prev_hooks", optional=True, tooltip="Hooks of other nodes to go with it."
                ),
            ],
            outputs=[io.Hooks.Output(tooltip="For Cond Set Props, behind the identity's prompt.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        identity: Identity,
        strength: float,
        prev_hooks: io.Hooks.Type | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        own = applying.hooks(model, identity, strength)
        return io.NodeOutput(own if prev_hooks is None else prev_hooks.clone_and_combine(own))


nodes = [ApplyIdentity, SaveIdentity, LoadIdentity, IdentityHook]
