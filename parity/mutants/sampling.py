"""Sampling: what is kept, what is drawn."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

P, JAX_P = ("omni_torch.sampling", "_probabilities"), ("omni_jax.sampling", "_probabilities")
DRAW, JAX_DRAW = ("omni_torch.sampling", "_draw"), ("omni_jax.sampling", "_draw")


def _mutant(name: str, report: str, what: str, *edits: Edit, where: str = "", needs: str = "") -> Mutant:
    return Mutant(f"sampling-{name}", "sampling", report, what, edits, "sampling", where, {}, needs)


MUTANTS = (
    _mutant("crossing-dropped", "Q01", "top-p leaves out the token that crosses p",
            Edit(*P, "before_BN >= goal_B1", "sums_BN >= goal_B1"), where="kept"),
    _mutant("crossing-one-more", "Q01", "top-p keeps one token more where the sum meets p",
            Edit(*P, "before_BN >= goal_B1", "before_BN > goal_B1"), where="kept", needs="sums that meet p exactly"),
    _mutant("crossing-jax", "Q01", "top-p keeps what stays at or below p, and one more",
            Edit("omni_jax.sampling", "_smallest_set", "< goal_B1, jnp", "<= goal_B1, jnp"), where="kept",
            needs="sums that meet p exactly"),
    _mutant("top-p-zero", "Q02", "top_p = 0 keeps every token",
            Edit(*P, "if top_p < 1.0:", "if 0.0 < top_p < 1.0:"), where="kept"),
    _mutant("temperature-zero", "Q02", "temperature 0 draws from the model's own distribution",
            Edit("omni_torch.sampling", "truncated_probabilities", "if temperature == 0.0:",
                 "temperature = temperature or 1.0\n    if temperature == 0.0:"), where="kept|prob"),
    _mutant("temperature-late", "common: temperature behind top-p", "top-p looks at the distribution of temperature 1",
            Edit(*P, "mass_BN = mass_BV.gather(1, ids_BN)\n            sums",
                "mass_BN = torch.exp(shifted_BV).gather(1, ids_BN)\n            sums"),
            where="kept"),
    _mutant("temperature-times", "common: times for over", "logits times the temperature",
            Edit(*JAX_P, "shifted_BV / jnp.maximum(temperature, smallest)", "shifted_BV * temperature"),
                where="kept|prob"),
    _mutant("softmax-twice", "Q03", "probabilities are taken for logits",
            Edit(*P, "return mass_BV / mass_BV.sum(dim=-1, keepdim=True)",
                 "return torch.softmax(torch.where(mass_BV > 0, mass_BV / mass_BV.sum(dim=-1, keepdim=True),"
                 " -torch.inf), -1)"),
            where="prob"),
    _mutant("ties-last", "M08", "of equal logits the last ones are kept",
            Edit("omni_torch.sampling", "_top_ids", "(equal_BV.cumsum(dim=-1) <= wanted_B1)",
                 "(equal_BV.flip(-1).cumsum(dim=-1).flip(-1) <= wanted_B1)"), where="kept", needs="ties"),
    _mutant("greedy-last", "M08", "of equal logits the greedy choice is the last one",
            Edit("omni_torch.sampling", "_likeliest", "largest_BV.to(torch.uint8).argmax(dim=-1)",
                 "largest_BV.shape[1] - 1 - largest_BV.flip(-1).to(torch.uint8).argmax(dim=-1)"), where="kept",
                     needs="ties"),
    _mutant("penalty-times", "common: the penalty's sign", "positive logits are multiplied by the penalty too",
            Edit("omni_torch.sampling", "_penalise", "logits_BV / penalty, logits_BV * penalty",
                "logits_BV * penalty, logits_BV * penalty"),
            where="kept|prob"),
    _mutant("draw-masked", "Q05", "a uniform at the end of its row draws a token of probability 0",
            Edit(*DRAW, ".masked_fill(p_BV <= 0.0, 0.0)", ""), Edit(*DRAW,
                "torch.minimum(uniforms_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))",
                "uniforms_B[:, None] * total_B1"),
            Edit(*DRAW, "(sums_BV > goal_B1)", "(sums_BV >= goal_B1)"), where="^ids", needs="a uniform of 0"),
    _mutant("draw-next", "common: off by one in the search", "the id behind the one that the uniform meets",
            Edit(*JAX_DRAW, "(block_B1 * _BLOCK + within_B1)[:, 0]",
                "jnp.minimum(block_B1 * _BLOCK + within_B1 + 1, V - 1)[:, 0]"),
            where="^ids"),
    _mutant("draw-unscaled", "Q05", "the uniform is not scaled by the sum",
            Edit(*DRAW, "uniforms_B[:, None] * total_B1", "uniforms_B[:, None]"), where="^ids",
                needs="p that does not sum to 1"),
    _mutant("argmax", "Q03", "the likeliest token in place of a drawn one",
            Edit(*DRAW, "return (sums_BV > goal_B1).to(torch.uint8).argmax(dim=-1)", "return p_BV.argmax(dim=-1)"),
                where="^ids"),
)  # fmt: skip
