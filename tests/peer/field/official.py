"""The official code of ScalaBL, SRI-CSL/BayesAdapt, at two commits."""

from __future__ import annotations

import importlib
import math
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from scalabl_ref import LlamaConfig, Noise
from scalabl_ref.verify import formulas, reference

from ..grade import Difference, Program
from .feeding import (
    LAST_BIN,
    NO_PERIOD,
    NO_ROUNDING,
    ONE_DRAW,
    SINGLE_EDGES,
    answered,
    case_uniforms,
    draw,
    kind,
    layers_of,
    left_padded,
    llama,
    lora,
    noisy,
    one_draw,
    one_layer,
    op,
    other_kl,
    plain_sum,
    uniforms,
    warmup_by,
)
from .installed import whitened
from .wrapper import Wrapper, exact_draws, tiny

SWITCH = "the switch for the mean model does not reach the layer, which draws"


class Official(Program):
    """What the two commits share: the layer, its KL and its start."""

    linear: type[nn.Module]  # their ScalaBLLinear

    def wrap(self, model):
        """Their layer in the place of PEFT's factor, in every adapted layer."""
        raise NotImplementedError

    def op_forward(self, case):
        layer = self.wrap(one_layer(case)).base_model.model.linear.eval()
        if not noisy(case):
            layer.sample(False)
        p = case._replace(p={**case.p, "rank": len(case.t["s"])})

        def names(leaves):
            logs = {"log_s": leaves["s"].log(), "log_s_sigma": leaves["sigma"].log()}
            return {f"lora_A.default.{n}": v for n, v in {**logs, "Vh": leaves["A"]}.items()}

        with answered("randn_like", [draw(p)]):
            found = op(case, layer, names)
        if "grad_y" in case.t:  # PyTorch has None where no path leads
            found.setdefault("sigma", torch.zeros_like(case.t["sigma"]))
        return found

    op_backward = op_forward

    def prior(self, linear, prior_std):
        """N(1e-8, prior_std^2), as the code says it."""
        linear.log_p_mu.fill_(math.log(1e-8))
        linear.log_p_sigma.fill_(math.log(prior_std))

    def kl_layer(self, s, sigma, prior_std):
        model = lora(nn.ModuleDict({"linear": nn.Linear(len(s) + 1, 2)}), len(s), 1.0, "linear")
        layer = self.wrap(model).base_model.model.linear
        linear = layer.lora_A["default"]
        linear.log_s.data, linear.log_s_sigma.data = s.log(), sigma.log()
        self.prior(linear, prior_std)
        return layer

    def kl(self, case):
        layer = self.kl_layer(case.t["s"], case.t["sigma"], case.p["prior_std"])
        return {"kl": layer.lora_A["default"].kl_div}

    def initialisation(self, case):
        p, seen = case.p, []
        if case.id.startswith("svd"):
            r, d_in = case.t["kaiming"].shape
            values = (case.exact["kaiming"] * math.sqrt(d_in) + 1).flatten() / 2
            with uniforms([*values.tolist(), *[0.5] * r], seen):
                linear = self.linear(d_in, r)
            s, A = linear.log_s.exp(), linear.Vh
            return {"identity": A @ A.T, "gram": (A.T * s**2) @ A}
        given = (case.t["U"], case.t["singular"], case.t["Vh"])
        with (
            uniforms(case_uniforms(case), seen),
            mock.patch.object(torch.linalg, "svd", lambda *_, **__: given),
        ):
            linear = self.linear(p["d_in"], p["rank"], s_sigma_init_eps=p["init_sigma"])
        model = self.wrap(lora(nn.ModuleDict({"linear": nn.Linear(p["d_in"], p["d_out"])}),
                               p["rank"], 1.0, "linear"))  # fmt: skip
        B = model.base_model.model.linear.lora_B["default"].weight
        return {"kaiming": seen[0], "A": linear.Vh, "B": B, "log_s": linear.log_s,
                "log_sigma": linear.log_s_sigma}  # fmt: skip

    def load(self, case, model):
        """The case's adapters and prior into a wrapped model; the layers by our names."""
        found = {}
        for name, layer in layers_of(model).items():
            linear, found[name] = layer.lora_A["default"], layer
            linear.Vh.data = case.t[f"{name}.A"].clone()
            linear.log_s.data = case.t[f"{name}.log_s"].clone()
            linear.log_s_sigma.data = case.t[f"{name}.log_sigma"].clone()
            layer.lora_B["default"].weight.data = case.t[f"{name}.B"].clone()
            self.prior(linear, case.p.get("prior_std", 1.0))
        return found

    def parameters(self, layers):
        """Of every adapted layer, by the kit's names."""
        return {
            f"{name}.{ours}": parameter
            for name, layer in layers.items()
            for ours, parameter in (
                ("A", layer.lora_A["default"].Vh), ("B", layer.lora_B["default"].weight),
                ("log_s", layer.lora_A["default"].log_s),
                ("log_sigma", layer.lora_A["default"].log_s_sigma),
            )
        }  # fmt: skip

    def draws(self, case, drawn):
        """The layers, as they are called, are answered with these draws of the case."""
        layers = case.p["layers"].values()
        return answered("randn_like", (draw(case, layer, i) for i in drawn for layer in layers))

    def training_step(self, case):
        """A step on the NLL and one on the KL, from the case's state."""
        if case.p["objective"] != "official":
            return None
        model, optimizer, step = self.ready(case)
        layers = self.load(case, model)
        own, first = self.parameters(layers), {}
        for name, parameter in own.items():
            moments = {n: case.t[f"{n}.{name}"].clone() for n in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(case.p["step"])), **moments}
            parameter.register_hook(partial(keep_first, first, name))
        for group in optimizer.param_groups:
            group["betas"] = (case.p["beta1"], case.p["beta2"])
        kl = sum(layer.lora_A["default"].kl_div for layer in layers.values()).detach()
        with self.draws(case, [None]):
            nll = step((left_padded(case), case.t["labels"], None))
        out = {"loss": nll, "nll": nll, "kl": kl}
        for name, parameter in own.items():
            out[f"gradient.{name}"], out[f"after.{name}"] = first[name], parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                out[f"after.{moment}.{name}"] = optimizer.state[parameter][moment]
        return out


