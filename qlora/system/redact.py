"""Remove secrets from text that is printed, logged or saved."""

from __future__ import annotations

import os
import re

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
REDACTED = "[redacted]"
PATTERNS = (
    (r"\b(?:hf|api_org)_(?:[a-z]+_)?[A-Za-z0-9]{20,}", REDACTED),  # Hugging Face
    (r"\bsk-(?:[a-z0-9]+-)*\w{20,}[\w-]*", REDACTED),  # OpenAI, Anthropic
    (r"(?i)\b(bearer\s+)(?=\S*\d)[\w.~+/=-]{20,}", rf"\1{REDACTED}"),
    (r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/]+@", rf"\1{REDACTED}@"),  # user:password@host
)


def redact(text: str) -> str:
    """`text` with tokens, keys and passwords replaced by "[redacted]".

    They are recognized by their form, or as the value of one of SECRET_VARIABLES (of 8 characters or more: a
    shorter value is not a secret and might be part of ordinary words).
    """
    for value in (os.environ.get(name, "").strip() for name in SECRET_VARIABLES):
        if len(value) >= 8:
            text = text.replace(value, REDACTED)
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return text
