"""Remove secrets from text that is printed, logged or saved."""

from __future__ import annotations

import json
import os
import re
from urllib.parse import quote

REDACTED = "[redacted]"
# A variable whose name, or a part of it, ends so: COMET_API_KEY, AWS_ACCESS_KEY_ID, PGPASSWORD; not TOKENIZERS_...
NAMES = re.compile(r"(key|token|secret|passw(or)?d|passphrase|credential)s?(_|$)", re.IGNORECASE)
PLACES = ("_FILE", "_PATH", "_DIR", "_NAME")  # of variables that say where a secret is
SHORTEST = 8  # characters: a shorter value is not a secret and might be part of ordinary words
PATTERNS = (
    (r"\b(?:hf|api_org)_(?:[a-z]+_)?[A-Za-z0-9]{20,}", REDACTED),  # Hugging Face
    (r"\bsk-(?:[a-z0-9]+-)*\w{20,}[\w-]*", REDACTED),  # OpenAI, Anthropic
    (r"\b(?:gh[opsur]|github_pat)_\w{20,}", REDACTED),
    (r"\bgl[a-z]{2,5}-[\w-]{20,}", REDACTED),  # GitLab
    (r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b", REDACTED),  # AWS
    (r"\b(?:AIza|ya29\.|GOCSPX-)[\w-]{20,}", REDACTED),  # Google
    (r"\b(?:npm|wandb_v\d+|dop_v\d+|gsk|r8|nvapi|tgp_v\d+|dapi|shp[a-z]{2})[_-]\w[\w-]{19,}", REDACTED),
    (r"\bpypi-[\w-]{40,}", REDACTED),
    (r"\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}", REDACTED),  # Slack
    (r"(hooks\.slack\.com/services/)[\w/]+", rf"\1{REDACTED}"),
    (r"\b[srp]k_(?:live|test)_\w{16,}", REDACTED),  # Stripe
    (r"\bSG\.[\w-]{16,}\.[\w-]{16,}", REDACTED),  # SendGrid
    (r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*", REDACTED),  # JSON web token
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", REDACTED),
    (r"(?i)\b(bearer\s+)(?=\S*\d)[\w.~+/=-]{20,}", rf"\1{REDACTED}"),
    (r"(?i)((?:key|token|secret|passwd|password)=)(?=\S*\d)[\w.~+/-]{16,}=*", rf"\1{REDACTED}"),
    (r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/]+@", rf"\1{REDACTED}@"),  # user:password@host
)


def redact(text: str) -> str:
    """`text` with tokens, keys and passwords replaced by "[redacted]".

    They are recognized by their form, or as the value of an environment variable whose name says what it is; as it
    is, in JSON, or in a URL.
    """
    for value in _secrets():
        for form in (value, json.dumps(value)[1:-1], quote(value, safe="")):
            text = text.replace(form, REDACTED)
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return text


def _secrets() -> list[str]:
    """Secret values of the environment, the longest first, since one may be part of another."""
    named = (
        value.strip()
        for name, value in os.environ.items()
        if NAMES.search(name) and not name.upper().endswith(PLACES)
    )
    return sorted({value for value in named if len(value) >= SHORTEST}, key=len, reverse=True)
