"""A tokenizer as llama.cpp reads it: tokens by id, their kinds, merges or scores, and the splitter.

llama.cpp does not run `tokenizer.json`: it has its own code for each way of splitting text before
byte-pair merging, chosen by an id. The id is told from the splitter itself (its regular expression,
its order), not from what it makes of a sample text, so tokens added in training do not hide it. A
splitter llama.cpp has no code for is refused: the file would load and read text wrongly.
"""

import json
from pathlib import Path
from typing import Any

import gguf

from qlora_trainer.errors import UserError
from qlora_trainer.export.gguf_model import CONVERTER, NOT_AS_EXPECTED
from qlora_trainer.export.tokenizer_file import read_tokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    _LLAMA3: "llama-bpe",
    _LLAMA3.replace("{1,3}", ""): "qwen2",
    _TEKKEN: "tekken",
}
_SPACE = "\u2581"  # how SentencePiece writes a space


def splitter_id(pre_tokenizer: Any) -> str:
    """llama.cpp's `tokenizer.ggml.pre` for the `pre_tokenizer` of a byte-level `tokenizer.json`.

    Raises:
        UserError: llama.cpp has no such splitter that we know of.

    >>> splitter_id({"type": "ByteLevel", "use_regex": True})
    'gpt-2'
    """
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        if pattern in SPLITTERS:
            return SPLITTERS[pattern]
    raise UserError(
        "--format gguf: the tokenizer splits text in a way llama.cpp is not known to have "
        f"({', '.join(str(kind) for kind in kinds)}); export --format merged and {CONVERTER}"
    )


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without the one file a GGUF tokenizer is made from.

    Raises:
        UserError: There is no `tokenizer.json`; the message says what there is instead.
    """
    if (folder / "tokenizer.json").is_file():
        return
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            raise UserError(
                f"--format gguf: {folder} holds its tokenizer as SentencePiece only ({name}), "
                "which is not covered; write tokenizer.json with AutoTokenizer"
                ".from_pretrained(FOLDER).save_pretrained(FOLDER), or export --format merged "
                f"and {CONVERTER}"
            )
    raise UserError(
        f"--format gguf: {folder / 'tokenizer.json'} is missing; a GGUF file carries its tokenizer"
    )


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> str:
    """Write the tokenizer of a model folder; -> its splitter's id.

    Args:
        writer: Of the GGUF file.
        folder: With `tokenizer.json`.
        vocabulary: Rows of the embedding; ids without a token are filled up.

    Raises:
        UserError: There is no tokenizer, or one llama.cpp cannot run.
    """
    check_tokenizer(folder)
    content = read_tokenizer(folder / "tokenizer.json")
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(
            f"--format gguf: a {model['type']} tokenizer is not covered; export --format merged "
            f"and {CONVERTER}"
        )
    tokens, kinds = _tokens(content, vocabulary)
    from_pieces = bool(model.get("byte_fallback"))
    if from_pieces:
        pre = "default"
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, kinds, model))
        writer.add_add_space_prefix(_adds_space(content))
    else:
        pre = splitter_id(content.get("pre_tokenizer"))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    try:
        special = gguf.SpecialVocab(folder, load_merges=not from_pieces, n_vocab=vocabulary)
        special.add_to_gguf(writer)
    except NOT_AS_EXPECTED as error:
        raise UserError(
            f"--format gguf: {folder}: tokenizer.json or tokenizer_config.json names its special "
            f"tokens or merges in a way that is not understood ({error}); write them anew with "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from error
    return pre


def _tokens(content: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Tokens and their kinds by id."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    kinds = [int(gguf.TokenType.UNUSED)] * vocabulary
    unknown = content["model"].get("unk_token")
    from_pieces = bool(content["model"].get("byte_fallback"))
    for token, index in content["model"]["vocab"].items():
        if index >= vocabulary:
            raise UserError(
                f"--format gguf: token {token!r} has id {index}, the model has {vocabulary} rows; "
                "tokenizer and model do not belong together"
            )
        tokens[index] = token
        kinds[index] = int(gguf.TokenType.NORMAL)
        if from_pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[index] = int(gguf.TokenType.BYTE)
        elif from_pieces and token == unknown:
            kinds[index] = int(gguf.TokenType.UNKNOWN)
    for added in content.get("added_tokens") or ():
        index = added["id"]
        if index >= vocabulary or kinds[index] == int(gguf.TokenType.UNKNOWN):
            continue
        control = added.get("special") or _looks_special(added["content"])
        tokens[index] = added["content"] if control else added["content"].replace(_SPACE, " ")
        kinds[index] = int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
    return tokens, kinds


def _looks_special(token: str) -> bool:
    # Some models forget to mark their turn markers as special; as text they must never match.
    return (token.startswith("<|") and token.endswith("|>")) or token in ("<pad>", "<mask>")


def _scores(tokens: list[str], kinds: list[int], model: dict[str, Any]) -> list[float]:
    """Scores that make llama.cpp merge pieces in the order `merges` lists them.

    It joins the neighbours whose result scores highest, so a result's score is minus the place of
    the first merge that makes it.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    lowest = -float(len(ranks) + 1)
    normal = int(gguf.TokenType.NORMAL)
    return [
        (-float(ranks[token]) if token in ranks else lowest) if kind == normal else -1000.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether text gets a space in front, as Llama 2's does and Gemma's does not."""
    parts = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    prepends = '"Prepend"' in parts
    return prepends or '"prepend_scheme": "always"' in parts or '"prepend_scheme": "first"' in parts
