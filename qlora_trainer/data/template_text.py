"""Where a chat template's text comes from, and what it must not depend on."""

import re
from datetime import date
from pathlib import Path
from typing import Any

from qlora_trainer.errors import UserError

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}

# Llama 3's template writes today's date; the same rows must give the same tokens tomorrow.
_FIXED_DATE = date(2024, 7, 26)


def with_fixed_date(template: str) -> str:
    """The template with every `strftime_now(...)` written out for one fixed day."""

    def written(match: re.Match[str]) -> str:
        try:
            return repr(_FIXED_DATE.strftime(match.group(2)))
        except ValueError:  # no format of a date: the template is refused when it is rendered
            return match.group(0)

    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", written, template)


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the text of every special token, the longest first."""
    specials = {str(token) for token in tokenizer.all_special_tokens}
    specials |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    by_length = sorted(specials - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")


def choose_template(tokenizer: Any, template: str | None) -> str | None:
    """The template's text: a built-in name, a file, or else the tokenizer's own (None without).

    Raises:
        UserError: The name is neither built in nor a file that can be read.
    """
    if template is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        return own
    if template in BUILT_IN:
        return BUILT_IN[template]
    path = Path(template).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model.chat_template = {template!r}: cannot be read as UTF-8 text ({error})"
            ) from error
    raise UserError(
        f"model.chat_template = {template!r}: neither a built-in name ({', '.join(BUILT_IN)}) "
        "nor a file"
    )
