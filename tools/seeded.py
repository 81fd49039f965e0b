"""Plausible mistakes in this method, each with the test that is there for it: see faults.py.

Every one changes what a port would compute, so that the conformance kit has to notice it as well.
"""

from __future__ import annotations

from pathlib import Path
from types import CodeType
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent / "scalabl_ref"


def path(module: str) -> Path:
    """The file of a module of the package, named as core.noise."""
    return PACKAGE / f"{module.replace('.', '/')}.py"


class Fault(NamedTuple):
    """`old`, which occurs once in the module, is replaced by `new`; `property`: the test for it."""

    name: str
    module: str
    old: str
    new: str
    property: str

    def source(self) -> str:
        text = path(self.module).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {text.count(self.old)} times in {path(self.module)}")
        return text.replace(self.old, self.new)

    def change(self) -> tuple[str, CodeType]:
        return self.module, compile(self.source(), str(path(self.module)), "exec")


KNOWN = "core/test_noise.py::test_philox_known_answers"
BODIES = "core/test_noise.py::test_three_bodies_agree"
ACCURATE = "core/test_noise.py::test_normals_are_accurate"
EXAMPLE = "core/test_noise.py::test_worked_example_of_the_porting_guide"
OP = "fast/test_ops.py::test_equals_the_reference"
GRADIENT = "fast/test_ops.py::test_gradients_equal_the_reference"
KL = "core/test_objective.py::test_both_directions_equal_torch_distributions_and_the_reference"
KL_GRADIENT = "core/test_objective.py::test_kl_gradients_equal_the_closed_forms"
KL_ZERO = "core/test_objective.py::test_kl_is_zero_at_the_prior"
KL_VALUES = "core/test_objective.py::test_check_values"
MIXTURE = "evaluation/test_predict.py::test_predictive_equals_the_reference"
ECE = "evaluation/test_metrics.py::test_ece_and_reliability_equal_loops"
SCORES = "evaluation/test_metrics.py::test_accuracy_nll_brier_and_entropy_equal_loops"
WARMUP = "training/test_schedule.py::test_warmup_rises_then_falls_to_zero"
PERIODS = "training/test_schedule.py::test_periods_of_the_official_schedule"
WEIGHTS = "training/test_schedule.py::test_kl_weights_are_the_geometric_round_of_the_official_code"
ROTATE = "model/test_llama.py::test_rope_turns_each_pair_by_its_angle"
ROPE = "model/test_llama.py::test_rope_scalings_equal_their_formulas"
NORM = "model/test_llama.py::test_rmsnorm_equals_its_formula"
ATTENTION = "model/test_llama.py::test_attention_equals_explicit_loops"
MODEL = "model/test_llama.py::test_the_model_equals_its_formulas"
PADDED = "model/test_llama.py::test_padded_rows_equal_unpadded_ones"
WORDS = "core/test_adapter.py::test_initial_values_are_those_of_the_words"
STEP = "training/test_trainer.py::test_one_objective_step_is_adamw_on_nll_plus_beta_kl_over_n"
OFFICIAL = "training/test_trainer.py::test_official_objective_steps_the_kl_apart"
LOSS = "core/test_objective.py::test_loss_is_nll_plus_beta_kl_over_n"
SLOPE = "core/test_objective.py::test_gradient_of_the_loss_equals_a_finite_difference"
OBJECTIVES = "core/test_objective.py::test_objective_equals_the_reference"
AUROC = "evaluation/test_metrics.py::test_auroc_equals_all_pairs"