def keep_first(kept: dict, name: str, gradient) -> None:
    kept.setdefault(name, gradient.clone())


def config_of(p):
    """Of a case's model, for the kit's formulas."""
    return LlamaConfig(**{n: p[n] for n in vars(LlamaConfig(20, 8, 12, 2, 4, 2, 4)) if n in p})


ONE_GROUP = {"group_ids": lambda batch: [0] * len(batch["ids"])}
ONE_RATE = "one rate for all parameters"
REVERSE = "KL(p ‖ q)"
AHEAD = "the NLL's rate is one step ahead"


def step_with(*conventions: str):
    """The outputs of a step under these conventions."""

    def expected(case):
        p, t = case.p, case.exact
        p = {**p, "variational_lr": p["lr"] if ONE_RATE in conventions else p["variational_lr"],
             "kl": "official" if REVERSE in conventions else p["kl"]}  # fmt: skip
        config = config_of(p)
        w = {n: v for n, v in t.items() if n.endswith(".weight")}
        ends = ("A", "B", "log_s", "log_sigma")
        state = {n: v for n, v in t.items() if n.rsplit(".", 1)[-1] in ends}
        rate, ahead = formulas.rate_of, int(AHEAD in conventions)

        def rate_of(name, p):
            return rate(name, {**p, "step": p["step"] + ahead})

        groups = ONE_GROUP if ONE_DRAW in conventions else {}
        with mock.patch.multiple(formulas, rate_of=rate_of, **groups):
            return formulas.training_step(config, w, t, state, p)[0]

    return expected


