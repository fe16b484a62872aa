"""The run file: every setting declared once, with its default, its range and one line of help.

The command line, the JSON Schema, the commented run file of `qlora init` and the README's table
are all made from these declarations. Values are strict: YAML already gives numbers and booleans
their types, so a quoted number is a mistake and not something to guess about.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from qlora_trainer.config.adapter import AdapterSettings
from qlora_trainer.config.kinds import (
    Device,
    Names,
    Size,
    Text,
    without_doubles,
)
from qlora_trainer.config.section import Settings
from qlora_trainer.config.tasks import TaskName, TaskSettings

Format = Literal["auto", "text", "prompt-completion", "alpaca", "messages", "sharegpt"]


class ModelSettings(Settings):
    """The frozen base: where it comes from and in which precision it is held."""

    source: Text = Field(description="local folder or hub name of the base model")
    revision: Text | None = Field(
        None, description="hub branch, tag or commit; the commit found is recorded"
    )
    trust_remote_code: bool = Field(False, description="run Python code shipped with the model")
    quantization: Literal["nf4", "none"] = Field("nf4", description="how linear weights are held")
    double_quant: bool = Field(True, description="quantize NF4's scales too: 0.37 bits a weight")
    block_size: Literal[64, 128, 256, 512] = Field(64, description="weights that share one scale")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="auto: bf16 where the device has it natively, otherwise fp16 on a GPU and fp32 "
        "on a CPU",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="attention kernel; auto: the model's best without extra packages, on a CPU "
        "causal attention in tiles of queries where they win",
    )
    chat_template: Text | None = Field(
        None,
        description="chatml, alpaca or a Jinja file, for a model that has no template of its own",
    )
    chat_template_kwargs: dict[Text, bool | int | float | str] = Field(
        {}, description="variables of the chat template, such as {enable_thinking: false}"
    )
    keep_unquantized: Names = Field([], description="names of further modules to hold in 16 bit")
    device: Device = Field("auto", description="auto takes the first GPU")
    embeddings_on_host: bool = Field(
        False, description="leave the token embeddings in host memory; lossless, a look-up"
    )
    head_on_host: bool = Field(
        False,
        description="leave the output head in host memory, on the card for the loss; lossless",
    )
    head_bits: Literal[16, 8, 4] = Field(
        16, description="how the frozen output head is held; 8: int8 by rows, 4: NF4"
    )
    quantized_cache: Text | None = Field(
        None, description="folder in which quantized copies of bases are kept; null: none"
    )
    stream_layers: bool = Field(
        False, description="hold the layers in host memory, one on the card and one on its way"
    )
    shard_layers: bool = Field(
        False, description="several processes share the layers, each holds its part of all (FSDP)"
    )


class SourceSettings(Settings):
    """One source of records."""

    path: Text = Field(description="file, folder or hub data set")
    format: Format = Field("auto", description="recognised from the first records unless set")
    split: Text | None = Field(None, description="split of a data set, for example train")
    name: Text | None = Field(None, description="configuration of a data set")
    revision: Text | None = Field(None, description="hub branch, tag or commit of a data set")
    weight: float = Field(1.0, gt=0, le=100, description="0.5 takes half the rows, 2 each twice")
    columns: dict[Text, Text] = Field({}, description="field name we expect: column name you have")


def _as_sources(value: object) -> object:
    """Accept one path, one mapping or a list of either; nothing at all stays nothing."""
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in listed]


def _none_as_empty(value: object) -> object:
    return [] if value is None else value


Sources = Annotated[list[SourceSettings], BeforeValidator(_as_sources)]


class DataSettings(Settings):
    """Records, and how they become examples."""

    train: Sources = Field(min_length=1, description="training data: a path, or a list of sources")
    eval: Annotated[Sources, BeforeValidator(_none_as_empty)] = Field(
        [], description="evaluation data: a path, or a list of sources"
    )
    eval_fraction: float = Field(
        0.0, ge=0, le=0.5, description="share of the training rows held out where eval is not given"
    )
    max_seq_len: int = Field(1024, ge=8, description="longest example, in tokens")
    over_length: Literal["raise", "truncate", "drop"] = Field(
        "raise", description="what to do with longer examples"
    )
    packing: bool = Field(
        False, description="several examples in one sequence; they never see each other"
    )
    mask_free_packing: bool = Field(
        True, description="packed examples attend one by one; false: a mask over the whole row"
    )
    group_by_length: bool = Field(True, description="without packing, batch like lengths together")
    mega_batch_mult: int | None = Field(
        None, ge=1, description="group_by_length sorts so many micro-batches at once; null: all"
    )
    loss_on: Literal["assistant", "last", "completion", "all"] = Field(
        "assistant", description="which tokens are learned"
    )
    cache_folder: Text | None = Field(
        None, description="encoded rows are kept here; null: ~/.cache/qlora_trainer"
    )


class TrainSettings(Settings):
    """The optimization."""

    epochs: int = Field(1, ge=1, le=1000, description="passes over the training data")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after so many optimizer steps, whatever epochs says"
    )
    micro_batch_size: int = Field(1, ge=1, le=4096, description="sequences per forward pass")
    gradient_accumulation_steps: int = Field(
        8, ge=1, le=65536, description="forward passes per optimizer step"
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls after warm-up"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps that warm up")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="warm-up in steps; takes the place of warmup_ratio"
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled weight decay")
    max_grad_norm: float = Field(
        1.0, ge=0, description="gradients are clipped to this norm; 0 does not clip"
    )
    optimizer: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw"] = Field(
        "paged_adamw_32bit", description="AdamW, and where its states are held"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    activations: Literal["recompute", "keep", "offload", "auto"] = Field(
        "recompute",
        description="of decoder layers; recompute: gradient checkpointing; offload: their inputs "
        "wait in host memory besides; auto: as little of both as memory asks for",
    )
    fused_linear: bool = Field(
        True,
        description="an adapter and its linear base as one function; false: torch's own operators",
    )
    fused_mlp: bool = Field(
        False, description="gate, up, activation and down as one function that keeps its input only"
    )
    mlp_tile_tokens: Annotated[int, Field(ge=16)] | None = Field(
        None, description="tokens the fused MLP computes at one time; null: all"
    )
    mlp_keeps_inner: bool = Field(
        False,
        description="the fused MLP keeps what gate and up give, in layers that keep activations: "
        "faster, for two tensors of the MLP's width a layer",
    )
    attention_keeps_probabilities: bool = Field(
        False,
        description="attention in tiles, as on a CPU, keeps its probabilities, in layers that keep "
        "activations: faster, for heads x tokens^2 / 2 numbers a layer",
    )
    fused_qkv: bool = Field(
        False,
        description="an attention's q, k and v as one function, rotary embedding as another",
    )
    tiled_norms: bool = Field(
        False, description="RMSNorms in tiles, without fp32 copies of the residual stream"
    )
    compile: bool = Field(
        False,
        description="norms and MLPs through torch.compile; no faster on a CPU, untried on a GPU",
    )
    chunked_loss: bool = Field(
        True, description="logits of trained tokens only, a chunk at a time; false: all at once"
    )
    loss_chunk_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="trained tokens whose logits exist at one time; null: about 64 MiB, on a GPU "
        "with activations: auto what memory is left for",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each target spread over the vocabulary"
    )
    z_loss: float = Field(
        0.0, ge=0, le=1, description="factor of the squared log-sum-exp of each token's logits"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="of the adapter, the order and dropout")


class EvaluationSettings(Settings):
    """Held-out metrics during training, and what follows from them."""

    every_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="evaluate every N steps; always once at the end"
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="sequences per evaluation pass; as in training unless set"
    )
    metric: Text = Field(
        "auto", description="what is best and when to stop; auto: the task's own, such as loss"
    )
    max_rows: Annotated[int, Field(ge=1)] | None = Field(
        None, description="evaluate on the first N held-out rows only"
    )
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after N evaluations without a better metric"
    )


class OutputSettings(Settings):
    """Where the run lives and what it leaves."""

    folder: Text = Field("runs/qlora", description="run folder")
    save_every_minutes: float = Field(
        10.0, gt=0, description="save the state this often; always at the end and when stopped"
    )
    save_every_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="also save the state every N steps"
    )
    keep_last: int = Field(2, ge=1, le=1000, description="saved states kept")
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], AfterValidator(without_doubles)] = (
        Field([], description="also log to these (extras of the package)")
    )
    log_every_steps: int = Field(1, ge=1, description="steps per line of metrics.jsonl")


class MemorySettings(Settings):
    """What a run may take of the machine, and what is tried before its first step."""

    desktop_share: Size | None = Field(
        None,
        description="left to the desktop where a card is foreseen; null: 1 GiB on Windows, WSL",
    )
    must_fit: bool = Field(
        True, description="refuse a run that is foreseen not to fit the card, RAM or disk"
    )
    rehearse: Literal["auto", "always", "never"] = Field(
        "auto", description="try the longest batches and a save before step 1; auto: on a GPU"
    )


class RunConfig(Settings):
    """A whole run, checked as one."""

    task: TaskName = Field("causal-lm", description="what is learned")
    model: ModelSettings = Field(description="the frozen base")
    adapter: AdapterSettings = Field(AdapterSettings(), description="the low-rank update")
    data: DataSettings = Field(description="records and how they are read")
    task_settings: TaskSettings = Field(TaskSettings(), description="what only some tasks know")
    train: TrainSettings = Field(TrainSettings(), description="the optimization")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="held-out metrics")
    output: OutputSettings = Field(OutputSettings(), description="the run folder")
    memory: MemorySettings = Field(MemorySettings(), description="what must fit")

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_its_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {k: v for k, v in values.items() if not (v is None and k in optional)}
