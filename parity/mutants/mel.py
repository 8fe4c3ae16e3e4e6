"""Mel spectrograms. Both twins have the filter bank's file alike: mistakes there are put into both."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant, in_both

__all__ = ["MUTANTS"]

MEL, JAX_MEL = ("omni_torch.audio", "_mel"), ("omni_jax.audio", "_mel")


def _mutant(name: str, report: str, what: str, *edits: Edit, needs: str = "", where: str = "") -> Mutant:
    return Mutant(f"mel-{name}", "mel", report, what, edits, "mel", where, {}, needs)


MUTANTS = (
    _mutant("htk-slaney", "F01", "HTK's scale is Slaney's: in both twins",
            *in_both("mel", "hz_to_mel", 'if mel_scale == "htk":', 'if mel_scale == "slaney":'),
            *in_both("mel", "mel_to_hz", 'if mel_scale == "htk":', 'if mel_scale == "slaney":')),
    _mutant("htk-constant", "F01", "2,600 for 2,595 in one twin's scale",
            Edit("omni_torch.mel", "hz_to_mel", "2595.0 * np.log10", "2600.0 * np.log10"),),
    _mutant("norm-ignored", "F02", "Slaney's areas are left out: in both twins",
            *in_both("mel", "_filter_bank", 'if norm == "slaney":', "if False:")),
    _mutant("norm-always", "F02", "areas are always made 1",
            Edit("omni_jax.mel", "_filter_bank", 'if norm == "slaney":', "if True:")),
    _mutant("padding-zeros", "F04", "the ends are padded with zeros where they are to be reflected",
            Edit(*MEL, "mode=pad_mode)", 'mode="constant")')),
    _mutant("padding-edge", "F04", "the ends are padded by their own values",
            Edit(*JAX_MEL, "mode=pad_mode)", 'mode="edge" if pad_mode == "reflect" else pad_mode)')),
    _mutant("floor-relative", "F06", "the log's floor is 1e-8 of the loudest value of the batch",
            Edit("omni_torch.audio", "log_mel", "torch.where(mel_wide > floor, mel_wide, floor)",
                 "torch.maximum(mel_wide, (mel_wide.detach().max() * 1e-8).clamp(min=floor))"),
                     needs="quiet clips beside loud ones"),
    _mutant("floor", "F07", "a floor of 1e-5 for 1e-10",
            Edit("omni_jax.audio", "log_mel", "jnp.where(mel_wide > floor, mel_wide, floor)",
                 "jnp.where(mel_wide > 1e-5, mel_wide, 1e-5)"), needs="silence"),
    _mutant("log10", "F08", "log10 for ln",
            Edit("omni_torch.audio", "log_mel", "torch.log(", "torch.log10(")),
    _mutant("power", "F08", "magnitudes where powers are asked for",
            Edit(*MEL, "spectrum_BKF.real.square() + spectrum_BKF.imag.square()",
                 "(spectrum_BKF.real.square() + spectrum_BKF.imag.square() + 1e-30).sqrt()")),
    _mutant("fft-rounded", "F10", "the transform's size is rounded up to a power of two",
            Edit(*MEL, "n=n_fft, dim=-1)", "n=1 << (n_fft - 1).bit_length(), dim=-1)[..., : n_fft // 2 + 1]"),
            needs="an n_fft that is no power of two"),
    _mutant("window-symmetric", "F10", "a symmetric Hann window, numpy's: in both twins",
            *in_both("mel", "hann_window", "np.arange(win_length) / win_length)",
                "np.arange(win_length) / max(win_length - 1, 1))")),
    _mutant("window-left", "F10", "the window stands at the beginning of n_fft, not in its middle",
            Edit(*MEL, "left = (n_fft - W) // 2", "left = 0"), needs="a window shorter than n_fft"),
    _mutant("hop-one-less", "common: off by one in the frames", "the last frame is the one before it",
            Edit(*JAX_MEL, "first + i % T * hop_length", "first + jnp.minimum(i % T, max(T - 2, 0)) * hop_length")),
)  # fmt: skip