def step_differences(*conventions: str):
    """For the case whose KL is KL(p ‖ q), and for the other."""
    for id, more in (("step-official", ()), ("step-official-forward", (REVERSE,))):
        names = (*conventions, *more)
        yield Difference("training step", "; ".join(names), lambda case, id=id: case.id == id,
                         step_with(*names))  # fmt: skip


def one_draw_prediction(case):
    config = config_of(case.p)
    w = {n: v for n, v in case.exact.items() if n.endswith(".weight")}
    with mock.patch.multiple(formulas, **ONE_GROUP):
        logits = torch.stack(formulas.predicted_logits(config, w, case.exact, case.exact, case.p))
    found = reference.predictive(logits)
    return {"logits": logits, **{n: torch.tensor(v) for n, v in found.items()}}


class First(Official, Wrapper):
    """ef51e8a."""

    def __init__(self, module):
        super().__init__(module, module.ScalaBL)
        self.linear = module.ScalaBLLinear

    def wrap(self, model):
        wrapper = self.cls.__new__(self.cls)
        nn.Module.__init__(wrapper)
        wrapper.blobconfig = self.module.ScalaBLConfig(0.05, 8.0, 0.2)
        wrapper._modify_lora_layers(model)
        return model

    def ready(self, case):
        wrapper = self.prepared(self.made(case), case)
        for scheduler in (wrapper.scheduler, wrapper.scheduler2):
            for _ in range(case.p["step"]):
                scheduler.scheduler.step()
        wrapper.i = case.p["step"] + 1

        def step(batch):
            wrapper.fit([batch], None)
            return wrapper.wandb_logger[-1]["train_nll_loss"]

        return wrapper.base_model.model, wrapper.opt.optimizer, step

    @torch.no_grad()
    def prediction(self, case):
        S = case.p["samples"]
        wrapper = self.made(tiny(case, **{**tiny().p, **case.p})).eval()
        self.load(case, wrapper.base_model.model)
        wrapper.target_ids = torch.arange(len(case.t["lm_head.weight"]))
        batch = (left_padded(case), None, None)
        with self.draws(case, range(S or 1)):
            logits = wrapper.forward_logits(batch, sample=S > 0, n_samples=S)
        logits = logits.transpose(0, 1) if S else logits[None]
        return {"logits": logits, "probs": self.evaluated(logits, case.t["ids"] * 0)[0]}

    differences = (
        Difference("op forward", ONE_DRAW, noisy, one_draw),
        Difference("op backward", ONE_DRAW, noisy, one_draw),
        *(Difference(level, SWITCH, lambda case: not noisy(case),
                     lambda case: one_draw(case, Noise(0, 0)))
          for level in ("op forward", "op backward")),
        Difference("KL", "KL(p ‖ q) alone", kind("kl-forward"), other_kl("official")),
        Difference("ELBO", "the logged ELBO is nll + KL(p ‖ q), with neither beta nor N",
                   lambda case: True, plain_sum("official")),
        NO_ROUNDING, NO_PERIOD, LAST_BIN, SINGLE_EDGES,
        *step_differences(ONE_DRAW, ONE_RATE),
        Difference("prediction", ONE_DRAW, kind("prediction-draws"), one_draw_prediction),
        Difference("prediction", SWITCH, kind("prediction-mean"),
                   lambda case: one_draw_prediction(case._replace(p={**case.p, "samples": 1}))),
    )  # fmt: skip


