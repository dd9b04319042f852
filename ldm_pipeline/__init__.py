"""Latent diffusion models as ordinary Diffusers pipelines: loading and sampling."""

from importlib import import_module

# Resolved on first use (PEP 562): Diffusers takes seconds to import, and a command's --help needs none of it.
_HOMES = {
    "LDMPipeline": "loading",
    "build_autoencoder": "models",
    "build_unet": "models",
    "build_scheduler": "models",
    "set_latent_statistics": "pipeline",
    "export_for_hub": "hub",
    "push_to_hub": "hub",
    "render_card": "model_card",
    "TrainingRecord": "model_card",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
