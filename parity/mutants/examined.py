"""What the examination of mutants by rule that survived has found: one line of reason for each.

equivalent: no input can tell it from the right code, for the reason given.
gap: an input or a check that would kill it is missing; the reason names it.
tests: no parity check runs it on an input that shows it; the reason names the test of the module that fails.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["EXAMINED", "KINDS", "examined"]

KINDS = ("equivalent", "gap", "tests")

MASK = "only where every key is kept the mask is left out, and then it says nothing"

EXAMINED: Mapping[str, tuple[str, str]] = {
    # attention
    "rule:jax.attention.default_positions:constant:1→0": (
        "tests",
        "all positions shift by one, which RoPE cannot see; test_default_positions_count_kept_tokens looks at them",
    ),
    "rule:torch.attention.default_positions:constant:0→-1": (
        "tests",
        "only padding before a text gets another position, and nobody attends to it; "
        "test_default_positions_count_kept_tokens looks at them",
    ),
    "rule:torch.attention.attend:constant:0.0→-1.0": ("equivalent", "exp(−inf + 1) and exp(−inf) are both 0"),
    # layers
    "rule:jax.layers.rope_frequencies:cast:.astype(wide)→": (
        "equivalent",
        "an integer times a float is computed in the float's dtype; only strict promotion refuses it",
    ),
    "rule:torch.layers.TokenEmbedding.forward:cast:.long()→": (
        "tests",
        "torch takes int32 and int64 as they are; test_ids_of_any_integers gives others",
    ),
    # thinker
    "rule:torch.thinker.ThinkerLM.forward:boolean:and→or#3": (
        "tests",
        "no number changes, but gradients are kept through a cache; test_thinker's padding with a cache fails",
    ),
    "rule:jax.thinker.fresh_model:constant:0→1": ("equivalent", "its draws are never made: only shapes are asked for"),
    "rule:jax.thinker._draw:function:zeros→ones": (
        "equivalent",
        "a stream of dropout begins at its second draw: other numbers of the same law",
    ),
    "rule:torch.thinker.ThinkerLM.forward:boolean:and→or": ("equivalent", MASK),
    "rule:torch.thinker.ThinkerLM.forward:constant:1→0": ("equivalent", MASK),
    "rule:torch.thinker.ThinkerLM.forward:compare:==→!=#2": ("equivalent", MASK),
    "rule:torch.thinker.ThinkerLM.forward:boolean:not x→x#2": ("equivalent", MASK),
    # losses
    "rule:jax.losses.cross_entropy:constant:0→1": (
        "tests",
        "class 0 is the ignored one in every check; test_cross_entropy_by_the_formula ignores −100",
    ),
    "rule:jax.losses.cross_entropy:constant:0→-1#2": (
        "equivalent",
        "which logit is picked for a target out of range does not matter: its loss is NaN, or 0 where it is ignored",
    ),
    "rule:jax.losses.cross_entropy:cast:.astype(wide.dtype)→": (
        "equivalent",
        "a float divided by an integer is computed in the float's dtype; only strict promotion refuses it",
    ),
    # init
    "rule:jax.init.fan_in_fan_out:arithmetic:*→/#2": (
        "tests",
        "no convolution is drawn by Xavier here; test_init asks for the fans of one",
    ),
    "rule:torch.init.fan_in_fan_out:slice:2:→2:-1": (
        "tests",
        "no convolution is drawn here; test_init asks for the fans of one",
    ),
    "rule:jax.init._wide:compare:>→>=": ("equivalent", "at 32 bits both answers are float32"),
    "rule:torch.init.default_init_:flag:recurse=False→recurse=True": (
        "tests",
        "whole modules are refused; test_defaults_are_torchs_own_bit_for_bit draws some",
    ),
    # vision
    "rule:jax.vision.resize_positions:cast:.astype(wide)→": (
        "equivalent",
        "the matrices beside it are wide, and so is the product; only strict promotion refuses it",
    ),
    "rule:torch.vision.resize_positions:cast:.to(pos.dtype)→": (
        "tests",
        "the image check resizes no bfloat16 table; test_vision asks for the dtype of one",
    ),
    "rule:torch.vision._cubic:arithmetic:+→-#8": (
        "equivalent",
        "rows and columns both change sign, which cancels to the bit",
    ),
}


def examined(name: str) -> tuple[str, str]:
    """(kind, reason) of a survivor; ("", "") if nobody has looked at it."""
    return EXAMINED.get(name, ("", ""))