PHILOX = [
    Fault("Philox: one round too few", "core.philox",
          "range(in_range(", "range(1, in_range(", KNOWN),
    Fault("Philox: multipliers exchanged", "core.philox",
          "(0xD2511F53, 0xCD9E8D57)", "(0xCD9E8D57, 0xD2511F53)", KNOWN),
    Fault("Philox: key steps exchanged", "core.philox",
          "(0x9E3779B9, 0xBB67AE85)", "(0xBB67AE85, 0x9E3779B9)", KNOWN),
    Fault("Philox: key never moves on", "core.philox",
          "k0, k1 = (k0 + KEY_STEPS[0]) % WORD, (k1 + KEY_STEPS[1]) % WORD", "pass", KNOWN),
    Fault("Philox: high and low word exchanged", "core.philox",
          "hi0, lo0 = divmod", "lo0, hi0 = divmod", KNOWN),
    Fault("Philox: words of the key exchanged", "core.philox",
          "hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1", "hi1 ^ c1 ^ k1, lo1, hi0 ^ c3 ^ k0", KNOWN),
    Fault("Philox: signed multiplication", "core.philox",
          "MULTIPLIERS[0] * c0,", "MULTIPLIERS[0] * (c0 - (c0 >> 31 << 32)),", KNOWN),
    Fault("Philox: words out in the opposite order", "core.philox",
          "return c0, c1, c2, c3", "return c3, c2, c1, c0", KNOWN),
    Fault("Philox: or for exclusive or", "core.philox", "hi1 ^ c1 ^ k0", "hi1 | c1 ^ k0", KNOWN),
    Fault("uniform biased by half a step", "core.philox",
          "(word_a + 0.5) * 2.0**-32", "(word_a + 1.0) * 2.0**-32", ACCURATE),
    Fault("uniform of 24 bits", "core.philox", "(word_a + 0.5)", "(word_a // 256 * 256 + 128)", BODIES),
    Fault("uniform over 2^31", "core.philox", "+ 0.5) * 2.0**-32", "+ 0.5) * 2.0**-33", ACCURATE),
    Fault("sine and cosine exchanged", "core.philox",
          "radius * cos, radius * sin", "radius * sin, radius * cos", EXAMPLE),
    Fault("half a turn for a whole one", "core.philox",
          "TURN = 1.4629180792671596e-09", "TURN = 0.7314590396335798e-09", ACCURATE),
    Fault("radius without the factor two", "core.philox", "(-2.0 * _ln(", "(-1.0 * _ln(", ACCURATE),
    Fault("squared radius", "core.philox",
          "radius = math.sqrt(-2.0 * _ln((word_a + 0.5) * 2.0**-32))",
          "radius = -2.0 * _ln((word_a + 0.5) * 2.0**-32)", ACCURATE),
    Fault("exponent not lowered with the mantissa", "core.philox", "m + m, e - 1", "m + m, e", ACCURATE),
    Fault("second quadrant mirrored", "core.philox", "(-sin, cos), (-cos", "(sin, cos), (-cos",
          ACCURATE),
    Fault("logarithm's series cut short", "core.philox", "range(11))", "range(3))", ACCURATE),
    Fault("cosine's series cut short", "core.philox",
          "math.factorial(2 * k) for k in range(9)", "math.factorial(2 * k) for k in range(4)",
          ACCURATE),
    Fault("series of the hyperbolic sine", "core.philox",
          "SIN = tuple((-1.0) ** k", "SIN = tuple((1.0) ** k", ACCURATE),
]  # fmt: skip

NOISE = [
    Fault("noise: 7 rounds", "core.noise", "in range(10)", "in range(7)", BODIES),
    Fault("noise: group and layer exchanged in the counter", "core.noise",
          "group, layer, draws, seed)", "layer, group, draws, seed)", BODIES),
    Fault("noise: the layer does not count", "core.noise",
          "group, layer, draws, seed)", "group, 0, draws, seed)", BODIES),
    Fault("noise: shared by all draws", "core.noise",
          "group, layer, draws, seed)", "group, layer, 0, seed)", BODIES),
    Fault("noise: shared by all groups", "core.noise",
          "group, layer, draws, seed)", "0 * group, layer, draws, seed)", BODIES),
    Fault("noise: neighbours in the list share a row", "core.noise", ".to(torch.float32)[place]",
          ".to(torch.float32)[place // 2]", BODIES),
    Fault("noise: seed cut to 32 bits", "core.noise",
          "k0, k1 = seed % WORD, seed // WORD", "k0, k1 = seed % WORD, 0", BODIES),
    Fault("noise: halves of the seed exchanged", "core.noise",
          "k0, k1 = seed % WORD, seed // WORD", "k1, k0 = seed % WORD, seed // WORD", BODIES),
    Fault("noise: blocks counted from one", "core.noise",
          "_philox(_arange((rank + 3) // 4)", "_philox(1 + _arange((rank + 3) // 4)", BODIES),
    Fault("noise: components across blocks", "core.noise", "(pairs, dim=-1)", "(pairs, dim=1)", BODIES),
    Fault("noise: words of a pair exchanged", "core.noise",
          "_box_muller(words[a], words[a + 1])", "_box_muller(words[a + 1], words[a])", BODIES),
    Fault("noise: a word used twice", "core.noise", "for a in (0, 2)", "for a in (0, 1)", BODIES),
    Fault("noise: the last components of the block", "core.noise", "[:, :rank]", "[:, -rank:]", BODIES),
    Fault("noise: carry of the product lost", "core.noise",
          "(factor >> 16) + (low >> 16)", "(factor >> 16)", BODIES),
    Fault("noise: radius without the factor two", "core.noise", "(-2.0 * _ln(", "(-1.0 * _ln(", BODIES),
    Fault("noise: draws counted from one", "core.noise",
          "core.normals(self.seed, self.draw,", "core.normals(self.seed, self.draw ^ 1,", BODIES),
    Fault("noise: rounded to bfloat16", "core.noise",
          "rank].to(torch.float32)", "rank].bfloat16().float()", BODIES),
]  # fmt: skip

