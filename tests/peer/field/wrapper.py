"""bayesian-peft, and what the first release of the official code has from it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from unittest import mock

import peft
import torch
from torch import nn

from ..grade import Case, Difference, Program, kit
from .feeding import (
    LAST_BIN,
    NO_PERIOD,
    NO_ROUNDING,
    SINGLE_EDGES,
    as_lora,
    kind,
    layers_of,
    left_padded,
    llama,
    lora,
    noisy,
    one_layer,
    op,
    plain_sum,
)
from .installed import Peft


def tiny(case: Case | None = None, **changes) -> Case:
    """A case with a model and a batch; without one of its own, those of a training step."""
    if case is None or "vocab_size" not in case.p:
        case = next(c for c in kit() if c.id == "step-official")
    return case._replace(p={**case.p, **changes})


class Log(list):
    log = list.append


class Wrapper(Program):
    """A wrapper of PEFT's model with their `fit` and `evaluate`, which both programs have.

    The schedules, the objective, the mixture and the metrics are read from what these log, with the
    logits that a case gives.
    """

    def __init__(self, module, cls):
        self.module, self.cls = module, cls

    def args(self, p):
        """Of its command line, with the numbers of a case; both commands have these options."""
        options = (
            "--dataset-type mcdataset --dataset obqa --model-type causallm --modelwrapper x "
            "--model x --opt adamw --eval-per-steps 1000000 --bayes-klreweighting "
            "--bayes-datasetrescaling"
        )
        args = self.module.get_parser().parse_args(options.split())
        vars(args).update(
            lr=p["lr"], opt_wd=p["weight_decay"], adam_epsilon=p["adam_eps"], batch_size=3,
            warmup_ratio=p["warmup"], max_train_steps=p["steps"], bayes_kllr=p["kl_lr"],
            bayes_beta=p["prior_std"], outdim=2, num_samples=p["num_examples"], epoch=0, n_epochs=1,
        )  # fmt: skip
        return args

    def made(self, case):
        """The wrapper around transformers' model with the weights of a case."""
        config = peft.LoraConfig(r=case.p["rank"], lora_alpha=case.p["rank"] * case.p["scaling"],
                                 target_modules=["q_proj", "v_proj", "lm_head"])  # fmt: skip
        accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
        inner = llama(case)
        if self.cls.__name__ == "ScalaBL":  # which takes PEFT's model, and the other a plain one
            inner = peft.get_peft_model(inner, config)
        wrapper = self.cls(inner, config, self.args(case.p), accelerator)
        wrapper.wandb_logger = Log()
        return wrapper

    def prepared(self, wrapper, case):
        data = SimpleNamespace(
            num_samples=case.p["num_examples"], target_ids=torch.arange(2)[:, None],
            train_dataloader=[0], test_dataloader=[0],
        )  # fmt: skip
        wrapper.prepare_for_fit_evaluate(data, wrapper.wandb_logger)
        return wrapper

    def constant(self, wrapper, logits):
        """`fit` gets these logits (B, C), on which no parameter acts."""
        logits = logits.clone().requires_grad_()
        wrapper.forward_logits = lambda *_, **__: logits[:, None]

    def schedules(self, case):
        p = case.p
        if case.id.startswith("warmup"):
            wrapper, out = self.made(tiny(**p)), []
            for _ in range(p["steps"]):
                out.append(wrapper.scheduler.get_last_lr()[0] / wrapper.args.lr)
                wrapper.scheduler.step()
            return {"factor": torch.tensor(out, dtype=torch.float64)}
        wrapper = self.made(tiny(num_examples=p["num_examples"]))
        wrapper.args.batch_size = p["batch"]
        self.prepared(wrapper, tiny(num_examples=p["num_examples"]))
        self.constant(wrapper, torch.zeros(1, 2))
        for step in case.t["step"].tolist():
            wrapper.i = step + 1
            wrapper.fit([(None, torch.tensor([0]), None)], None)
        weights = [row["pi"] for row in wrapper.wandb_logger]
        return {"period": torch.tensor(wrapper.M),
                "weight": torch.tensor(weights, dtype=torch.float64)}  # fmt: skip

    def elbo(self, case):
        """The first step's log; the KL is that of two layers."""
        wrapper = self.prepared(self.made(tiny()), tiny())
        layers = [self.kl_layer(s, sigma, case.p["prior_std"])
                  for s, sigma in zip(case.t["s"], case.t["sigma"], strict=True)]  # fmt: skip
        wrapper.div_posterior_prior = lambda _: sum(layer.div_posterior_prior() for layer in layers)
        self.constant(wrapper, case.t["logits"])
        wrapper.fit([(None, case.t["labels"], None)], None)
        (log,) = wrapper.wandb_logger
        return {"loss": log["elbo_loss"], "nll": log["train_nll_loss"],
                "kl": wrapper.div_posterior_prior(None)}  # fmt: skip

    def evaluated(self, logits, labels, bins=15):
        """(probs, what `evaluate` returns) of logits (S, B, C) in one batch."""
        wrapper, seen = self.made(tiny()), []
        wrapper.num_classes, wrapper.args.num_bins = logits.shape[2], bins
        wrapper.forward_logits = lambda *_, **__: logits.transpose(0, 1)

        def recorder(**options):
            metric = accuracy(**options)
            metric.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            return metric

        accuracy = self.module.Accuracy
        with mock.patch.object(self.module, "Accuracy", recorder):
            found = wrapper.evaluate([(None, labels, None)])
        return seen[0].clone(), [torch.as_tensor(value).clone() for value in found]

    def predictive(self, case):
        logits = case.t["logits"]
        return {"probs": self.evaluated(logits, torch.zeros(logits.shape[1]).long())[0]}

    def metrics(self, case):
        if case.id == "auroc":
            return None
        probs, labels = case.t["probs"], case.t["labels"]
        if probs.shape[1] == 2:
            logits = exact_draws(probs, lambda z: z.softmax(-1).mean(0))
        else:  # no confidence is at an edge
            logits = probs.log()[None]
        seen, (acc, ece, nll, brier) = self.evaluated(logits, labels, case.p.get("bins", 15))
        assert probs.shape[1] > 2 or torch.equal(seen.amax(-1), probs.amax(-1))
        return {"acc": acc, "nll": nll, "brier": brier} if case.id == "scores" else {"ece": ece}


