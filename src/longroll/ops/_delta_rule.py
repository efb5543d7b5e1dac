"""The delta rule: each step replaces what the state holds under its key."""

import torch
from torch import Tensor

from longroll.ops._backend import kernel_for
from longroll.ops._chunks import check
from longroll.ops._gated_delta_rule import gated_delta_rule


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run `S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T`, `o_t = scale S_t^T q_t`.

    Arguments, results and errors as of `longroll.ops.gated_delta_rule`, without its decay g.

    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024;
    argument order and layouts as in fla's `chunk_delta_rule`.
    """
    kernel = kernel_for("delta_rule", q, v, k, beta, initial_state)
    if kernel is not None and q.shape[:3] == v.shape[:3]:
        check({"q": q, "k": k}, v, {"beta": beta}, initial_state)
        return kernel(q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel)
    g = torch.zeros_like(beta)
    return gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
    )
