"""One measured training recipe of PEFT + bitsandbytes, run on weightless tensors.

Runs in a process of its own (`validate_memory.py` starts it): other people's library code must be
steered here, which the package never does. What is steered, and why:

- `Params4bit.to`: quantizes when it reaches the card; `meta` stands for the card here;
- `torch.nn.functional.softmax` from half precision to fp32: on CUDA one kernel without a copy of
  the input (aten/src/ATen/native/SoftMax.cpp), elsewhere cast first;
- loading: transformers' own loop, its loader threads reading weights ahead (`_ReadAhead`);
- `scaled_dot_product_attention`: the memory-efficient kernel the measurements pinned, with keys and
  values expanded to all heads first;
- `torch.cuda.empty_cache` inside `prepare_model_for_kbit_training` stays unheard (see `run_t4`).

Source of the recipe: scripts/measure.py of fitcheck-llm 0.3.1 (MIT), and the measurements' README.
"""

import heapq
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers import core_model_loading as loading
from transformers.modeling_utils import LoadStateDictConfig, get_total_byte_count
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_trainer.memory.attention import ANSWERS, attention_for
from qlora_trainer.memory.gpus import Gpu
from qlora_trainer.memory.log import EMPTY_CACHE, RESET_PEAK
from qlora_trainer.memory.simulate import Trace, simulate
from qlora_trainer.memory.tracker import AllocationTracker

MIB = 2**20
CARD = torch.device("meta")
GPUS = {
    "Tesla T4": Gpu("Tesla T4", (7, 5), 40),
    "A100": Gpu("A100", (8, 0), 108),
    "L40S": Gpu("L40S", (8, 9), 142),
}
DTYPES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Recipe:
    """What one measured row says, in plain values."""

    gpu: str
    model: dict[str, Any]  # values of the model's config, with `family`
    quantization: str
    double_quant: bool
    attention: str  # eager, sdpa (memory-efficient kernel)
    batch_size: int
    seq_len: int
    rank: int
    targets: tuple[str, ...]
    compute_dtype: str
    gradient_checkpointing: bool
    optimizer: str = "adamw"
    norm_dtype: str = "bfloat16"


