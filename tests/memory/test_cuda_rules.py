import pytest
import torch

from qlora_trainer.memory.attention import choose_kernel
from qlora_trainer.memory.attention_workspaces import (
    efficient_backward_kernel,
    efficient_backward_workspace_bytes,
    flash_backward_workspaces,
    varlen_backward_workspaces,
)
from qlora_trainer.memory.bitsandbytes_rules import uses_fused_kernel
from qlora_trainer.memory.cuda_rules import cublas_workspace_bytes
from qlora_trainer.memory.gpus import Gpu
from qlora_trainer.memory.simulate import simulate

T4 = Gpu("T4", (7, 5), 40)
RTX_3060 = Gpu("RTX 3060", (8, 6), 28)
H100 = Gpu("H100", (9, 0), 132)
RTX_5090 = Gpu("RTX 5090", (12, 0), 170)


def allocations(program, gpu):
    return {a.operator: a.size_bytes for a in simulate(program, gpu).log.allocations}


def test_cublas_workspace_grows_with_compute_capability():
    assert cublas_workspace_bytes(RTX_3060) == 8_519_680
    assert cublas_workspace_bytes(H100) == cublas_workspace_bytes(RTX_5090) == 32 * 2**20


def test_forward_and_autograd_threads_each_have_a_cublas_workspace():
    def program(_tracker):
        a = torch.zeros(8, 8, device="meta", requires_grad=True)
        (a @ a).sum().backward()
        (a @ a).sum().backward()

    log = simulate(program, RTX_3060).log
    made = [a.operator for a in log.allocations if "cublas" in a.operator]
    assert made == ["cublas workspace (main thread)", "cublas workspace (autograd thread)"]


def test_softmax_backward_makes_a_full_temporary():
    def program(_tracker):
        scores = torch.zeros(64, 64, device="meta", requires_grad=True)
        (scores.softmax(-1) ** 2).sum().backward()

    assert allocations(program, T4)["softmax backward: grad * output"] == 64 * 64 * 4


@pytest.mark.parametrize(
    ("gpu", "dtype", "masked", "grouped", "kernel"),
    [
        (RTX_3060, torch.bfloat16, False, True, "flash"),
        (RTX_3060, torch.bfloat16, True, False, "memory-efficient"),
        (RTX_3060, torch.float32, False, False, "memory-efficient"),
        (T4, torch.float16, False, False, "memory-efficient"),
        (T4, torch.float16, False, True, "math"),
        (T4, torch.bfloat16, False, False, "math"),
    ],
)
def test_the_attention_kernel_follows_card_dtype_mask_and_grouping(
    gpu, dtype, masked, grouped, kernel
):
    assert choose_kernel(gpu, dtype, 64, masked=masked, grouped=grouped) == kernel


def test_heads_wider_than_flash_knows_take_the_next_kernel():
    assert choose_kernel(RTX_3060, torch.bfloat16, 320, masked=False, grouped=False) == (
        "memory-efficient"
    )


def test_values_of_another_size_than_keys_are_not_for_flash():
    """Of DeepSeek's latent attention; torch's flash attention asks for equal head sizes."""
    kernel = choose_kernel(RTX_3060, torch.bfloat16, 192, masked=False, grouped=False, unequal=True)
    assert kernel == "memory-efficient"


def test_efficient_attention_workspace_in_fp32_is_the_query_side_only():
    kernel = efficient_backward_kernel(T4, torch.float32, 64)
    size = efficient_backward_workspace_bytes(kernel, torch.float32, (1, 1, 128, 128, 64))
    assert size == 2 * (4 + 64 * 64) * 4  # two row blocks of one tile


def test_half_precision_wide_heads_on_a_small_card_accumulate_keys_and_values_too():
    kernel = efficient_backward_kernel(T4, torch.float16, 128)
    assert not kernel.output_in_registers
    roomy = efficient_backward_kernel(Gpu("A100", (8, 0), 108), torch.float16, 128)
    assert roomy.output_in_registers
    shape = (2, 12, 1024, 1024, 128)
    assert efficient_backward_workspace_bytes(
        kernel, torch.float16, shape
    ) > efficient_backward_workspace_bytes(roomy, torch.float16, shape)


def test_flash_backward_expands_keys_of_grouped_queries():
    query = torch.zeros(2, 8, 100, 64, device="meta", dtype=torch.bfloat16)
    alone = flash_backward_workspaces(query, query)
    grouped = flash_backward_workspaces(query, query[:, :2])
    assert alone == {"softmax_d": 4 * 2 * 8 * 128, "dq_accum": 4 * 2 * 8 * 128 * 64}
    assert grouped["dk_expanded"] == grouped["dv_expanded"] == 2 * 8 * 100 * 64 * 2


def test_the_variable_length_backward_takes_128_rows_more_for_every_example():
    query = torch.zeros(100, 8, 160, device="meta", dtype=torch.bfloat16)
    alone = varlen_backward_workspaces(query, query, 3)
    grouped = varlen_backward_workspaces(query, query[:, :2], 3)
    assert alone == {"softmax_d": 4 * 8 * 484, "dq_accum": 4 * 484 * 8 * 192}
    assert grouped["dk_expanded"] == grouped["dv_expanded"] == 100 * 8 * 160 * 2


def test_bitsandbytes_unpacks_the_weight_for_many_rows_only():
    assert uses_fused_kernel((8, 6), 28, torch.bfloat16, 1, 4096, 4096)
    assert not uses_fused_kernel((8, 6), 28, torch.bfloat16, 2048, 4096, 4096)
    assert not uses_fused_kernel((7, 5), 40, torch.bfloat16, 16, 4096, 4096)


def test_gemm_4bit_shows_its_hidden_weight():
    def program(_tracker):
        x = torch.zeros(2048, 256, device="meta", dtype=torch.float16)
        codes = torch.zeros(256 * 128, 1, device="meta", dtype=torch.uint8)
        absmax = torch.zeros(1024, device="meta")
        torch.ops.bitsandbytes.gemm_4bit.default(x, codes, (256, 256), absmax, 64, "nf4")

    assert allocations(program, T4)["gemm_4bit dequantized weight"] == 256 * 256 * 2
