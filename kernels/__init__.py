"""The mathematics of Pinpoint: pure functions on tensors, without any import from ComfyUI."""
