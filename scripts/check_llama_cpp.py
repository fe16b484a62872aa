"""Open an exported GGUF file with the real llama.cpp and compare it with plain transformers.

    pip install llama-cpp-python
    qlora export RUN_DIR --out merged --format merged
    qlora export RUN_DIR --out gguf --format gguf
    python scripts/check_llama_cpp.py gguf/MODEL-f16.gguf merged --json FILE

Outside CI, since llama.cpp is compiled while it is installed. Two questions, each on as many texts
as asked for: does llama.cpp's own tokenizer give the token ids transformers gives, and are the
greedy answers the same tokens? Texts are made of our own paragraphs: whole, cut at odd places, with
digits, spaces, line ends and other scripts around them. Where two tokens are nearly as likely,
rounding alone may part two greedy answers: of every parting the gap between the two logits is told.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EDGES = ("", " ", "  \n", "12345 ", "\t", "naïve café ", "日本語 ", "😀 ", "x=1;\r\n", "...")


def texts(count: int) -> list[str]:
    """Distinct texts."""
    from qlora_trainer.export.builtin import TEXTS

    made = []
    for number in range(count):
        text, edge = TEXTS[number % len(TEXTS)], EDGES[number // len(TEXTS) % len(EDGES)]
        start = number * 7 % 40
        made.append(edge + text[start : start + 40 + number * 13 % 300])
    return made


def compare(gguf: Path, merged: Path, count: int, new_tokens: int) -> dict[str, Any]:
    """Count texts with the same ids, and with the same greedy answers."""
    import llama_cpp
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    other = llama_cpp.Llama(str(gguf), n_ctx=1024, verbose=False)
    found: dict[str, Any] = {
        "gguf": gguf.name, "llama_cpp_python": llama_cpp.__version__,
        "transformers": transformers.__version__, "torch": torch.__version__, "texts": count,
        "new_tokens": new_tokens, "same_ids": 0, "same_answers": 0, "other_ids": [], "partings": [],
    }  # fmt: skip
    for text in texts(count):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = other.tokenize(text.encode(), add_bos=False, special=True)
        if ids == theirs:
            found["same_ids"] += 1
        else:
            found["other_ids"].append(text)
            continue
        with torch.no_grad():
            answer = model.generate(
                torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False,
                eos_token_id=-1, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        ours = answer.sequences[0, len(ids) :].tolist()
        stream = other.generate(ids, temp=0.0, repeat_penalty=1.0)
        said = [next(stream) for _ in range(new_tokens)]
        other.reset()
        if ours == said:
            found["same_answers"] += 1
            continue
        place = next(
            at for at, pair in enumerate(zip(ours, said, strict=True)) if len(set(pair)) > 1
        )
        logits = answer.logits[place][0]
        gap = float(logits[ours[place]] - logits[said[place]])
        found["partings"].append({"text": text, "token": place, "logit_gap": round(gap, 4)})
    return found


def main() -> int:
    """Compare, print, and fail where an id, or an answer for no near tie, differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("merged", type=Path, help="the merged folder of the same adapter")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--near-tie", type=float, default=0.05, help="logit gap rounding explains")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    try:
        found = compare(given.gguf, given.merged, given.texts, given.new_tokens)
    except ModuleNotFoundError as error:
        print(f"needs {error.name}: pip install llama-cpp-python", file=sys.stderr)
        return 2
    print(f"same token ids: {found['same_ids']} of {found['texts']}")
    print(f"same greedy answers: {found['same_answers']} of {found['same_ids']}")
    for parting in found["partings"]:
        print(f"  parted at token {parting['token']}, logit gap {parting['logit_gap']}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
    far = [p for p in found["partings"] if p["logit_gap"] > given.near_tie]
    return 1 if far or found["other_ids"] else 0


if __name__ == "__main__":
    sys.exit(main())
