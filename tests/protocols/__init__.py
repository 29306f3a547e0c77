"""Published evaluation protocols, run on any ComfyUI server: layouts, runs, scores and pages."""
