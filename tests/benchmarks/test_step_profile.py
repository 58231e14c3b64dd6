"""To which part of a step a kernel belongs, and what its family takes."""

import pytest
from step_profile import find_family, format_families, sum_families

KERNELS = {
    "attention forward": [
        "attention_short_fwd_kernel",
        "attention_long_fwd_kernel",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_31",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>",
    ],
    "attention backward": [
        "attention_short_bwd_kernel",
        "attention_long_bwd_kernel_dkv",
        "attention_long_bwd_queries_kernel",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_cga1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*, void*)",
        "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)",
        "void (anonymous namespace)::softmax_warp_backward<float, float, float, 10, true, false>",
    ],
    "cuBLAS": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
        "aten::addmm",
    ],
    "linear_gelu": ["linear_gelu_fwd_kernel"],
    "linear_add": ["linear_add_fwd_kernel"],
    "dgelu": ["dgelu_bwd_kernel"],
    "GELU by itself": ["void vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "aten::gelu_backward"],
    "norms": [
        "layer_norm_bwd_kernel_parameters",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>",
    ],
    "update": [
        "adamw_update_kernel",
        "sgd_update_kernel",
        "void multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4, ADAM_MODE::ADAMW>>",
        "void at::native::reduce_kernel<512, 1, ReduceOp<float, NormTwoOps<float>>>",
    ],
    "casts and copies": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(TensorIteratorBase&)>",
        "void at::native::elementwise_kernel<at::native::bfloat16_copy_kernel_cuda>",
        "void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>",
    ],
    "sums": ["void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float, at::native::func_wrapper_t<float>>>"],
    "loss": ["void cunn_SoftMaxForward<4, float, LogSoftMaxForwardEpilogue>", "void nll_loss_forward_reduce_cuda_kernel_2d<float>"],
    "patches": ["patch_embed_bwd_kernel", "sm90_xmma_wgrad_implicit_gemm_bf16"],
    "other": ["void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>"],
}


@pytest.mark.parametrize(("name", "expected"), [(name, family) for family, names in KERNELS.items() for name in names])
def test_a_kernel_has_its_family(name, expected):
    assert find_family(name) == expected


def test_families_are_summed_over_a_step_the_largest_first_with_their_kernels():
    found = sum_families([("Memset", 40.0, 2), ("nvjet_a", 2000.0, 20), ("nvjet_b", 4000.0, 20)], steps=2)
    assert list(found) == ["cuBLAS", "casts and copies"]
    assert (found["cuBLAS"].us, found["cuBLAS"].launches) == (3000.0, 20.0)
    title, products, first, *_ = format_families("ours", found, 0.0041)
    assert title == "ours: 4.10 ms a step; its kernels take 3.02 ms"
    assert products.split() == ["cuBLAS", "3.000", "ms", "99.3%", "20", "launches"]
    assert first.split() == ["2.000", "ms", "nvjet_b"]