LAYER = [
    Fault("variance for standard deviation", "fast.ops", "(t.scaling * (s + sigma * eps)",
          "(t.scaling * (s + sigma**2 * eps)", OP),
    Fault("multiplicative noise", "fast.ops", "(t.scaling * (s + sigma * eps)",
          "(t.scaling * (s * (1 + sigma * eps))", OP),
    Fault("noise without the mean", "fast.ops", "(t.scaling * (s + sigma * eps)",
          "(t.scaling * (sigma * eps)", OP),
    Fault("noise left out", "fast.ops", "(t.scaling * (s + sigma * eps)",
          "(t.scaling * (s + 0 * sigma * eps)", OP),
    Fault("noise subtracted", "fast.ops", "(t.scaling * (s + sigma * eps)",
          "(t.scaling * (s - sigma * eps)", OP),
    Fault("scaling left out", "fast.ops", "spread(t.scaling * (s", "spread((s", OP),
    Fault("scaling left out of the mean model", "fast.ops", "return t.scaling * s[None]",
          "return s[None]",
          GRADIENT),
    Fault("scaling squared", "fast.ops", "return h * factor", "return t.scaling * h * factor", OP),
    Fault("scaling inverted", "fast.ops", "sigma, float(scaling))", "sigma, 1 / float(scaling))", OP),
    Fault("bias left out", "fast.ops", "F.linear(x, weight, bias)", "F.linear(x, weight)", OP),
    Fault("bias left out of the native body", "fast.ops",
          "F.linear(t.x, t.weight, t.bias).contiguous()", "F.linear(t.x, t.weight).contiguous()",
          OP),
    Fault("update without the base", "fast.ops", "return y + update.to", "return 0 * y + update.to", OP),
    Fault("update subtracted", "fast.ops", "return y + update.to", "return y - update.to", OP),
    Fault("update computed in bfloat16", "fast.ops", "update.to(y.dtype)",
          "update.bfloat16().to(y.dtype)",
          OP),
    Fault("ranks of A in the opposite order", "fast.ops",
          "F.linear(x, A), math.prod", "F.linear(x, A.flip(0)), math.prod", OP),
    Fault("groups counted from one", "fast.ops",
          "torch.arange(-(-rows // draws.rows_per_group))",
          "torch.arange(-(-rows // draws.rows_per_group)) + 1", OP),
    Fault("a draw for every example under batch sampling", "fast.ops",
          "        shared = shape\n", "        shared = shape[1:]\n",
          "fast/test_ops.py::test_sampling_groups_share_what_they_should"),
    Fault("a draw for every example under token sampling", "fast.ops",
          "shared = shape[:0]", "shared = shape[1:]",
          "fast/test_ops.py::test_sampling_groups_share_what_they_should"),
    Fault("a draw for every token under example sampling", "fast.ops",
          "shared = shape[1:]  #", "shared = shape[:0]  #",
          "fast/test_ops.py::test_sampling_groups_share_what_they_should"),
    Fault("group ids ignored", "fast.ops", "groups = groups.reshape(-1)", "groups = None",
          "fast/test_ops.py::test_a_draw_follows_the_group_and_not_the_place"),
    Fault("rows dealt to the groups in turn", "fast.ops",
          "repeat_interleave(draws.rows_per_group, 0)[:rows]",
          "repeat(draws.rows_per_group, 1)[:rows]",
          "fast/test_ops.py::test_gradients_equal_those_through_the_definition"),
    Fault("seed cut to 63 bits", "fast.ops", "seed - 2**64", "seed - 2**63", OP),
    Fault("layer off by one", "fast.ops", "noise.draw, layer, ids", "noise.draw, layer + 1, ids", OP),
    Fault("noise shared by all layers", "fast.ops", "noise.draw, layer, ids", "noise.draw, 0, ids", OP),
    Fault("noise shared by all steps", "fast.ops", "noise.draw, layer, ids", "0, layer, ids", OP),
    Fault("s and sigma exchanged", "fast.ops",
          "s=s.data_ptr(),\n        sigma=sigma.data_ptr()",
          "s=sigma.data_ptr(),\n        sigma=s.data_ptr()", OP),
    Fault("layer and draw exchanged", "fast.ops",
          "(seed & MASK, draw, layer)", "(seed & MASK, layer, draw)", OP),
    Fault("gradient of sigma without eps", "fast.ops", "(t.scaling * (s + sigma * eps)",
          "(t.scaling * (s + sigma - sigma.detach() + sigma.detach() * eps)", GRADIENT),
    Fault("sigma detached", "fast.ops", "(t.scaling * (s + sigma * eps)",
          "(t.scaling * (s + sigma.detach() * eps)", GRADIENT),
    Fault("s detached", "fast.ops", "(t.scaling * (s + sigma * eps)",
          "(t.scaling * (s.detach() + sigma * eps)", GRADIENT),
    Fault("gradients of s and sigma exchanged", "fast.ops",
          "to[0], x.shape[1], *to[3:],", "to[0], x.shape[1], *to[3:5], to[6], to[5],", GRADIENT),
    Fault("gradient of x without the base's share", "fast.ops",
          "out[0] = (grad_rows @ t.weight).view(t.x.shape)", "out[0] = torch.zeros_like(t.x)",
          GRADIENT),
    Fault("gradient of x without the update's share", "fast.ops",
          "            to[0], x.shape[1], *to[3:],", "            0, x.shape[1], *to[3:],",
          GRADIENT),
    Fault("mean for sum in the gradient of the bias", "fast.ops",
          "out[2] = grad_rows.sum(0)", "out[2] = grad_rows.mean(0)", GRADIENT),
]  # fmt: skip

