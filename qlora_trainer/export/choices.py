"""What an export can be asked for: imports nothing, so that `qlora --help` can name it at once."""

from typing import Literal

JoinedFormat = Literal["merged", "adapter"]  # of several adapters
Format = Literal[JoinedFormat, "gguf"]
Dtype = Literal["auto", "fp16", "bf16", "fp32"]  # auto: bf16 where a family overflows in fp16
Onto = Literal["original", "dequantized"]  # weights that an adapter is merged onto
AskedOnto = Literal[Onto, "best"]  # best: both, and the nearer one is kept
GgufType = Literal["f16", "q8_0", "q4_0"]
By = Literal["auto", "model", "layer"]  # how much of a model the proof holds in memory
Quantization = Literal["nf4", "none"]  # how training held a base
