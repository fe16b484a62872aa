"""The exports' tables: the proof, and the merge's time and memory."""

from __future__ import annotations

from tables.common import markdown, result


def export_proof() -> str:
    """Both ways of merging against base + adapter, of a trained run."""
    found = result("export")["proof"]
    shown = (
        ("perplexity of base + adapter", "reference_perplexity", "{:.4f}"),
        ("perplexity of the export", "export_perplexity", "{:.4f}"),
        ("mean KL divergence (nats)", "mean_kl", "{:.2e}"),
        ("same most likely token", "top1_agreement", "{:.2%}"),
        ("relative difference of logits", "relative_difference", "{:.1e}"),
    )
    columns = {
        f"onto {way}, {precision}": figures
        for way, part in found["ways"].items()
        for precision, figures in part.items()
    }
    rows = [[label, *(form.format(f[key]) for f in columns.values())] for label, key, form in shown]
    rows_of = found["rows"]
    return (
        f"{markdown(['', *columns], rows)}\n\n{found['base']['name']} with its rank "
        f"{found['adapter']['rank']} adapter, merged in {found['dtype']}; "
        f"{rows_of['positions']} positions of {rows_of['from']}, in a new process with plain "
        f"transformers {found['transformers']}. Native: base + adapter as trained, the export as "
        f"written. fp32: both sides compute in fp32. `--onto best` kept {found['kept']}. "
        f"{_in_llama_cpp()}"
    )


def _in_llama_cpp() -> str:
    """What llama.cpp made of the same adapter's GGUF file."""
    found = result("llama_cpp")
    said = (
        f"The GGUF file of a quickstart's run, opened in llama.cpp (llama-cpp-python "
        f"{found['llama_cpp_python']}, `scripts/check_llama_cpp.py`): the same token ids for "
        f"{found['same_ids']} of {found['texts']} texts, the same greedy answers of "
        f"{found['new_tokens']} tokens for {found['same_answers']} of {found['same_ids']}"
    )
    if partings := found["partings"]:
        widest = max(parting["logit_gap"] for parting in partings)
        said += f"; where they part, the two tokens' logits are at most {widest} apart"
    return f"{said}."


def export_speed() -> str:
    """Time and memory of a merge beside copying the files and PEFT's merge."""
    found = result("export")
    names = {
        "copy": "copying the files",
        "original": "merging onto original",
        "dequantized": "merging onto dequantized",
        "peft": "PEFT merge_and_unload, saved",
    }
    rows, busy, several = [], [], False
    for size in ("1.1b", "7b"):
        jobs = found.get(size, {}).get("jobs", {})
        for job, label in names.items():
            if job in jobs:
                part = jobs[job]
                others = sorted(part.get("seconds_of_rounds", ()))[1:]
                several = several or bool(others)
                slower = f" ({', '.join(f'{seconds:.1f}' for seconds in others)})" if others else ""
                rows.append(
                    [
                        f"{size.upper()}: {label}",
                        f"{part['seconds']:.1f} s{slower}",
                        f"{part['seconds'] / jobs['copy']['seconds']:.2f}",
                        f"{part['peak_private_bytes'] / 10**6:,.0f} MB",
                    ]
                )
                if "cores_busy_elsewhere" in part:
                    busy.append(part["cores_busy_elsewhere"])
    head = ["", "time", "over copying", "memory over the imports"]
    said = (
        "fp16 from bf16, rank 16 on every linear layer, random weights; each job in a fresh "
        "process, the base's files out of the page cache before it, its own forced to disk after "
        "it."
    )
    if several:
        said += " Of several rounds the fastest, in brackets the others."
    if busy:
        said += (
            " Other work, the system's own threads among it, kept "
            f"{min(busy):.1f} to {max(busy):.1f} of the cores busy where that was measured."
        )
    return f"{markdown(head, rows)}\n\n{said}"