# ---- the model -----------------------------------------------------------------------------------
def model_config(values: dict[str, Any], use_cache: bool = False) -> Any:
    """The transformers config of a row's architecture."""
    family = values["family"]
    config_class = getattr(transformers, f"{family}Config")
    known: dict[str, Any] = {
        "num_hidden_layers": values["num_layers"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_attention_heads": values["num_attention_heads"],
        "num_key_value_heads": values["num_kv_heads"],
        "head_dim": values["head_dim"],
        "vocab_size": values["vocab_size"],
        "tie_word_embeddings": values["tie_word_embeddings"],
        "max_position_embeddings": max(values.get("seq_len", 0), 4096),
        "use_cache": use_cache,
    }
    if family == "Phi3":
        known |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if "sliding_window" in values:
        known["sliding_window"] = values["sliding_window"]
    return config_class(**known)


def build_skeleton(config: Any, attention: str, dtype: torch.dtype) -> Any:
    """The architecture with no storage the tracker knows of."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


class _Slice:
    """Stands for a tensor in a safetensors file; read, it is born on the card."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, _index: Any) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=CARD)

    @property
    def mebibytes(self) -> float:
        return self.shape.numel() * self.dtype.itemsize / MIB

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[self.dtype]


def _fresh_on_card(tracker: AllocationTracker) -> Callable[[torch.Tensor], torch.Tensor]:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata in tracker._known:
            return tensor  # a tied weight is already there
        return torch.empty_like(tensor, device=CARD)

    return move


def load_whole_then_move(model: Any, tracker: AllocationTracker) -> Any:
    """`from_pretrained` on the CPU, then `.cuda()`: parameter by parameter, in module order."""
    return model._apply(_fresh_on_card(tracker))


def load_quantized(
    model: Any, tracker: AllocationTracker, dtype: torch.dtype, double_quant: bool
) -> Any:
    """`from_pretrained(quantization_config=..., device_map={"": 0})`, transformers' own order."""
    quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double_quant,
        ),
        pre_quantized=False,
    )
    with _disable_current_modes():  # the skeleton is not on the card yet
        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        device_map = {"": "meta"}
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=device_map)
        slices = {
            name: _Slice(value.shape, dtype)
            for name, value in model.state_dict().items()
            if name not in tied
        }
        expected = dict.fromkeys(model.state_dict(), CARD)
        warm_up = get_total_byte_count(model, expected, quantizer)[CARD]
    torch.empty(int(warm_up // 2), dtype=torch.float16, device=CARD)  # caching_allocator_warmup
    loading.convert_and_load_state_dict_in_model(
        model=model,
        state_dict=slices,
        load_config=LoadStateDictConfig(
            device_map=device_map, dtype=dtype, hf_quantizer=quantizer, weight_mapping=[]
        ),
    )
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.empty_like(getattr(module, name), device=CARD))
    model.tie_weights()
    quantizer.postprocess_model(model)
    return model


# ---- steering other people's code ----------------------------------------------------------------
def _steer_quantization() -> None:
    from bitsandbytes.nn import Params4bit

    plain_to = Params4bit.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == "meta" and not self.bnb_quantized:
            return self._quantize(device)
        return plain_to(self, *args, **kwargs)

    Params4bit.to = to


class _ReadAhead:
    """The loader's threads: while a weight is quantized, the next ones arrive.

    Inferred from the rows, not documented. Identical settings were measured with after-load sizes
    that differ (six TinyLlama rows: 1070.05 to 1077.55 MiB; two of SmolLM2-360M: 381.6 and 388.2),
    which weights loaded one by one cannot do, although transformers 5.17 says it loads them so when
    it quantizes. Several 16-bit weights were on the card at once, in an order that is chance. Here
    it is that of `workers` threads which each need time in proportion to a weight's bytes, and a
    tenth of that to quantize it: one order of the many that happen. No byte is fitted.
    """

    workers = 4  # core_model_loading.GLOBAL_WORKERS on a machine with at least four cores
    call_cost = 0.2  # of a read, in the time 1 MiB takes
    quantizing_cost = 0.1

    def __init__(self) -> None:
        self.waiting: list[tuple[_Slice, Any, Any]] = []
        self.arrived: dict[int, torch.Tensor] = {}
        self.ready: list[tuple[float, int]] = []  # (when, number), in order of time
        self.next, self.now = 0, 0.0

    def submit(self, tensor: _Slice, device: Any, dtype: Any) -> Callable[[], torch.Tensor]:
        number = len(self.waiting)
        self.waiting.append((tensor, device, dtype))
        return lambda: self.take(number)

    def take(self, number: int) -> torch.Tensor:
        if not self.ready:
            self.ready = self._schedule()
        self.now = max(self.now, next(when for when, each in self.ready if each == number))
        while self.next < len(self.ready) and self.ready[self.next][0] <= self.now:
            each = self.ready[self.next][1]
            self.arrived[each] = loading._materialize_copy(*self.waiting[each])
            self.next += 1
        tensor = self.waiting[number][0]
        if len(tensor.shape) == 2:
            self.now += self.quantizing_cost * tensor.mebibytes
        return self.arrived.pop(number)

    def _schedule(self) -> list[tuple[float, int]]:
        free = [0.0] * self.workers
        ready = []
        for number, (tensor, _device, _dtype) in enumerate(self.waiting):
            when = heapq.heappop(free) + self.call_cost + tensor.mebibytes
            ready.append((when, number))
            heapq.heappush(free, when)
        return sorted(ready)


def _steer_loading() -> None:
    ahead: list[_ReadAhead] = []
    plain = loading.convert_and_load_state_dict_in_model

    def convert(*args: Any, **kwargs: Any) -> Any:
        ahead.append(_ReadAhead())
        try:
            return plain(*args, **kwargs)
        finally:
            ahead.pop()

    def spawn(
        _pool: Any, tensor: _Slice, device: Any = None, dtype: Any = None, **_kwargs: Any
    ) -> Any:
        return ahead[-1].submit(tensor, device, dtype)

    loading.convert_and_load_state_dict_in_model = convert
    loading.spawn_materialize = spawn


def _steer_attention() -> None:
    plain_softmax = F.softmax

    def softmax(
        input: torch.Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if input.is_meta and input.dtype == torch.float16 and dtype == torch.float32:
            return torch.ops.aten._softmax(input, dim, True)
        return plain_softmax(input, dim, _stacklevel, dtype)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if key.size(-3) != query.size(-3):
            groups = query.size(-3) // key.size(-3)
            key = key.repeat_interleave(groups, dim=-3)
            value = value.repeat_interleave(groups, dim=-3)
        needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
        if attn_mask is not None:
            attn_mask = _bias_of(attn_mask, query)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            attn_mask,
            torch.is_grad_enabled() and needs_grad,
            dropout_p,
            is_causal,
            scale=scale,
        )[0]

    F.softmax = softmax
    F.scaled_dot_product_attention = attention


def _bias_of(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A boolean mask becomes a padded additive one (convert_boolean_attn_mask, pad_bias)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -1e9)
    size = mask.shape[-1]
    if size % 16:
        mask = F.pad(mask, (0, 16 - size % 16))[..., :size]
    return mask.expand(query.shape[0], query.shape[1], -1, -1)


def steer() -> None:
    """Turn the libraries of this process into what they are on the card; once, for its lifetime."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    _steer_quantization()
    _steer_loading()
    _steer_attention()


# ---- the recipe ----------------------------------------------------------------------------------
def run_t4(recipe: Recipe) -> Trace:
    """measure.py of fitcheck-llm, line by line."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    dtype = DTYPES[recipe.compute_dtype]
    skeleton = build_skeleton(
        model_config(recipe.model | {"seq_len": recipe.seq_len}), recipe.attention, dtype
    )

    def program(tracker: AllocationTracker) -> None:
        tracker.set_phase("load")
        with tracker.component("base weights"):
            if recipe.quantization == "nf4":
                model = load_quantized(skeleton, tracker, dtype, recipe.double_quant)
            else:
                model = load_whole_then_move(skeleton, tracker)
            model.config.use_cache = False
            if recipe.quantization != "none":
                # PEFT 0.20 empties the cache in here, and the measured runs kept what loading had
                # reserved: inferred from the rows, not documented. The four NF4 rows of
                # SmolLM2-135M come out within 2 MiB if the loader's warm-up segment and four of
                # 20 MiB outlive this call, and 14 to 66 MiB too low if they do not.
                model = prepare_model_for_kbit_training(
                    model, use_gradient_checkpointing=recipe.gradient_checkpointing
                )
        with tracker.component("adapters"):
            model = get_peft_model(
                model,
                LoraConfig(
                    r=recipe.rank,
                    lora_alpha=2 * recipe.rank,
                    lora_dropout=0.0,
                    bias="none",
                    task_type="CAUSAL_LM",
                    target_modules=list(recipe.targets),
                ),
            )
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.enable_input_require_grads()
        model.train()
        tracker.set_phase("setup")
        optimizer, batch = _prepare(model, recipe)
        _train(model, optimizer, batch, tracker)

    return simulate(program, GPUS[recipe.gpu], answers=ANSWERS)


def _prepare(model: Any, recipe: Recipe) -> tuple[Any, torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    # foreach is what torch.optim chooses by itself on CUDA
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    batch = torch.empty((recipe.batch_size, recipe.seq_len), dtype=torch.int64, device=CARD)
    return optimizer, batch


def _train(model: Any, optimizer: Any, batch: torch.Tensor, tracker: AllocationTracker) -> None:
    def step(name: str) -> None:
        tracker.set_phase(f"{name} zero_grad")
        optimizer.zero_grad(set_to_none=True)
        tracker.set_phase(f"{name} forward")
        out = model(input_ids=batch, labels=batch)
        tracker.set_phase(f"{name} backward")
        out.loss.backward()
        tracker.set_phase(f"{name} optimizer")
        optimizer.step()

    step("warm-up")
    tracker.set_phase("between")
    tracker.mark(RESET_PEAK)
    step("measured")
    tracker.set_phase("after")
    step("phased")


# ---- two other published recipes -----------------------------------------------------------
def _loss_of_transformers_4(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_kwargs: Any
) -> torch.Tensor:
    """Transformers 4.48: logits cast to fp32, then shifted into a copy (loss/loss_utils.py)."""
    wide = logits.float()
    shifted = wide[..., :-1, :].contiguous()
    targets = labels[..., 1:].contiguous()
    return F.cross_entropy(shifted.view(-1, vocab_size), targets.view(-1), ignore_index=-100)


def run_a100(recipe: Recipe) -> Trace:
    """fms-acceleration's benchmark: Hugging Face Trainer, bf16 autocast, flash attention 2.

    `meta` has no autocast: the head's input is cast to its weight's dtype as autocast would; what
    autocast does inside a layer does not reach the peak, which the logits make.
    """
    from peft import get_peft_model

    gpu = GPUS[recipe.gpu]
    flash = attention_for(gpu)
    skeleton = build_skeleton(
        model_config(recipe.model | {"seq_len": recipe.seq_len}), flash, torch.bfloat16
    )

    def program(tracker: AllocationTracker) -> None:
        tracker.set_phase("load")
        with tracker.component("base weights"):
            if recipe.quantization == "nf4":
                model = load_quantized(skeleton, tracker, torch.bfloat16, recipe.double_quant)
            else:
                model = load_whole_then_move(skeleton, tracker)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if recipe.norm_dtype == "float32":
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.data = parameter.data.float()
        model.lm_head.register_forward_pre_hook(
            lambda module, inputs: (inputs[0].to(module.weight.dtype),)
        )
        model.loss_function = _loss_of_transformers_4
        with tracker.component("adapters"):
            model = get_peft_model(model, _lora(recipe))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
        tracker.set_phase("setup")
        _trainer_steps(model, recipe, tracker, mask=False)

    return simulate(program, gpu, answers=ANSWERS)


def run_l40s(recipe: Recipe) -> Trace:
    """PEFT's method comparison: bf16 base, fp32 adapters, padded batches, nothing recomputed.

    Two steps make the optimizer's states; the cache is emptied just before the longest batch.
    """
    from peft import get_peft_model

    skeleton = build_skeleton(
        model_config(recipe.model | {"seq_len": recipe.seq_len}, use_cache=True),
        attention_for(GPUS[recipe.gpu]),
        torch.bfloat16,
    )

    def program(tracker: AllocationTracker) -> None:
        tracker.set_phase("load")
        with tracker.component("base weights"):
            model = load_whole_then_move(skeleton, tracker)
        with tracker.component("adapters"):
            model = get_peft_model(model, _lora(recipe))
        model.train()
        tracker.set_phase("setup")
        _trainer_steps(model, recipe, tracker, mask=True)

    return simulate(program, GPUS[recipe.gpu], answers=ANSWERS)


def _lora(recipe: Recipe) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=list(recipe.targets),
    )


def _trainer_steps(model: Any, recipe: Recipe, tracker: AllocationTracker, *, mask: bool) -> None:
    """Steps of a loop that keeps the loss only, clips, and updates."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True
    )

    def step(name: str, tokens: int) -> None:
        size = (recipe.batch_size, tokens)
        batch = {
            key: torch.empty(size, dtype=torch.int64, device=CARD)
            for key in ("input_ids", "labels", "attention_mask")
        }
        given = dict(batch)
        if not mask:  # packed: the mask is on the card and says nothing
            given.pop("attention_mask")
        tracker.set_phase(f"{name} forward")
        loss = model(**given).loss
        tracker.set_phase(f"{name} backward")
        loss.backward()
        del loss
        tracker.set_phase(f"{name} optimizer")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tracker.set_phase(f"{name} steady")

    step("warm-up", recipe.seq_len if not mask else 64)
    if mask:
        tracker.mark(EMPTY_CACHE)
    tracker.mark(RESET_PEAK)
    step("measured", recipe.seq_len)
    step("phased", recipe.seq_len)


RECIPES = {"t4": run_t4, "a100": run_a100, "l40s": run_l40s}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Simulate one recipe and replay it at a capacity."""
    recipe = Recipe(**request["recipe"])
    trace = RECIPES[request.get("kind", "t4")](recipe)
    peaks = trace.replay(request.get("capacity_bytes"))
    return {
        "allocated": peaks.allocated_bytes,
        "reserved": peaks.reserved_bytes,
        "after_load": peaks.after_phase["load"],
        "forward": peaks.allocated_by_phase["phased forward"],
        "backward": peaks.allocated_by_phase["phased backward"],
        "optimizer": peaks.allocated_by_phase["phased optimizer"],
        "steady": peaks.after_phase.get("measured steady"),
        "by_component": peaks.by_component,
        "reserved_by_phase": peaks.reserved_by_phase,
        "peak_phase": peaks.peak_phase,
        "kernels": trace.log.kernels,
        "retries": peaks.retries,
        "fits": peaks.fits,
    }


def main() -> None:
    """Read recipes as lines of JSON on stdin, write what the replays found as lines on stdout."""
    replies = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    steer()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