OBJECTIVE = [
    Fault("KL reversed", "core.divergence",
          "return (log_ratio + (sigma**2 + s**2) / (2 * prior_std**2) - 0.5).sum()",
          "return kl_official(s, sigma, prior_std)", KL_VALUES),
    Fault("official KL reversed", "core.divergence",
          "return (log_ratio + (prior_std**2 + s**2) / (2 * sigma**2) - 0.5).sum()",
          "return kl_forward(s, sigma, prior_std)", KL_VALUES),
    Fault("log ratio upside down", "core.divergence", "torch.log(prior_std / sigma)",
          "torch.log(sigma / prior_std)", KL),
    Fault("official log ratio upside down", "core.divergence",
          "torch.log(sigma / prior_std)", "torch.log(prior_std / sigma)", KL),
    Fault("KL without its half", "core.divergence", "(2 * prior_std**2) - 0.5)", "(2 * prior_std**2))",
          KL_ZERO),
    Fault("KL: standard deviation for variance", "core.divergence",
          "(sigma**2 + s**2)", "(sigma + s**2)", KL),
    Fault("KL: the prior's variance is its width", "core.divergence", "(2 * prior_std**2) -",
          "(2 * prior_std) -", KL),
    Fault("KL without the mean", "core.divergence", "(sigma**2 + s**2)", "(sigma**2)", KL_GRADIENT),
    Fault("KL: mean for sum over the ranks", "core.divergence", "(2 * prior_std**2) - 0.5).sum()",
          "(2 * prior_std**2) - 0.5).mean()", KL),
    Fault("KL: two forgotten", "core.divergence", "/ (2 * prior_std**2)", "/ prior_std**2", KL_GRADIENT),
    Fault("official KL: standard deviation for variance", "core.divergence",
          "(2 * sigma**2)", "(2 * sigma)", KL_GRADIENT),
    Fault("official KL: the mean in the wrong place", "core.divergence", "(prior_std**2 + s**2) / (2",
          "prior_std**2 + s**2 / (2", KL_GRADIENT),
    Fault("logits averaged", "evaluation.predict",
          "torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))",
          "torch.log_softmax(log_probs.mean(0), -1)",
          "evaluation/test_predict.py::test_probabilities_are_averaged_and_not_logits"),
    Fault("log-probabilities averaged", "evaluation.predict",
          "torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))", "log_probs.mean(0)",
          "evaluation/test_predict.py::test_probabilities_are_averaged_and_not_logits"),
    Fault("probabilities summed over the draws", "evaluation.predict", "dim=0) - math.log(len(log_probs))",
          "dim=0)", MIXTURE),
    Fault("the first draw for all", "evaluation.predict", "log_probs = log_probs.double()",
          "log_probs = log_probs.double()[:1]", MIXTURE),
    Fault("entropies exchanged", "evaluation.predict", "mixture.exp(), entropy, expected, information",
          "mixture.exp(), expected, entropy, information", MIXTURE),
    Fault("mutual information upside down", "evaluation.predict", "(entropy - expected)",
          "(expected - entropy)", MIXTURE),
    Fault("entropies summed over the draws", "evaluation.predict", "_entropy(log_probs).mean(0)",
          "_entropy(log_probs).sum(0)", MIXTURE),
    Fault("entropy in bits", "evaluation.predict", "* finite).sum(-1)",
          "* finite).sum(-1) / math.log(2)", MIXTURE),
]  # fmt: skip

