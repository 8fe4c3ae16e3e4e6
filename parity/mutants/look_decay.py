"""Both twins' decay masks against the rule in words: matrices and embeddings decay, scales and biases do not."""

from __future__ import annotations

from parity.checks import Progress, Scope
from parity.result import CheckResult, Row
from parity.verdict import Verdict

__all__ = ["run"]


def run(scope: Scope, progress: Progress) -> CheckResult:
    """A row for each twin."""
    import jax
    from flax import nnx

    import omni_jax
    import omni_jax.optim
    import omni_torch
    import omni_torch.optim

    size = {"vocab_size": 11, "n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 6, "use_swiglu": False}
    module = omni_torch.ThinkerLM(**size)
    wanted = {k: "norm" not in k and "bias" not in k for k, _ in module.named_parameters()}
    model = omni_jax.ThinkerLM.from_config(omni_jax.ThinkerConfig(**size))
    params = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    ours = jax.tree.map(bool, omni_jax.optim.decay_mask(params))
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    renamed = {f"{k.rpartition('.')[0]}.{names[k.rpartition('.')[2]]}": v for k, v in ours.items()}
    result = CheckResult("decay-mask")
    for side, found in (("jax", renamed), ("torch", omni_torch.optim.decay_mask(module))):
        wrong = sorted(k for k in wanted | found if found.get(k) is not wanted.get(k))
        verdict = Verdict.DIFFER if wrong else Verdict.AGREE
        result.rows.append(Row("decay-mask", "", "", "", f"decay mask ({side})", verdict, ", ".join(wrong) or "equal"))
    return result
