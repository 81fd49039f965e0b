"""The checks of adapters by hand: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref import fast
from scalabl_ref.verify.adapter_checks import ADAPTER_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in ADAPTER_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "alpha is r": (
        "core.config:AdapterConfig.lora_alpha", "2 * self.rank", "self.rank", "settings"),
    "alpha over the root of r": (
        "core.config:AdapterConfig.scaling", "/ self.rank", "/ self.rank**0.5", "settings"),
    "a rank of 0": (
        "core.config:AdapterConfig.__post_init__", "self.rank < 1", "self.rank < 0", "settings"),
    "everything is dropped": (
        "core.config:AdapterConfig.__post_init__", "self.dropout < 1:", "self.dropout <= 1:",
        "settings"),
    "uniforms from 0": (
        "core.adapter:initial_matrix", "(words + 0.5)", "words", "start"),
    "the bound of a normal start": (
        "core.adapter:initial_matrix", "/ math.sqrt(d_in)", "/ math.sqrt(rank)", "start"),
    "the widths of the matrix": (
        "core.adapter:initial_matrix", "uniform[rank * d_in :]", "uniform[: widths or rank]",
        "start"),
    "widths from 0": (
        "core.adapter:initial_widths", "low + (init_sigma - low) * uniform",
        "init_sigma * uniform", "start"),
    "s for log s": (
        "methods.point:PointAdapter._initialise", "singular.log()", "singular", "start"),
    "a draw that is the mean": (
        "core.adapter:SubspaceAdapter.lora_A", "s = s + self", "s = s + 0 * self",
        "draws as weights"),
    "signs the other way round": (
        "methods.blob:FlipoutAdapter.lora_A", "split([d_in, rank])", "flip(0).split([d_in, rank])",
        "draws as weights"),
    "kept, and not scaled": (
        "methods.dropout:DropoutAdapter.lora_A", "/ (1 - self.config.dropout)", "",
        "draws as weights"),
    "dropped and kept exchanged": (
        "methods.dropout:DropoutAdapter.kept", "z >=", "z <", "draws as weights"),
    "widths of columns": (
        "methods.full:FullAdapter.widths", "sum(1)", "sum(0)", "widths"),
    "G without its sign": (
        "methods.blob:BlobAdapter.bound_", ".copysign(self.G)", "", "widths"),
    "a bound of Omega on G": (
        "methods.blob:BlobAdapter.bound_", "MIN_LOG_SIGMA / 2", "MIN_LOG_SIGMA", "widths"),
    "an upper bound": (
        "core.adapter:SubspaceAdapter.bound_", "min=", "max=", "widths"),
    "the KL is not divided": (
        "core.objective:elbo", "/ num_examples", "", "objective"),
    "beta of the NLL": (
        "core.objective:elbo", "nll + beta * divergence", "beta * nll + divergence", "objective"),
    "one KL for both directions": (
        "core.objective:elbo", "complexity(model, kl)", "complexity(model)", "objective"),
    "a point's s is not squared": (
        "methods.point:PointAdapter.complexity", ".exp().square()", ".exp()", "objective"),
    "a point's variance": (
        "methods.point:PointAdapter.complexity", "sigma_p ** 2", "sigma_p", "objective"),
    "the last kind alone": (
        "core.objective:complexity", "sum(parts, ", "sum(parts[-1:], ", "objective"),
    "any KL fits a prior": (
        "core.objective:fitted_prior_std", 'kl != "forward"', "False", "objective"),
    "0 log 0": (
        "core.predictive:entropy_of", "* finite", "* log_probs", "certain answers"),
    "draws are not added": (
        "core.layer:row_noise", "rank, draws)", "rank, None)", "numbered draws"),
    "groups spread over the wrong rows": (
        "core.layer:spread", "values.view(*values.shape, *[1] * (len(shape) - values.dim()))",
        "values.flip(0).view(*values.shape, *[1] * (len(shape) - values.dim()))",
        "numbered draws"),
    "rounded adapters": (
        "core.layer:low_rank_dtype",
        "torch.promote_types(torch.promote_types(A.dtype, y.dtype), torch.float32)", "y.dtype",
        "other dtypes"),
    "bias of any length": (
        "core.layer:check_shapes", "tensor is not None and", 'name != "bias" and',
        "refusals"),
    "groups of any type": (
        "core.layer:spread", "values.is_floating_point()", "False", "refusals"),
    "a rank of no normals": (
        "core.noise:Noise.normal", '"rank", rank, 1', '"rank", rank, 0', "refusals"),
    "tokens run into the next id": (
        "core.noise:token_groups", ">= WORD // span", "> WORD // span", "refusals"),
    "the mirror image first": (
        "fast.designs:designed_normals", "place[:, None] == 0, z, -z", "place[:, None] == 0, -z, z",
        "designs of draws"),
    "every pair is the first": (
        "fast.designs:designed_normals", "draws // size)\n", "0 * draws)\n", "designs of draws"),
    "a cube of another draw": (
        "fast.designs:designed_normals", "(draws - place)", "draws", "designs of draws"),
    "places that are not uniform": (
        "fast.designs:latin", ") ** k", ")", "designs of draws"),
    "intervals from 1": (
        "fast.designs:latin", "(k - 1 + v)", "(k - v)", "designs of draws"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    """On the plain bodies, whose text it is."""
    with fast.plain():
        is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