TRAINING = [
    Fault("KL not divided by N", "core.objective", ".to(nll) / num_examples", ".to(nll)", LOSS),
    Fault("beta left out", "core.objective", "nll + beta * divergence", "nll + divergence", LOSS),
    Fault("NLL summed over the batch", "core.objective", "noise), batch.labels)",
          'noise), batch.labels, reduction="sum")', LOSS),
    Fault("KL of one layer only", "core.objective", "kind.complexity(layers, kl)",
          "kind.complexity(layers[:1], kl)",
          "core/test_objective.py::test_model_kl_sums_over_the_layers"),
    Fault("KL directions exchanged", "core.divergence",
          '"forward": kl_forward,\n    "official": kl_official,',
          '"forward": kl_official,\n    "official": kl_forward,', OBJECTIVES),
    Fault("KL of the logarithms", "core.adapter", "s, sigma, config = log_s.exp(),",
          "s, sigma, config = log_s,",
          OBJECTIVES),
    Fault("the draw follows the row", "core.objective", "groups=batch.ids", "groups=None",
          "core/test_objective.py::test_the_draw_follows_the_example_through_the_whole_model"),
    Fault("answer read off the padding", "core.objective", "lengths=batch.lengths, ", "",
          "core/test_objective.py::test_an_answer_is_read_off_the_last_real_token"),
    Fault("dropped Jacobian of exp", "core.adapter", "return self.log_s.exp(), self",
          "return self.log_s + (self.log_s.exp() - self.log_s).detach(), self", SLOPE),
    Fault("dropped Jacobian of sigma's exp", "core.adapter", ", self.log_sigma.exp()",
          ", self.log_sigma + (self.log_sigma.exp() - self.log_sigma).detach()", SLOPE),
    Fault("log s for s", "core.adapter", "return self.log_s.exp(), self", "return self.log_s, self",
          OBJECTIVES),
    Fault("log variance for log sigma", "core.adapter", ", self.log_sigma.exp()",
          ", (self.log_sigma / 2).exp()", OBJECTIVES),
    Fault("scaling by the root of the rank", "core.adapter", "self.alpha) / self.rank",
          "self.alpha) / self.rank**0.5", "core/test_adapter.py::test_scaling_is_alpha_over_rank"),
    Fault("layers numbered without their blocks", "core.adapter", "len(TARGETS) * block +", "block +",
          "core/test_adapter.py::test_layer_ids_are_distinct_and_do_not_depend_on_the_targets"),
    Fault("start: uniform not centred", "core.adapter", "(2 * uniform[: rank * d_in] - 1)",
          "(uniform[: rank * d_in])", WORDS),
    Fault("start: fan-out for fan-in", "core.adapter", "/ math.sqrt(d_in)", "/ math.sqrt(rank)",
          "core/test_adapter.py::test_kaiming_entries_have_the_uniform_variance"),
    Fault("start: the same words for all layers", "core.adapter", "INIT_STREAM + layer,",
          "INIT_STREAM,",
          "core/test_adapter.py::test_initial_values_are_a_pure_function_of_seed_and_layer"),
    Fault("start: halves of the stream exchanged", "core.noise",
          "stream % WORD, RESERVED_LAYER, stream // WORD",
          "stream // WORD, RESERVED_LAYER, stream % WORD",
          "core/test_noise.py::test_philox_words_are_blocks_of_the_reserved_layer"),
    Fault("start: log sigma uniform", "core.adapter", "low + (init_sigma - low) * uniform",
          "low * (init_sigma / low) ** uniform", WORDS),
    Fault("start: sigma from zero", "core.adapter", "low + (init_sigma - low) * uniform",
          "init_sigma * uniform",
          "core/test_adapter.py::test_initialisation_is_the_thin_svd_of_a_kaiming_matrix"),
    Fault("start: s where log s belongs", "core.adapter", '"log_s": singular.log()',
          '"log_s": singular',
          "core/test_adapter.py::test_initialisation_is_the_thin_svd_of_a_kaiming_matrix"),
    Fault("start: B not zero", "core.adapter", "torch.zeros(d_out, config.rank",
          "torch.ones(d_out, config.rank",
          "methods/test_contract.py::test_a_fresh_adapter_changes_nothing"),
    Fault("step: KL not divided by N", "training.trainer", "(c.beta * kl / len(self.data.labels)).backward()",
          "(c.beta * kl).backward()", STEP),
    Fault("step: KL in the log but not in the gradient", "training.trainer",
          "(c.beta * kl / len(self.data.labels)).backward()", "pass", STEP),
    Fault("step: NLL summed over the batch", "training.trainer", 'reduction="sum") / len(indices)',
          'reduction="sum")', STEP),
    Fault("step: one rate for all", "training.trainer", "fast_lr = 4 * lr if variational_lr is None else",
          "fast_lr = lr if True else", STEP),
    Fault("step: A and B at the rate of the variational parameters", "training.trainer",
          '"params": slow, "lr": lr', '"params": slow, "lr": fast_lr', STEP),
    Fault("step: AdamW on the variational parameters alone", "training.trainer", '"params": slow,',
          '"params": slow[:0] or [torch.nn.Parameter(torch.zeros(1))],', STEP),
    Fault("step: schedule left out", "training.trainer", 'group["lr"] = rate * factor', 'group["lr"] = rate',
          "training/test_trainer.py::test_a_step_follows_the_schedule"),
    Fault("step: weight decay left out", "training.trainer", "weight_decay=c.weight_decay", "weight_decay=0.0",
          "training/test_trainer.py::test_weight_decay_is_decoupled"),
    Fault("step: one draw for all steps", "training.trainer", "FIRST_TRAINING_DRAW + step)",
          "FIRST_TRAINING_DRAW)", "training/test_trainer.py::test_noise_of_a_step_is_its_own"),
    Fault("step: training's draws are prediction's", "training.trainer", "FIRST_TRAINING_DRAW + step)",
          "step)", "training/test_trainer.py::test_noise_of_a_step_is_its_own"),
    Fault("official step: KL ascended", "training.trainer", "parameter.sub_(rate", "parameter.add_(rate",
          OFFICIAL),
    Fault("official step: without pi", "training.trainer", "factor * kl_weight(self.done, period)", "factor",
          OFFICIAL),
    Fault("official step: pi of the next step", "training.trainer", "kl_weight(self.done, period)",
          "kl_weight(self.done + 1, period)", OFFICIAL),
    Fault("official step: KL mixed into AdamW's too", "training.trainer",
          'if kl.requires_grad and c.objective == "elbo":', "if kl.requires_grad:",
          "training/test_trainer.py::test_the_official_loss_is_the_nll"),
]  # fmt: skip