def exact_draws(probs, mixture):
    """Logits (2, N, 2) of two draws, of which a program makes exactly these largest probabilities.

    The first draw is sure of the answer. The second has the answer with probability 2 p - 1, and
    the neighbours of its logit are tried. mixture: the program's, of logits (S, ..., 2).
    """
    largest, answer = probs.max(1, keepdim=True)
    z = (2 * largest.double() - 1).logit().clamp(-200, 200).to(probs.dtype)
    steps = 1 + torch.finfo(probs.dtype).eps * torch.arange(-64, 65, dtype=probs.dtype)
    second = torch.stack((z * steps, torch.zeros(len(z), 129, dtype=z.dtype)), -1)  # (N, 129, 2)
    both = torch.stack((torch.tensor([200.0, 0.0], dtype=z.dtype).expand_as(second), second))
    hit = mixture(both)[..., 0] == largest
    assert hit.any(1).all()
    found = both[:, torch.arange(len(z)), hit.long().argmax(1)]
    return torch.where(answer == 0, found, found.flip(-1))


class BayesianPeft(Wrapper):
    """BLoB: its mean is a LoRA, and its KL is that of a Gaussian over the entries of A."""

    differences = (
        NO_ROUNDING, NO_PERIOD,
        Difference("KL", "KL(q ‖ p) alone", kind("kl-official"), lambda case: blob_kl(case)),
        Difference("KL", "1e-6 is added to both standard deviations in the logarithm, and to "
                   "2 sigma_p^2", kind("kl-forward"), lambda case: blob_kl(case)),
        Difference("ELBO", "the logged ELBO is nll + KL(q ‖ p), with neither beta nor N",
                   lambda case: True, plain_sum("forward")),
        LAST_BIN, SINGLE_EDGES,
    )  # fmt: skip

    def kl_layer(self, s, sigma, prior_std):
        """A layer whose A has the means s, and whose rho is the root of sigma."""
        model = lora(nn.ModuleDict({"linear": nn.Linear(len(s), 2)}), 1, 1.0, "linear")
        layer = self.wrapped(model, prior_std).base_model.model.linear
        layer.lora_A["default"].weight.data = s[None]
        layer.lora_A_rho["default"].data = sigma.sqrt()[None]
        return layer

    def wrapped(self, model, prior_std=1.0):
        wrapper = self.cls.__new__(self.cls)
        nn.Module.__init__(wrapper)
        wrapper.blobconfig = self.module.BLoBConfig(bayes_eps=0.05, bayes_beta=prior_std)
        wrapper._modify_lora_layers(model)
        return model

    def kl(self, case):
        layer = self.kl_layer(case.t["s"], case.t["sigma"], case.p["prior_std"])
        return {"kl": layer.div_posterior_prior()}

    def op_forward(self, case):
        if noisy(case):
            return None
        layer = self.wrapped(one_layer(case)).base_model.model.linear.eval()
        layer.sample(False)
        return op(case, layer, as_lora)

    op_backward = op_forward

    @torch.no_grad()
    def prediction(self, case):
        if case.p["samples"]:
            return None
        wrapper = self.made(tiny(case, **{**tiny().p, **case.p}))
        mean = layers_of(Peft().model(case))
        for name, layer in layers_of(wrapper).items():
            layer.lora_A.load_state_dict(mean[name].lora_A.state_dict())
            layer.lora_B.load_state_dict(mean[name].lora_B.state_dict())
        wrapper.eval().target_ids = torch.arange(len(case.t["lm_head.weight"]))
        logits = wrapper.forward_logits((left_padded(case), None, None), sample=False)
        logits = logits.transpose(0, 1)
        return {"logits": logits, "probs": self.evaluated(logits, case.t["ids"] * 0)[0]}


def blob_kl(case):
    s, sigma, prior = case.exact["s"], case.exact["sigma"], case.p["prior_std"]
    log = ((prior + 1e-6) / (sigma + 1e-6)).log()
    return {"kl": (log + (sigma**2 + s**2) / (2 * prior**2 + 1e-6) - 0.5).sum()}
