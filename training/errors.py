"""Errors that a person can mend, and what their texts must not tell."""

import os
import re


class RunError(ValueError):
    """What stops a run for a reason that its user can mend.

    Its message says what was found, what is wanted and which option changes it; scripts print it without a
    traceback.
    """


def redact(text: str) -> str:
    """`text` without access tokens: those of the Hub's form, in addresses, and those of the environment."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return re.sub(r"hf_\w{8,}|(?<=://)[^/@\s]+(?=@)", "***", text)