METRICS = [
    Fault("bins: confidence 1 has one of its own", "evaluation.metrics", ".long().clamp(max=bins - 1)",
          ".long()", "evaluation/test_metrics.py::test_confidence_one_is_in_the_last_bin"),
    Fault("bins: an edge belongs below", "evaluation.metrics", "(confidence * bins).floor().long()",
          "((confidence * bins).ceil() - 1).long()",
          "evaluation/test_metrics.py::test_a_confidence_on_an_edge_opens_its_bin"),
    Fault("bins: one too few", "evaluation.metrics", "(confidence * bins).floor()",
          "(confidence * (bins - 1)).floor()", ECE),
    Fault("ECE: mean over the bins", "evaluation.metrics", ".abs().sum()) / len(gap)", ".abs().sum()) / bins",
          ECE),
    Fault("ECE: signed gaps cancel", "evaluation.metrics", "minlength=bins).abs().sum()",
          "minlength=bins).sum().abs()", ECE),
    Fault("ECE: a gap for every row", "evaluation.metrics", "weights=gap, ", "weights=gap.abs(), ", ECE),
    Fault("Brier averaged over the classes", "evaluation.metrics", ".square().sum(1)", ".square().mean(1)",
          SCORES),
    Fault("Brier not squared", "evaluation.metrics", ".square().sum(1)", ".abs().sum(1)", SCORES),
    Fault("NLL summed over the rows", "evaluation.metrics", "_nll_rows(*_checked(probs, labels)).mean()",
          "_nll_rows(*_checked(probs, labels)).sum()", SCORES),
    Fault("NLL in bits", "evaluation.metrics", "labels[:, None])[:, 0].log()", "labels[:, None])[:, 0].log2()",
          SCORES),
    Fault("ties to the last class", "evaluation.metrics",
          "stable=True)\n    return ordered[:, 0], (classes[:, 0] == labels).double()",
          "stable=True)\n    last = (ordered == ordered[:, :1]).sum(1, keepdim=True) - 1\n"
          "    return ordered[:, 0], (classes.gather(1, last)[:, 0] == labels).double()",
          "evaluation/test_metrics.py::test_the_first_of_tied_classes_is_predicted"),
    Fault("accuracy of the least probable class", "evaluation.metrics", "descending=True, stable",
          "descending=False, stable", SCORES),
    Fault("AUROC: ties won", "evaluation.metrics", "- behind) + behind)).sum()",
          "- behind) + 2 * behind)).sum()",
          AUROC),
    Fault("AUROC: ties lost", "evaluation.metrics", "- behind) + behind)).sum()", "- behind))).sum()", AUROC),
    Fault("AUROC: positives below", "evaluation.metrics", "positive = labels == 1", "positive = labels == 0",
          AUROC),
]  # fmt: skip

