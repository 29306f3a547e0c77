"""Drives a real ComfyUI: finds it, installs what it needs, runs it as a server or in-process.

`comfyui`, `environment` and `options` use the standard library only, because `run.py` imports
them before anything is installed.
"""
