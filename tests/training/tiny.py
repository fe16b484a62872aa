"""A tiny random Llama with real adapters, batches of made-up tokens, and a run around them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.log import RunLog
from qlora_trainer.training.optimizer import AdapterAdamW, OptimizerKind
from qlora_trainer.training.plan import Run
from qlora_trainer.training.windows import Windows

CPU = torch.device("cpu")
VOCABULARY = 211


def tiny_llama(dtype: torch.dtype = torch.float32, *, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted_llama(
    dtype: torch.dtype = torch.float32,
    *,
    adapter_dtype: torch.dtype | None = None,
    layers: int = 2,
    dropout: float = 0.0,
    rank: int = 4,
    **spec: Any,
) -> LlamaForCausalLM:
    model = tiny_llama(dtype, layers=layers)
    adapter = AdapterSpec(rank=rank, alpha=2.0 * rank, dropout=dropout, **spec)
    inject_adapter(model, adapter, dtype=adapter_dtype or dtype, seed=3)
    return model


def batch(rows: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Rows in which every next token is the last one plus 3, a different share of them trained."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    input_ids = (first + 3 * torch.arange(tokens)) % VOCABULARY
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : int(torch.randint(1, tokens - 2, (1,), generator=generator))] = -100
    return {"input_ids": input_ids, "labels": labels}


class Epoch:
    """Micro-batches that are a pure function of epoch and number."""

    def __init__(self, epoch: int, count: int, rows: int, tokens: int = 10) -> None:
        self.epoch, self.count, self.rows, self.tokens = epoch, count, rows, tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return batch(self.rows, self.tokens, 1000 * self.epoch + index)


def optimizer_for(
    model: torch.nn.Module, kind: OptimizerKind = "paged_adamw_32bit", **settings: Any
) -> AdapterAdamW:
    return AdapterAdamW(adapter_parameters(model), kind=kind, **settings)


def make_run(
    folder: Path,
    model: torch.nn.Module,
    *,
    total_steps: int,
    kind: OptimizerKind = "paged_adamw_32bit",
    rows: int = 2,
    count: int = 7,
    accumulation: int = 2,
    lines: list[str] | None = None,
    identity: dict[str, Any] | None = None,
    **parts: Any,
) -> Run:
    """A run over `count` micro-batches an epoch; what it says is appended to `lines`."""

    def save_adapter(path: Path) -> None:
        tensors = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
        torch.save(tensors, path / "adapter.pt")

    log = RunLog(
        folder / "metrics.jsonl", total_steps=total_steps, console=_console(lines), device=CPU
    )
    return Run(
        model=model,
        task=CausalLM.for_model(model),
        optimizer=optimizer_for(model, kind),
        windows=Windows(lambda epoch: Epoch(epoch, count, rows), accumulation),
        device=CPU,
        folder=folder,
        save_adapter=save_adapter,
        identity=identity or {"data_fingerprint": "tiny"},
        log=log,
        **parts,
    )


def after_step(run: Run, step: int, act: Callable[[], None]) -> None:
    """Have something happen to the run from outside, once a step (counted from 1) is applied."""
    log = run.log.step

    def then(values: Any, counts_left: Any) -> None:
        log(values, counts_left)
        if values["step"] == step:
            act()

    run.log.step = then  # type: ignore[method-assign]


def held_out(before: Callable[[], None] | None = None) -> Callable[[], list[dict[str, Tensor]]]:
    """Held-out batches; `before` is called as each evaluation begins."""

    def begin() -> list[dict[str, Tensor]]:
        if before is not None:
            before()
        return [batch(3, 10, 90_000 + index) for index in range(2)]

    return begin


def _console(lines: list[str] | None) -> Console:
    class Sink:
        def write(self, text: str) -> int:
            if lines is not None and text.strip():
                lines.append(text.strip())
            return len(text)

        def flush(self) -> None:
            pass

    return Console(file=Sink(), width=1000, soft_wrap=True)  # type: ignore[arg-type]


def trained_values(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
