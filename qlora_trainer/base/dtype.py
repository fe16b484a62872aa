"""What to compute in, decided by what the device does natively.

bf16 where the hardware multiplies it (compute capability 8.0 and up, CPUs with AVX-512 and the
like, other accelerators); fp16 on older CUDA cards; fp32 on other CPUs, most laptops' among them,
where a 16-bit product takes several times as long as one in fp32.
`torch.cuda.is_bf16_supported()` is not asked: it says yes on a T4, where bf16 is emulated at a
fraction of the speed. fp16 ends at 65504, and some families are known to pass that in their
residual stream: they are refused in fp16 by name rather than trained into NaN.
"""

import functools

import torch

from qlora_trainer.errors import UserError

NATIVE_BF16_CAPABILITY = (8, 0)  # below, torch emulates bf16 and says that it is supported
_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# T5: huggingface/transformers#17978, #20287; Gemma: #29402, #36822 (activations past 65504).
_T5_FAMILY = {"t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop"}
_GEMMA_PREFIXES = ("gemma", "t5gemma", "recurrent_gemma", "paligemma", "shieldgemma", "colpali")


def choose_compute_dtype(requested: str, device: torch.device, model_type: str) -> torch.dtype:
    """The dtype for this machine's device; see `compute_dtype_for`."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return compute_dtype_for(requested, device.type, model_type, capability, cpu_multiplies_bf16())


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether torch has a fast bf16 matrix product for this machine's CPU.

    Asks what torch itself asks before it hands such a product to oneDNN (mkldnn_bf16_device_check,
    aten/src/ATen/native/mkldnn/Utils.h); without oneDNN there is none.
    """
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and ask is not None and bool(ask())


def compute_dtype_for(
    requested: str,
    device_type: str,
    model_type: str,
    capability: tuple[int, int] | None,
    cpu_bf16: bool,
) -> torch.dtype:
    """The dtype for a device given by its properties, so that it need not be there.

    Args:
        requested: "auto", "bf16", "fp16" or "fp32".
        device_type: "cpu", "cuda", ...
        model_type: transformers' name of the family, such as "llama".
        capability: CUDA compute capability, or None where there is no such thing.
        cpu_bf16: Whether the CPU, if that is the device, multiplies bf16 natively.

    Raises:
        UserError: No such dtype; bf16 asked where it is emulated; fp16 (asked or the only fast
            choice) for a family that overflows in it.
    """
    if requested != "auto" and requested not in _NAMES:
        known = ", ".join(("auto", *_NAMES))
        raise UserError(f"model.compute_dtype = {requested!r}: must be one of {known}")
    emulated = device_type == "cuda" and capability is not None and (
        capability < NATIVE_BF16_CAPABILITY
    )  # fmt: skip
    capability_text = ".".join(map(str, capability or ()))
    if requested == "bf16" and emulated:
        raise UserError(
            f"model.compute_dtype = bf16: this GPU (compute capability {capability_text}) only "
            "emulates bf16, slowly; set model.compute_dtype = fp16 or auto"
        )
    chosen = requested
    if requested == "auto":
        slow_cpu = device_type == "cpu" and not cpu_bf16
        chosen = "fp16" if emulated else "fp32" if slow_cpu else "bf16"
    if chosen == "fp16" and overflows_in_fp16(model_type):
        why = (
            "model.compute_dtype = fp16"
            if requested == "fp16"
            else f"model.compute_dtype = auto (fp16 on compute capability {capability_text})"
        )
        ways = "fp32 (slow)" if emulated else "bf16"
        raise UserError(
            f"{why}: {model_type} models overflow in fp16 and train into NaN; set "
            f"model.compute_dtype = {ways}, or take another model"
        )
    return _NAMES[chosen]


def slow_compute_notes(dtype: torch.dtype, device: torch.device) -> list[str]:
    """What to say of a run that computes in what its CPU multiplies slowly; nothing of others."""
    if device.type != "cpu" or dtype.itemsize > 2 or cpu_multiplies_bf16():
        return []
    return [
        f"computing in {dtype_name(dtype)}: this CPU multiplies 16-bit numbers many times slower "
        "than fp32's; a new run with model.compute_dtype = auto computes in fp32"
    ]


def overflows_in_fp16(model_type: str) -> bool:
    """Whether a family is known to pass fp16's largest number.

    >>> overflows_in_fp16("gemma2"), overflows_in_fp16("llama")
    (True, False)
    """
    return model_type in _T5_FAMILY or model_type.startswith(_GEMMA_PREFIXES)


def dtype_name(dtype: torch.dtype) -> str:
    """The short name people use.

    >>> dtype_name(torch.bfloat16), dtype_name(torch.uint8)
    ('bf16', 'uint8')
    """
    for name, known in _NAMES.items():
        if known == dtype:
            return name
    return str(dtype).removeprefix("torch.")
