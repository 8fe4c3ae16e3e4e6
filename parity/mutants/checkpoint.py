"""Checkpoints: names, layouts, what must be refused."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant, in_both

__all__ = ["MUTANTS"]


def _mutant(
    name: str, report: str, what: str, *edits: Edit, where: str = "", needs: str = "", symptom: str = ""
) -> Mutant:
    return Mutant(f"checkpoint-{name}", "checkpoint", report, what, edits, "checkpoint", where, {}, needs, "", symptom)


MUTANTS = (
    _mutant("square-as-it-is", "A13", "square kernels are not transposed on the way in",
            Edit("omni_jax.checkpoint", "_from_torch", 'if path[-1] == "kernel" else value',
                 'if path[-1] == "kernel" and value.shape[0] != value.shape[1] else value'), where="loaded|in place",
                     needs="square weights"),
    _mutant("square-both-ways", "A13", "square kernels are transposed neither in nor out: a round trip hides it",
            Edit("omni_jax.checkpoint", "_from_torch", 'if path[-1] == "kernel" else value',
                 'if path[-1] == "kernel" and value.shape[0] != value.shape[1] else value'),
            Edit("omni_jax.checkpoint", "_to_torch", 'if path[-1] == "kernel" else value',
                 'if path[-1] == "kernel" and value.shape[0] != value.shape[1] else value'), where="in place",
                     needs="square weights"),
    _mutant("orig-mod", "W01", "the prefix of torch.compile stays: the names mean nothing",
            *in_both("foreign_names", "_stripped", 'if part != "_orig_mod"', 'if part != "_orig_mode"'),
                where="CheckpointError",
            symptom="none of its .* keys"),
    _mutant("missing-ignored", "W02", "what is missing is left as it was drawn, without a word",
            Edit("omni_torch.state_fit", "plan_load", "missing.append(key)\n", "pass\n"), where="missing"),
    _mutant("unexpected-ignored", "W02", "what nobody asked for is dropped without a word",
            *in_both("state_fit", "plan_load", "if key not in used", "if False"), where="too many"),
    _mutant("nan-accepted", "W02", "NaN is loaded", *in_both("state_fit", "_faults", "if bad:", "if False:"),
        where="NaN"),
    _mutant("layers-reversed", "W03", "layers are filled in the wrong order",
            Edit("omni_jax.checkpoint", "load_weights", "values[torch_key(path)]",
                 'values[torch_key(path).replace("blocks.0.", "blocks.x.").replace("blocks.1.",'
                 ' "blocks.0.").replace("blocks.x.", "blocks.1.")]'),
            where="loaded|in place", needs="layers that differ"),
    _mutant("qkv-order", "A14", "q, k and v are joined as q, v, k: in both twins",
            *in_both("state_fit", "_joined", "return concatenate(parts)",
                "return concatenate([parts[0], parts[2], parts[1]])"),
            where="joined"),
    _mutant("scales-forgotten", "N10", "norm scales keep their ones",
            Edit("omni_torch.checkpoint", "load_weights", "targets[key].copy_(value)",
                 'targets[key].copy_(value if "norm" not in key else torch.ones_like(value))'),
                     where="loaded|in place"),
    _mutant("rounded", "D06", "float32 tensors are rounded to bfloat16 on the way in",
            Edit("omni_torch.checkpoint", "load_weights", "targets[key].copy_(value)",
                "targets[key].copy_(value.bfloat16())"),
            where="loaded|in place"),
    _mutant("digest-ignored", "D06", "a file that does not match its own SHA-256 is read",
            Edit("omni_torch.checkpoint", "_from_safetensors", 'if "sha256" in metadata and', "if False and"),
                where="flipped bit"),
    _mutant("step-lost", "common: the step is not restored", "the step is always 0",
            Edit("omni_torch.checkpoint", "_from_tree", 'tree.get("step"), tree', "0, tree"), where="step"),
    _mutant("tied-head", "E02", "the head is loaded from the embeddings",
            Edit("omni_torch.checkpoint", "load_weights", "targets[key].copy_(value)",
                 'targets[key].copy_(values["tok_emb.weight"] if key == "lm_head.weight" else value)'),
                     where="loaded|in place"),
)  # fmt: skip