SCHEDULES = [
    Fault("warm-up off by one", "training.schedule", "return step / max(1, rise)",
          "return (step + 1) / max(1, rise)", WARMUP),
    Fault("warm-up left out", "training.schedule", "if step < rise:", "if False:", WARMUP),
    Fault("warm-up without a fall", "training.schedule",
          "return max(0.0, (steps - step) / max(1, steps - rise))",
          "return 1.0", WARMUP),
    Fault("fall one step early", "training.schedule", "(steps - step) /", "(steps - step - 1) /", WARMUP),
    Fault("fall as if there were no warm-up", "training.schedule", "max(1, steps - rise)", "max(1, steps)",
          WARMUP),
    Fault("period with another power of N", "training.schedule", "(math.pi / 8)", "(math.pi / 4)", PERIODS),
    Fault("period not divided by the batch", "training.schedule", "(math.pi / 8) / batch)", "(math.pi / 8))",
          PERIODS),
    Fault("KL weights counted from zero", "training.schedule", "i = step % period + 1", "i = step % period",
          WEIGHTS),
    Fault("KL weights without a new round", "training.schedule", "i = step % period + 1", "i = step + 1",
          WEIGHTS),
    Fault("KL weights doubled", "training.schedule", "2.0 ** (i - period - 1)", "2.0 ** (i - period)", WEIGHTS),
    Fault("KL weights falling", "training.schedule", "2.0 ** (i - period - 1)", "2.0 ** -i", WEIGHTS),
]  # fmt: skip

