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
    "rule:jax.attention.CausalSelfAttention.__call__:constant:1→2": (
        "gap",
        "one query goes through the general form, to the same result; two fail: decode two tokens at once with grouped "
        "heads",
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
    "rule:jax.layers.make_dropout:compare:>→>=": (
        "gap",
        "dropout at rate 0 holds random state, which changes no number: compare what a model without dropout holds",
    ),
    # thinker
    "rule:jax.thinker._starts_at_zero:index:[-1]→[-2]": (
        "gap",
        "no fresh ViTTiny is drawn by the initializers check: its CLS token and positions would not be known",
    ),
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
    "rule:jax.losses.cross_entropy:compare:<→<=": (
        "equivalent",
        "take_along_axis fills what is out of range with NaN, as the loss would",
    ),
    "rule:jax.losses.cross_entropy:constant:0→-1#2": (
        "equivalent",
        "which logit is picked for a target out of range does not matter: its loss is NaN, or 0 where it is ignored",
    ),
    "rule:jax.losses.cross_entropy:cast:.astype(wide.dtype)→": (
        "equivalent",
        "a float divided by an integer is computed in the float's dtype; only strict promotion refuses it",
    ),
    "rule:torch.losses.cross_entropy:cast:.long()→": (
        "gap",
        "every target is int64 already: give the torch side targets of int32",
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
    "rule:jax.init._wide:constant:32→64": (
        "gap",
        "float64 weights are drawn in float32 and widened: draw in float64 and look for digits beyond the 24th bit",
    ),
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
    # optim
    "rule:jax.optim._average:constant:0.5→1.0": (
        "gap",
        "the other form of the average, equal in float64 and 1.3e-5 off in float32 in the end: adamw over thousands of "
        "float32 steps of one gradient, v against it",
    ),
    "rule:jax.optim._average:constant:1.0→0.0#2": ("gap", "no beta below 0.5 is tried: adamw with beta1 0.3 and 0"),
    # fusion
    "rule:jax.fusion._cut:constant:1→0#5": (
        "gap",
        "text one longer than the room beside pictures or sound leaves: cut to ctx_len rows whose text fills it "
        "exactly (policy text cut last), and rows with one token more",
    ),
}


def examined(name: str) -> tuple[str, str]:
    """(kind, reason) of a survivor; ("", "") if nobody has looked at it."""
    return EXAMINED.get(name, ("", ""))
