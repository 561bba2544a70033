"""LLM.int8() (arXiv:2208.07339): int8 products by vectors, large inputs apart in 16 bits.

    x W^T ≈ s_x s_w (c_x c_w^T) + Σ_{h: |x_h| ≥ α} x_h w_h^T                      (equation 8)

with codes c_x of the other inputs, a scale s_x for each token, a scale s_w for each row of the
weight, α = 6. The threshold belongs to the rounding of the inputs (`ActivationSpec.outliers`),
which the runtime does; this step rounds the weight.

Deviations: the weights w_h that outliers meet are decoded from their int8 codes, as bitsandbytes
does it, because which columns have outliers is only known while the model runs. What is an outlier
is found for each token (`core/activations.py`). Scales may reach the code -128.
Cost: one pass over the weight.
"""

from __future__ import annotations

from pocketlm.quant.rtn import Rtn


class LlmInt8(Rtn):
    """LLM.int8(): weights rounded to nearest, inputs too, but for those of large magnitude.

    No data. Brings the scheme ``LLM_INT8`` where a recipe gives no other; other steps, such as
    gptq, can make the weights of that scheme as well.
    """
