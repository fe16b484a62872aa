"""An Ollama `Modelfile` for a GGUF file, and the line that makes a K-quantized one of it.

Ollama writes templates in Go, not Jinja. For the chat formats most models use the Go text stands
here; for any other the file says so, and Ollama falls back to what it recognises in the GGUF file.
Where the Jinja template puts in a system message of its own (SmolLM2's, Qwen2.5's), training saw it
in every conversation without one, so the file sets it too.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

_CHATML = (
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
    "{{ end }}<|im_start|>assistant\n"
)
_LLAMA3 = (
    "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
    "{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_GEMMA = (
    '{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}'
    "\n{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n"
)
_MISTRAL = (
    '{{- range .Messages }}{{ if eq .Role "assistant" }} {{ .Content }}</s>'
    "{{ else }}[INST] {{ .Content }} [/INST]{{ end }}{{ end }}"
)
# What marks a format in its Jinja template -> the Go template and where an answer ends.
FORMATS = (
    ("<|im_start|>", _CHATML, "<|im_end|>"),
    ("<|start_header_id|>", _LLAMA3, "<|eot_id|>"),
    ("<start_of_turn>", _GEMMA, "<end_of_turn>"),
    ("[INST]", _MISTRAL, "</s>"),
)

# What a template's own expressions may raise.
_REFUSALS = (TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError)


def modelfile(gguf_name: str, chat_template: str | None) -> str:
    """The text of a `Modelfile` beside a GGUF file.

    Args:
        gguf_name: The file's name.
        chat_template: In Jinja, as `read_chat_template` gives it.

    >>> print(modelfile("m.gguf", None))
    # ollama create NAME -f Modelfile
    FROM ./m.gguf
    <BLANKLINE>
    """
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{gguf_name}"]
    known = [entry for entry in FORMATS if chat_template and entry[0] in chat_template]
    if known:
        _, template, stop = known[0]
        lines += [f'TEMPLATE """{template}"""', f'PARAMETER stop "{stop}"']
        system = own_system_message(str(chat_template))
        lines += [f'SYSTEM """{system}"""'] if system and '"""' not in system else []
    elif chat_template:
        lines.append("# The chat template in the GGUF file is of a format Ollama may not know;")
        lines.append("# write TEMPLATE here if answers look wrong.")
    return "\n".join([*lines, ""])


def own_system_message(chat_template: str) -> str:
    r"""What a ChatML template says as the system to a conversation without one; "" if nothing.

    >>> own_system_message("{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}")
    'Be kind.'
    """
    try:
        rendered = render_jinja_template(
            [[{"role": "user", "content": ""}]], chat_template=chat_template
        )[0][0]
    except _REFUSALS:  # it wants tools, a date or other roles
        return ""
    head, found, rest = rendered.partition("<|im_start|>system\n")
    return rest.partition("<|im_end|>")[0] if found and not head else ""


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a model folder, or None."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return None
    template: Any = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None


def quantize_line(model_name: str) -> str:
    """The command that makes the Q4_K_M file most people run, from the f16 file of a model.

    llama-quantize refuses files of 8 or 4 bits: what they lost does not come back.

    >>> quantize_line("m")
    'llama-quantize m-f16.gguf m-Q4_K_M.gguf Q4_K_M'
    """
    return f"llama-quantize {model_name}-f16.gguf {model_name}-Q4_K_M.gguf Q4_K_M"