class Gym(Official):
    """3843000."""

    def __init__(self, folder):
        self.folder = folder
        self.wrappers = importlib.import_module("bayesadapt.lorawrappers")
        self.trainers = importlib.import_module("bayesadapt.trainers")
        self.schedulers = importlib.import_module("bayesadapt.schedulers")
        self.linear = self.wrappers.ScalaBLLinear

    def trainer(self, model=None, **optim):
        """Its trainer without its data; its optimisers' configuration, changed by `optim`."""
        omegaconf = importlib.import_module("omegaconf").OmegaConf
        parts = [omegaconf.load(self.folder / "conf" / f"{name}.yaml")
                 for name in ("optim/base", "optim/default", "optim/vi")]  # fmt: skip
        wrapper = [omegaconf.load(self.folder / "conf" / "lora" / "wrapper" / f"{name}.yaml")
                   for name in ("default", "scalabl")]  # fmt: skip
        once = {"backbone": 1, "last_layer": 1}
        cfg = {"optim": omegaconf.merge(*parts, optim),
               "lora": {"wrapper": omegaconf.merge(*wrapper)},
               "samples": {"train": once, "test": once},
               "seed": 0, "n_eval_trials": 1, "pbar": False}  # fmt: skip
        for part in (cfg["optim"], cfg["lora"]["wrapper"]):
            part.pop("defaults", None)
        trainer = self.trainers.VITrainer.__new__(self.trainers.VITrainer)
        trainer.cfg, trainer._model = omegaconf.create(cfg), model
        trainer.device = torch.device("cpu")
        return trainer

    def wrap(self, model):
        trainer = self.trainer(model)
        trainer.cfg.lora.wrapper.target_modules = ["linear", "q_proj", "v_proj", "lm_head"]
        trainer.wrap_lora_layers()
        return trainer._model

    def settings(self, p):
        """The numbers of a case in its configuration."""
        return {
            "max_train_steps": p["steps"], "warmup_ratio": p["warmup"], "batch_size": 3,
            "weight_decay": p["weight_decay"],
            "nll_optimizer": {"lr": p["lr"], "eps": p["adam_eps"]},
            "kl_optimizer": {"lr": p["kl_lr"]},
        }  # fmt: skip

    def schedules(self, case):
        p, out = case.p, []
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        if case.id.startswith("warmup"):
            scheduler = self.schedulers.BLoBNLLScheduler(optimizer, p["warmup"], p["steps"])
            for _ in range(p["steps"]):
                out.append(scheduler.get_last_lr()[0])
                scheduler.step()
            return {"factor": torch.tensor(out, dtype=torch.float64)}
        scheduler = self.schedulers.BLoBKLScheduler(optimizer, 0.0, 1, p["num_examples"],
                                                    p["batch"], 8.0)  # fmt: skip
        at = case.t["step"].tolist()
        for step in range(max(at) + 1):
            if step in at:
                out.append(scheduler.last_pi)
            scheduler.step()
        return {
            "period": torch.tensor(scheduler.M),
            "weight": torch.tensor(out, dtype=torch.float64),
        }

    def elbo(self, case):
        """The log of a step whose logits are given."""
        p, t = case.p, case.t
        layers = [self.kl_layer(s, sigma, p["prior_std"])
                  for s, sigma in zip(t["s"], t["sigma"], strict=True)]  # fmt: skip
        trainer = self.trainer(nn.ModuleList(layers))
        trainer.trainloader = SimpleNamespace(dataset=range(p["num_examples"]))
        trainer.load_optimizer()
        logits = t["logits"].clone().requires_grad_()
        trainer.compute_logits = lambda _: logits[:, None]
        log = trainer.train_step((None, t["labels"], None))
        return {"loss": log["train/elbo"], "nll": log["train/nll_loss"], "kl": log["train/kl_loss"]}

    def predictive(self, case):
        logits = case.t["logits"].transpose(0, 1)
        bald = importlib.import_module("active_learn").bald(logits)
        average = importlib.import_module("bayesadapt.utils").average_log_probs
        return {"probs": average(logits.double()).exp(), "mutual_information": bald}

    def metrics(self, case):
        """Its evaluation, which is in float64 and has 15 bins."""
        if case.id not in ("ece-15", "scores"):
            return None
        average = importlib.import_module("bayesadapt.utils").average_log_probs
        mixture = lambda z: average(z.flatten(1, -2).transpose(0, 1)).exp()  # noqa: E731
        logits = exact_draws(
            case.exact["probs"], lambda z: mixture(z).reshape(z.shape[1:])
        ).transpose(0, 1)
        trainer = self.trainer(nn.Module())
        trainer.class_ids, trainer.compute_logits = [0, 1], lambda _: logits
        labels = case.t["labels"]
        trainer.testloader = [(None, labels, [str(i) for i in range(len(labels))])]
        with mock.patch.object(self.trainers.VITrainer, "param_counts", {}):
            (found,), _ = trainer.evaluate(save=False, verbose=False)
        if case.id == "scores":
            return {"acc": found["ACC"], "nll": found["NLL"], "brier": found["Brier"]}
        return {"ece": found["ECE"]}

    def model(self, case):
        p = case.p
        return self.wrap(lora(llama(case), p["rank"], p["scaling"], "q_proj", "v_proj", "lm_head"))

    def ready(self, case):
        trainer = self.trainer(self.model(case), **self.settings(case.p))
        trainer.trainloader = SimpleNamespace(dataset=range(case.p["num_examples"]))
        trainer.load_optimizer()
        for scheduler in (trainer.nll_scheduler, trainer.kl_scheduler):
            for _ in range(case.p["step"]):
                scheduler.step()
        trainer.model.train()
        return (trainer.model, trainer.nll_optimizer,
                lambda batch: trainer.train_step(batch)["train/nll_loss"])  # fmt: skip

    @torch.no_grad()
    def prediction(self, case):
        S = case.p["samples"]
        trainer = self.trainer(self.model(case).eval())
        for layer in self.load(case, trainer.model).values():
            layer.sample(S > 0)
        trainer.cfg.samples.test.backbone = S or 1
        with self.draws(case, range(S or 1)):
            logits = trainer.compute_logits(left_padded(case)).transpose(0, 1)
        case = case._replace(t={"logits": logits})
        return {"logits": logits, **self.predictive(case)}

    def subspace(self, case):
        """Its Laplace approximation with a low-rank H, given H and J."""
        t, name = case.t, case.id.split("-")[0]
        if name == "scales":
            return None
        if name == "curvature":
            curvature = importlib.import_module("bayesadapt.laplace.curvature.curvature")
            backend = curvature.GGNInterface(nn.Module(), "classification")
            loss, H = backend._get_full_ggn(t["J"], t["logits"], t["labels"])
            return {"H": H, "log_likelihood": -loss}
        laplace = importlib.import_module("bayesadapt.laplace.baselaplace")
        model = nn.ParameterDict({"theta": nn.Parameter(torch.zeros(len(t["H"])))})
        found = laplace.LowRankLaplace(model, "classification")
        if name == "gaussian":
            values, vectors = whitened(t["H"], t["precision"])
            vectors, K = t["precision"].sqrt()[:, None] * vectors, case.p["directions"]
            found.H = self.positive(values[-K:], vectors[:, -K:])
            found.prior_precision = t["precision"]
            return {"covariance": found.functional_variance(t["J"])}
        found.H = self.positive(*torch.linalg.eigh(t["H"]))
        found.mean, found.loss = t["scales"], torch.tensor(-case.p["log_likelihood"])
        each = [found.log_marginal_likelihood(some[t["group"]]) for some in t["precision"]]
        return {"log_evidence": torch.stack(each)}

    def positive(self, values, vectors):
        """As its `eig_lowrank` keeps them."""
        return vectors[:, values > 1e-6], values[values > 1e-6]

    differences = (
        Difference("op forward", ONE_DRAW, noisy, one_draw),
        Difference("op backward", ONE_DRAW, noisy, one_draw),
        Difference("KL", "KL(p ‖ q) alone", kind("kl-forward"), other_kl("official")),
        Difference("ELBO", "the logged ELBO is nll + KL(p ‖ q), with neither beta nor N",
                   lambda case: True, plain_sum("official")),
        Difference("schedules", AHEAD, kind("warmup"),
                   warmup_by(lambda i, p: reference.warmup(i + 1, p["steps"], p["warmup"]))),
        NO_PERIOD,
        *step_differences(ONE_DRAW, ONE_RATE, AHEAD),
        Difference("prediction", ONE_DRAW, kind("prediction-draws"), one_draw_prediction),
    )  # fmt: skip
