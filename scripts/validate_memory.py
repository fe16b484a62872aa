"""wip"""

import csv, json, subprocess, sys, os, time
from concurrent.futures import ThreadPoolExecutor

MIB = 2**20
FAM = [
    ("qwen2", "Qwen2"),
    ("qwen3", "Qwen3"),
    ("mistral", "Mistral"),
    ("gemma-2", "Gemma2"),
    ("gemma", "Gemma"),
    ("phi-3", "Phi3"),
]


def family(mid):
    low = mid.lower()
    for k, v in FAM:
        if k in low:
            return v
    return "Llama"


def recipe(row):
    i = lambda k: int(row[k])
    model = {
        "family": family(row["model_id"]),
        "num_layers": i("num_layers"),
        "hidden_size": i("hidden_size"),
        "intermediate_size": i("intermediate_size"),
        "num_attention_heads": i("num_attention_heads"),
        "num_kv_heads": i("num_kv_heads"),
        "head_dim": i("head_dim"),
        "vocab_size": i("vocab_size"),
        "tie_word_embeddings": row["tie_word_embeddings"] == "True",
    }
    return dict(
        gpu="Tesla T4",
        model=model,
        quantization=row["quantization"],
        double_quant=row["double_quant"] == "True",
        attention=row["attn"],
        batch_size=i("batch_size"),
        seq_len=i("seq_len"),
        rank=i("lora_rank"),
        targets=row["lora_targets"].split("+"),
        compute_dtype=row["compute_dtype"],
        gradient_checkpointing=row["gradient_checkpointing"] == "True",
    )


import threading, queue
local=threading.local()
def one(row):
    t=time.time()
    if not hasattr(local,"p"):
        local.p=subprocess.Popen([sys.executable,os.path.join(os.path.dirname(os.path.abspath(__file__)),"peft_recipe.py")],stdin=subprocess.PIPE,stdout=subprocess.PIPE,text=True)
    local.p.stdin.write(json.dumps({"recipe":recipe(row),"capacity_bytes":int((14912-140.875)*MIB),"dump":os.environ.get("DUMP") and "%s/%d.pkl"%(os.environ["DUMP"],row["_i"])})+"\n"); local.p.stdin.flush()
    a=json.loads(local.p.stdout.readline()); a["s"]=time.time()-t
    return a
if __name__ == "__main__":
    rows = list(csv.DictReader(open(sys.argv[1])))
    for n, r in enumerate(rows):
        r["_i"] = n
    sel = [int(x) for x in sys.argv[2].split(",")] if len(sys.argv) > 2 else range(len(rows))
    keys = [
        ("after_load", "after_load_allocated_mib"),
        ("forward", "peak_forward_mib"),
        ("backward", "peak_backward_mib"),
        ("optimizer", "peak_optimizer_mib"),
        ("allocated", "peak_allocated_mib"),
        ("reserved", "peak_reserved_mib"),
    ]
    with ThreadPoolExecutor(2) as ex:
        outs = list(ex.map(one, [rows[i] for i in sel]))
    sums = {k: [] for k, _ in keys}
    for i, a in zip(sel, outs):
        r = rows[i]
        line = []
        for k, c in keys:
            e = a[k] / MIB / float(r[c]) - 1
            sums[k].append(e)
            line.append(f"{k[:6]} {100 * e:+.3f}%")
        print(
            i,
            r["model_id"].split("/")[-1][:16],
            r["quantization"],
            r["attn"],
            r["batch_size"],
            r["seq_len"],
            " ".join(line),
            f"retries {a['retries']} {a['s']:.0f}s",
        )
    for k, v in sums.items():
        print(
            k,
            "mean abs %.3f%% worst %.3f%% under %.3f%%"
            % (100 * sum(map(abs, v)) / len(v), 100 * max(map(abs, v)), 100 * min(v)),
        )
    json.dump(outs, open("/tmp/outs.json", "w"))