LLAMA = [
    Fault("RMSNorm: mean subtracted", "model.llama", "wide.pow(2).mean(-1, keepdim=True)",
          "wide.var(-1, keepdim=True, unbiased=False)", NORM),
    Fault("RMSNorm: sum for mean", "model.llama", "wide.pow(2).mean(-1", "wide.pow(2).sum(-1", NORM),
    Fault("RMSNorm: eps outside the root", "model.llama",
          "torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)",
          "(1 / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.eps))", NORM),
    Fault("RMSNorm: weight counted from one", "model.llama", "return self.weight * wide",
          "return (1 + self.weight) * wide", NORM),
    Fault("RoPE: neighbouring pairs", "model.llama", "first, second = x.chunk(2, dim=-1)",
          "first, second = x[..., ::2], x[..., 1::2]", ROTATE),
    Fault("RoPE: turned backwards", "model.llama", "torch.cat((-second, first)",
          "torch.cat((second, -first)", ROTATE),
    Fault("RoPE: halves exchanged", "model.llama", "torch.cat((-second, first)",
          "torch.cat((first, -second)", ROTATE),
    Fault("RoPE: another base", "model.llama", "1.0 / self.theta**exponent",
          "1.0 / 1e4**exponent if self.theta != 1e4 else 1.0 / 5e5**exponent", ROTATE),
    Fault("RoPE: exponent of half the width", "model.llama", ".float() / head_dim",
          ".float() / (head_dim // 2)", ROTATE),
    Fault("RoPE: linear factor multiplied", "model.llama", "return inverse / self.factor",
          "return inverse * self.factor", ROPE),
    Fault("RoPE: ramp upside down", "model.llama",
          "keep * inverse + (1 - keep) * inverse / self.factor",
          "(1 - keep) * inverse + keep * inverse / self.factor", ROPE),
    Fault("RoPE: wavelength without two pi", "model.llama", "* inverse / (2 * math.pi)", "* inverse",
          ROPE),
    Fault("RoPE: no ramp", "model.llama", "span).clamp(0, 1)", "span).clamp(0, 1).round()", ROPE),
    Fault("attention: kv heads in turn", "model.llama",
          "q, k, v, attn_mask",
          "q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v)), attn_mask",
          ATTENTION),
    Fault("attention: sees the future", "model.llama", "is_causal=causal", "is_causal=False",
          ATTENTION),
    Fault("attention: no 1/sqrt(h)", "model.llama", "is_causal=causal",
          "is_causal=causal, scale=1.0", ATTENTION),
    Fault("attention: values turned too", "model.llama", "q, k = rotate(",
          "v = rotate(v, ctx.cos, ctx.sin)\n        q, k = rotate(", ATTENTION),
    Fault("attention: queries not turned", "model.llama",
          "rotate(q, asking.cos, asking.sin), rotate(k", "q, rotate(k", ATTENTION),
    Fault("attention: q's rows in the other order of heads", "model.llama",
          "asking.groups).unflatten(-1, (self.heads, -1))",
          "asking.groups).unflatten(-1, (-1, self.heads)).mT",
          ATTENTION),
    Fault("attention: heads not put back", "model.llama", "y.transpose(1, 2).flatten(2)",
          "y.reshape(*y.shape[::2], -1)", ATTENTION),
    Fault("attention: keys and values exchanged", "model.llama",
          "q, k, v, attn_mask", "q, v, k, attn_mask", ATTENTION),
    Fault("SwiGLU: gate and up exchanged", "model.llama", "F.silu(gate) * up", "gate * F.silu(up)",
          MODEL),
    Fault("SwiGLU: gelu for silu", "model.llama", "F.silu(gate) * up", "F.gelu(gate) * up", MODEL),
    Fault("residual of the attention left out", "model.llama", "        x = x + y\n", "        x = y\n",
          MODEL),
    Fault("residual of the MLP left out", "model.llama", "return x + self.mlp(", "return self.mlp(",
          MODEL),
    Fault("norms of a block exchanged", "model.llama", "self.attn(self.attn_norm(x), ctx, last)",
          "self.attn(self.mlp_norm(x), ctx, last)", MODEL),
    Fault("post-norm for pre-norm", "model.llama", "self.attn(self.attn_norm(x), ctx, last)",
          "self.attn_norm(self.attn(x, ctx, last))", MODEL),
    Fault("final norm left out", "model.llama", "self.lm_head(self.norm(x).to(", "self.lm_head(x.to(",
          MODEL),
    Fault("padding: rows packed in the opposite order", "model.llama", "x.flatten(0, 1)[self.index]",
          "x.flatten(0, 1)[self.index.flip(0)]", PADDED),
    Fault("padding: the answer read one token early", "model.llama", "lengths.to(device) - 1",
          "(lengths.to(device) - 2).clamp(min=0)", PADDED),
    Fault("padding: the last token sees it", "model.llama", "keys <= self.past + ends[:, None]",
          "keys >= 0 * ends[:, None]", PADDED),
]  # fmt: skip

FAULTS = PHILOX + NOISE + LAYER + OBJECTIVE + TRAINING + METRICS + SCHEDULES + LLAMA
